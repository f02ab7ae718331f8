"""Pod settings that dask-kubernetes would lose or refuse: its CRD knows the PodSpec of Kubernetes 1.21.

The API server drops what a CRD's schema does not name, without a word; a job then would run elsewhere than
its author said. So decisions ask here first, and the job's condition names the field. `frozen_pod_spec.json`
is that schema, cut to what a user may set: a mapping's required keys end in "!", a list holds its one item's
schema, "*" stands for any key. A test holds it up to date and says how to renew it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from influence_job.spec import InfluenceJobSpec, PodSettings

Schema = Any
_KINDS: dict[str, type] = {"string": str, "integer": int, "boolean": bool}
_KIND_NAMES = {"string": "text", "integer": "a whole number", "boolean": "true or false"}
_FIELDS: dict[str, Schema] = json.loads(
    (files("influence_operator.manifests") / "frozen_pod_spec.json").read_text("utf-8")
)
_MOST = 5
"""Problems named in one message."""


def refused_settings(spec: InfluenceJobSpec) -> tuple[str, ...]:
    """What a user must change before a DaskCluster can hold these pods; empty for most jobs."""
    found = [
        problem
        for name, settings in (
            ("podDefaults", spec.pod_defaults),
            ("scheduler", spec.scheduler),
            ("workers", spec.workers),
        )
        for problem in _of_pods(settings, f"spec.{name}")
    ]
    rest = len(found) - _MOST
    return tuple(found) if rest <= 0 else (*found[:_MOST], f"and {rest} more")


def _of_pods(settings: PodSettings, path: str) -> Iterator[str]:
    for name, field in PodSettings.model_fields.items():
        alias = field.alias or name
        if alias in _FIELDS:
            yield from _problems(getattr(settings, name), _FIELDS[alias], f"{path}.{alias}")


def _problems(value: Any, schema: Schema, path: str) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from _in_mapping(value, schema, path)
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield f"{path}: expected a list, got {_shown(value)}"
            return
        for index, item in enumerate(value):
            yield from _problems(item, schema[0], f"{path}[{index}]")
    elif not isinstance(value, _KINDS[schema]) or (schema == "integer" and isinstance(value, bool)):
        quoted = f'; write "{value}"' if schema == "string" and isinstance(value, int | float) else ""
        yield f"{path}: expected {_KIND_NAMES[schema]}, got {_shown(value)}{quoted}"


def _in_mapping(value: Any, schema: dict[str, Schema], path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: expected a mapping, got {_shown(value)}"
        return
    known = {key.rstrip("!"): below for key, below in schema.items()}
    required = [key[:-1] for key in schema if key.endswith("!")]
    yield from (f"{path}.{key}: required, but absent" for key in required if key not in value)
    for key, item in value.items():
        below = known.get(key, known.get("*"))
        if below is not None:
            yield from _problems(item, below, f"{path}.{key}")
        else:
            yield (
                f"{path}.{key[:64]}: unknown to dask-kubernetes, which would drop it; it takes the fields of "
                "Kubernetes 1.21: remove it, or set it with an admission policy on the pods"
            )


def _shown(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case _:
            return repr(value)[:64]
