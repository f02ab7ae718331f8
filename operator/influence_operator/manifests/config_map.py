"""The attempt's ConfigMap: the job document, and a copy of the task's source beside it.

The copy keeps an attempt's pods alike while somebody edits the original. Immutable: a kubelet need not watch
it, and an attempt cannot change under its driver.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import ValidationError

from influence_job.document import FILE, JobDocument
from influence_job.spec import (
    API_VERSION,
    KIND,
    InfluenceJob,
    InfluenceJobSpec,
    Metadata,
    PodSettings,
    ResourcesSpec,
    WorkersSpec,
)
from influence_operator.decisions.snapshot import Object
from influence_operator.manifests import names
from influence_operator.manifests.child import Attempt, Manifest
from influence_operator.manifests.names import Role
from influence_operator.manifests.resources import container_resources

_SOURCE_KEY = "task."
"""Before the copied keys, none of which then is one of ours."""
_SPEC_KEY = "spec.json"
"""The spec as it was when the attempt began, for children that are made later; mounted nowhere."""


def config_map(attempt: Attempt) -> Manifest:
    """The ConfigMap that driver, scheduler and workers mount parts of."""
    source = attempt.source or {}
    spec = attempt.spec.model_copy(update={"image": attempt.image})
    manifest: Manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": attempt.metadata(attempt.base),
        "immutable": True,
        "data": {
            FILE: _written(document(attempt)),
            _SPEC_KEY: spec.model_dump_json(by_alias=True, exclude_defaults=True),
            **_copy(source, "data"),
        },
    }
    binary = _copy(source, "binaryData")
    return manifest | {"binaryData": binary} if binary else manifest


def source_items(source: Object) -> list[dict[str, str]]:
    """The copied keys with the names of their files, for a volume."""
    keys = [*(source.get("data") or {}), *(source.get("binaryData") or {})]
    return [{"key": _SOURCE_KEY + key, "path": key} for key in sorted(keys)]


def copied_source(made: Object) -> Object:
    """The source as an attempt's ConfigMap keeps it, for children made after the original changed."""
    parts = {part: made.get(part) for part in ("data", "binaryData")}
    return {
        part: {k.removeprefix(_SOURCE_KEY): v for k, v in entries.items() if k.startswith(_SOURCE_KEY)}
        for part, entries in parts.items()
        if isinstance(entries, Mapping)
    }


def without_contents(made: Object) -> Object:
    """Its data with the copied source's keys alone, which is all that children made later need of it."""
    parts = {part: made.get(part) for part in ("data", "binaryData")}
    return {
        part: {key: "" if key.startswith(_SOURCE_KEY) else value for key, value in entries.items()}
        for part, entries in parts.items()
        if isinstance(entries, Mapping)
    }


def begun_with(made: Object, current: InfluenceJobSpec) -> InfluenceJobSpec:
    """The spec that an attempt began with, from its ConfigMap; the replicas alone follow `current` at once.

    A cluster that is made after the spec changed so fits the driver that asks for it.
    """
    spec = kept_spec(made)
    if spec is None:
        return current
    workers = spec.workers.model_copy(update={"replicas": current.workers.replicas})
    return spec.model_copy(update={"workers": workers})


def kept_spec(made: Object) -> InfluenceJobSpec | None:
    """The spec as an attempt's ConfigMap keeps it; None: another version of the operator wrote it."""
    try:
        return InfluenceJobSpec.model_validate_json(made["data"][_SPEC_KEY])
    except (KeyError, TypeError, ValidationError):
        return None


def document(attempt: Attempt) -> JobDocument:
    """What the driver reads: the spec with the operator's defaults, on which its plan depends."""
    return JobDocument(
        uid=attempt.uid,
        attempt=attempt.number,
        scheduler=names.scheduler_address(attempt.base, attempt.namespace),
        job=InfluenceJob(
            api_version=API_VERSION,
            kind=KIND,
            metadata=Metadata(name=attempt.job_name, namespace=attempt.namespace),
            spec=_for_driver(attempt),
        ),
    )


def _written(made: JobDocument) -> str:
    """The document as text: of the job what differs from the defaults, which the driver fills in alike.

    The image may be one of an earlier release, which refuses fields that it does not know. A default that
    changes is another contract version.
    """
    around = made.model_dump(mode="json", by_alias=True, exclude={"job"})
    job = made.job.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return json.dumps({**around, "job": job}, ensure_ascii=False, separators=(",", ":"))


def _for_driver(attempt: Attempt) -> InfluenceJobSpec:
    """The spec with the operator's defaults, and without what concerns pods alone.

    The driver stores the spec beside the result, where an environment variable's value has no business.
    """
    spec = attempt.spec
    given = attempt.pod(Role.WORKER).resources
    resources = container_resources(Role.WORKER, given, attempt.settings.defaults)
    workers = WorkersSpec(
        replicas=spec.workers.replicas,
        device_memory=spec.workers.device_memory,
        resources=ResourcesSpec.model_validate(resources),
    )
    nothing = PodSettings()
    return spec.model_copy(
        update={
            "image": attempt.image,
            "workers": workers,
            "driver": nothing,
            "scheduler": nothing,
            "pod_defaults": nothing,
        }
    )


def _copy(source: Mapping[str, object], part: str) -> dict[str, str]:
    entries = source.get(part) or {}
    assert isinstance(entries, Mapping), part
    return {_SOURCE_KEY + key: value for key, value in entries.items()}
