"""What an API server does with a DaskCluster: it checks kinds, and drops what the CRD does not name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

Schema = dict[str, Any]
_KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


@cache
def cluster_schema() -> Schema:
    """The schema of DaskCluster, from the chart that dask-kubernetes ships."""
    chart = files("dask_kubernetes") / "operator/deployment/helm/dask-kubernetes-operator"
    definition = yaml.safe_load((chart / "crds/daskcluster.yaml").read_text())
    schema: Schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    # The API server knows these of every object.
    known = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": _open("object")}
    return {**schema, "properties": {**schema["properties"], **known}}


def dropped(value: Any, schema: Schema, path: str = "") -> Iterator[str]:
    """Paths of fields that pruning removes."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        named = schema.get("properties", {})
        others = schema.get("additionalProperties")
        for key, item in value.items():
            if key in named:
                yield from dropped(item, named[key], f"{path}.{key}")
            elif isinstance(others, dict):
                yield from dropped(item, others, f"{path}.{key}")
            elif not others:
                yield f"{path}.{key}"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from dropped(item, schema.get("items", {}), f"{path}[{index}]")


def mistakes(value: Any, schema: Schema, path: str = "") -> Iterator[str]:
    """Paths of values of the wrong kind, and of required fields that are absent."""
    kind = schema.get("type")
    if kind and not (isinstance(value, _KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))):
        yield f"{path}: expected {kind}, got {value!r}"
    elif isinstance(value, dict):
        yield from (f"{path}.{name}: absent" for name in schema.get("required", []) if name not in value)
        others = schema.get("additionalProperties")
        for key, item in value.items():
            below = schema.get("properties", {}).get(key, others if isinstance(others, dict) else {})
            yield from mistakes(item, below, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from mistakes(item, schema.get("items", {}), f"{path}[{index}]")


def _open(kind: str) -> Schema:
    return {"type": kind, "x-kubernetes-preserve-unknown-fields": True}
