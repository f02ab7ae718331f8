"""The job document and the copy of the task's source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from attempts import SETTINGS, UID, build, job, spec_of, stored
from influence_job.cli.drive import _parse as parse_as_the_driver
from influence_job.document import FILE, JobDocument
from influence_job.plan.memory import device_budget
from influence_job.spec import InfluenceJobSpec
from influence_operator.manifests.attempt import AttemptManifests, attempt_manifests, certificate_end
from influence_operator.manifests.child import Attempt
from influence_operator.manifests.config_map import begun_with, config_map, copied_source, document, kept_spec
from influence_operator.settings import Defaults
from job_samples import VALID


def read(made: AttemptManifests) -> JobDocument:
    return JobDocument.model_validate_json(made.config_map["data"][FILE])


def test_the_document_reads_back_as_the_job(everything: AttemptManifests) -> None:
    found = read(everything)
    assert (found.uid, found.attempt) == (UID, 1)
    assert found.scheduler == "tls://everything-3f2a9-1-scheduler.research:8786"
    assert found.job.metadata.name == "everything"
    assert found.job.spec.task.arguments == {"hidden": 64, "layers": [1, 2]}
    assert str(found.job.spec.output.max_bytes) == "2Ti"


def of_sample(name: str) -> Attempt:
    """The first attempt of one of the jobs that together set every field."""
    sample = stored(VALID[name])
    return Attempt(sample, spec_of(sample), 1, SETTINGS, {"data": {}})


def as_written(attempt: Attempt) -> dict[str, Any]:
    made = attempt_manifests(attempt.job, attempt.spec, attempt.number, attempt.settings, attempt.source)
    written: dict[str, Any] = json.loads(made.config_map["data"][FILE])
    return written


@pytest.mark.parametrize("name", VALID)
def test_the_driver_reads_the_spec_that_the_operator_meant(name: str) -> None:
    attempt = of_sample(name)
    assert parse_as_the_driver(as_written(attempt), FILE) == document(attempt)
    assert kept_spec(config_map(attempt)) == attempt.spec.model_copy(update={"image": attempt.image})


def beyond(found: Any, given: Any, path: str = "") -> Iterator[str]:
    """Paths of fields that only `found` has."""
    if isinstance(found, dict) and isinstance(given, dict):
        for field, value in found.items():
            if field in given:
                yield from beyond(value, given[field], f"{path}.{field}")
            else:
                yield f"{path}.{field}"


@pytest.mark.parametrize("name", VALID)
def test_an_image_of_an_earlier_release_is_told_of_no_field_that_the_job_does_not_use(name: str) -> None:
    """It refuses fields that it does not know, and the API server fills in the defaults of new ones."""
    attempt = of_sample(name)
    every_field = attempt.spec.model_dump(mode="json", by_alias=True)
    filled = replace(attempt, spec=InfluenceJobSpec.model_validate(every_field))
    written = as_written(filled)
    assert written == as_written(attempt)
    added = beyond(written["job"]["spec"], VALID[name]["spec"])
    assert [path for path in added if not path.startswith((".image", ".workers"))] == []
    assert "contractVersion" in written


def test_the_document_of_the_shortest_job_is_short() -> None:
    spec = as_written(of_sample("shortest"))["job"]["spec"]
    assert spec.pop("image") == SETTINGS.defaults.image
    assert spec.pop("workers") == {
        "resources": {"limits": {"memory": "4Gi"}, "requests": {"cpu": "1", "memory": "4Gi"}}
    }
    assert spec == VALID["shortest"]["spec"]


def test_arguments_take_twice_their_own_room_and_a_little() -> None:
    """A ConfigMap holds 1 MiB."""
    numbers = list(range(60_000))
    data = build(job(task={"arguments": {"rows": numbers}})).config_map["data"]
    assert sum(map(len, data.values())) < 2 * len(",".join(map(str, numbers))) + 2000 < 2**20


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"workers": {"resources": {"limits": {"memory": "6Gi"}}}},
        {"workers": {"resources": {"requests": {"memory": "6Gi"}}}},
        {"podDefaults": {"resources": {"limits": {"memory": "3Gi"}}}},
        {"workers": {"resources": {"limits": {"nvidia.com/gpu": 1}}, "deviceMemory": "9Gi"}},
        {"podDefaults": {"resources": {"limits": {"nvidia.com/gpu": 1}}}},
    ],
)
def test_the_plan_gets_the_budget_that_the_workers_have(changes: dict[str, Any]) -> None:
    made = build(job(**changes))
    found = read(made).job.spec
    limits = made.dask_cluster["spec"]["worker"]["spec"]["containers"][0]["resources"]["limits"]
    assert {name: str(q) for name, q in found.worker_limits.items()} == limits
    assert found.resolved_device is spec_of(job(**changes)).resolved_device
    if "deviceMemory" in changes.get("workers", {}):
        assert device_budget(found) == 9 * 2**30


def test_the_document_holds_the_image_and_no_environment(everything: AttemptManifests) -> None:
    assert read(build(job())).job.spec.image == "registry.example/influence-worker:0.1.0"
    text = everything.config_map["data"][FILE]
    assert "TOKEN" not in text  # the driver stores it beside the result
    assert "last-applied" not in text


def test_source_keys_never_meet_the_documents(everything: AttemptManifests) -> None:
    assert everything.config_map["immutable"] is True
    assert everything.config_map["data"].keys() == {FILE, "spec.json", "task.my_task.py", "task.job.json"}
    assert everything.config_map["binaryData"] == {"task.weights.npy": "AAA="}
    assert read(everything).uid == UID


def test_a_source_that_was_not_looked_up_is_refused() -> None:
    stored = job(task={"source": {"configMap": {"name": "tasks"}}})
    with pytest.raises(ValueError, match="expected the ConfigMap tasks, got none"):
        attempt_manifests(stored, spec_of(stored), 1, SETTINGS, None)


def test_a_certificate_outlives_the_job(now: Any) -> None:
    assert (certificate_end(spec_of(job()), now) - now).days == 365
    assert (certificate_end(spec_of(job(activeDeadlineSeconds=86400)), now) - now).days == 365
    assert (certificate_end(spec_of(job(activeDeadlineSeconds=500 * 86400)), now) - now).days == 507


def test_the_secret_is_immutable_and_comes_without_data(everything: AttemptManifests) -> None:
    assert everything.secret["immutable"] is True
    assert not {"data", "stringData"} & everything.secret.keys()


def test_the_source_is_read_back_from_the_attempts_copy(everything: AttemptManifests, source: Any) -> None:
    assert copied_source(everything.config_map) == source
    assert copied_source({}) == {}


def test_a_cluster_is_made_from_the_spec_that_its_driver_began_with() -> None:
    begun = build(job(image="example/mine:1", workers={"resources": {"limits": {"memory": "3Gi"}}}))
    changed = job(image="example/mine:2", workers={"replicas": 9, "resources": {"limits": {"memory": "9Gi"}}})
    spec = begun_with(begun.config_map, spec_of(changed))
    later = attempt_manifests(changed, spec, 1, SETTINGS, None)
    assert later.config_map["data"][FILE].replace(',"replicas":9', "") == begun.config_map["data"][FILE]
    worker = later.dask_cluster["spec"]["worker"]
    assert worker["replicas"] == 9
    assert worker["spec"] == begun.dask_cluster["spec"]["worker"]["spec"]


@pytest.mark.parametrize("data", [{}, {"spec.json": "{}"}, {"spec.json": "x"}, None])
def test_a_config_map_without_a_readable_spec_means_the_present_one(data: Any) -> None:
    current = spec_of(job())
    assert begun_with({"data": data}, current) is current


def test_the_default_image_of_an_attempt_outlives_a_change_of_the_default() -> None:
    begun = build(job())
    upgraded = replace(SETTINGS, defaults=Defaults(image="registry.example/influence-worker:0.2.0"))
    spec = begun_with(begun.config_map, spec_of(job()))
    later = attempt_manifests(job(), spec, 1, upgraded, None)
    assert later.dask_cluster == begun.dask_cluster
