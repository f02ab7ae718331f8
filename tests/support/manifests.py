"""Manifests for tests: one that is right, and ways to change single fields of it."""

from __future__ import annotations

import copy
from typing import Any, get_args

from influence_job.spec import API_VERSION, KIND, InfluenceJob, InfluenceJobSpec, MethodSpec

MANIFEST: dict[str, Any] = {
    "apiVersion": API_VERSION,
    "kind": KIND,
    "metadata": {"name": "digits"},
    "spec": {
        "task": {"entrypoint": "package.module:task"},
        "method": {"name": "Ekfac", "regularization": 0.01},
        "output": {"url": "gs://bucket/digits.zarr"},
    },
}


METHOD_NAMES = {
    get_args(method.model_fields["name"].annotation)[0] for method in get_args(get_args(MethodSpec)[0])
}
"""Of every method that a job may name."""


def manifest(**changes: Any) -> dict[str, Any]:
    """The manifest with fields of `spec` replaced; nested mappings are merged, None removes a field."""
    document = copy.deepcopy(MANIFEST)
    _merge(document["spec"], changes)
    return document


def spec(**changes: Any) -> InfluenceJobSpec:
    """The validated spec of `manifest(**changes)`."""
    return InfluenceJob.model_validate(manifest(**changes), by_alias=True, by_name=False).spec


def _merge(target: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict) and isinstance(target.get(name), dict) and name != "method":
            _merge(target[name], value)
        else:
            target[name] = value
