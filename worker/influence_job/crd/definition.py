"""The whole CustomResourceDefinition: names, columns, subresources, and the schema of a job."""

from __future__ import annotations

from typing import Any

from influence_job.crd.immutability import add_immutability
from influence_job.crd.structural import structural_schema
from influence_job.spec import API_VERSION, KIND, InfluenceJobSpec
from influence_job.spec.rules import KEY as RULES
from influence_job.spec.rules import rule
from influence_job.status import InfluenceJobStatus

GROUP, VERSION = API_VERSION.split("/")
PLURAL = "influencejobs"

_COLUMNS = (
    ("Phase", ".status.phase", "What the job does, in one word.", 0),
    ("Stage", ".status.stage", "What its driver does.", 0),
    ("Progress", ".status.progress.display", "Regions of the stage: done/total.", 0),
    ("ETA", ".status.progress.eta", "Time to the end of the stage.", 0),
    ("Workers", ".status.workers.display", "Dask workers: ready/desired.", 0),
    ("Reason", '.status.conditions[?(@.type=="Ready")].reason', "Why it is ready, or not.", 1),
    ("Output", ".spec.output.url", "Where the result goes.", 1),
)


def custom_resource_definition() -> dict[str, Any]:
    """The manifest that a cluster needs before it knows InfluenceJobs."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ij"],
                "categories": ["influence"],
            },
            "versions": [_version()],
        },
    }


def _version() -> dict[str, Any]:
    return {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.workers.replicas",
                "statusReplicasPath": ".status.workers.ready",
                "labelSelectorPath": ".status.workers.selector",
            },
        },
        "additionalPrinterColumns": _columns(),
        "schema": {"openAPIV3Schema": _job()},
    }


def _columns() -> list[dict[str, Any]]:
    columns: list[dict[str, Any]] = [
        {"name": name, "type": "string", "jsonPath": path, "description": description, "priority": priority}
        for name, path, description, priority in _COLUMNS
    ]
    age = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp", "priority": 0}
    wide = next(index for index, column in enumerate(columns) if column["priority"])
    return [*columns[:wide], age | {"description": "Since its creation."}, *columns[wide:]]


def _job() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "A computation of influences: which training examples made a model behave as it does.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "maxLength": 253, "description": API_VERSION},
            "kind": {"type": "string", "maxLength": 63, "description": KIND},
            "metadata": {"type": "object"},  # Kubernetes' own; a description is refused
            "spec": _spec(),
            "status": _status(),
        },
        RULES: [
            rule(
                "size(self.metadata.name) <= 40 && "
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "metadata.name: expected at most 40 lower-case letters, digits and dashes, a letter first, "
                "no dots: the names of the job's pods and services extend it",
            )
        ],
    }


def _spec() -> dict[str, Any]:
    schema = structural_schema(InfluenceJobSpec)
    # So that `kubectl scale` finds a number.
    replicas = schema["properties"]["workers"]["properties"]["replicas"]["default"]
    schema["properties"]["workers"]["default"] = {"replicas": replicas}
    add_immutability(schema)
    return schema


def _status() -> dict[str, Any]:
    # The operator writes its own values; of all defaults only this one means something before it came.
    schema = structural_schema(InfluenceJobStatus, defaults=False)
    conditions = schema["properties"]["conditions"]
    conditions |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    # Without it kstatus calls a job "Current" that nobody has looked at.
    return schema | {"default": {"observedGeneration": InfluenceJobStatus().observed_generation}}
