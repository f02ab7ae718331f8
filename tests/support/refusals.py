"""Who refuses a manifest, and with which words: the API server by the CRD, or the operator by its own rules.

Used by the tests of both: tests/cluster/test_crd.py and tests/cluster/test_wrong_manifests.py.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

from kubernetes.client import ApiException

from cluster import Cluster
from influence_job.crd import PLURAL, custom_resource_definition
from influence_job.spec import API_VERSION, InvalidSpecError, parse_spec
from job_samples import VALID, Broken, Json, broken

GROUP, VERSION = API_VERSION.split("/")
SEED_VARIABLE = "CRD_SEED"


def chance() -> random.Random:
    """Random numbers that can be had again: set CRD_SEED to what is printed."""
    seed = int(os.environ.get(SEED_VARIABLE, time.time()))
    print(f"{SEED_VARIABLE}={seed}")
    return random.Random(seed)


def spec_schema() -> dict[str, Json]:
    """The CRD's schema of `spec`."""
    [version] = custom_resource_definition()["spec"]["versions"]
    schema: dict[str, Json] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return schema


def wrong_manifests() -> list[Broken]:
    """Every way to break each valid job that the schema tells of."""
    schema = spec_schema()
    return [case for document in VALID.values() for case in broken(document, schema)]


def create(cluster: Cluster, namespace: str, document: dict[str, Json], *, dry: bool = False) -> Json:
    """As kubectl does it: fields that nobody knows are errors."""
    dry_run: dict[str, Any] = {"dry_run": "All"} if dry else {}
    return cluster.objects.create_namespaced_custom_object(
        GROUP, VERSION, namespace, PLURAL, document, field_validation="Strict", **dry_run
    )


def refusal(cluster: Cluster, namespace: str, document: dict[str, Json]) -> str | None:
    """What the API server says against creating a job; None: nothing."""
    try:
        create(cluster, namespace, document, dry=True)
    except ApiException as error:
        if error.status not in (400, 422):
            raise
        return str(json.loads(error.body)["message"])
    return None


def own_refusal(document: dict[str, Json]) -> str | None:
    """What our own rules say, which the operator asks and a laptop, too."""
    try:
        parse_spec(document["spec"])
    except InvalidSpecError as error:
        return str(error)
    return None


def names(message: str, case: Broken) -> bool:
    """Whether a message names the field: the last of its path that is no index, or the one above a key."""
    steps = [step for step in case.path if isinstance(step, str)]
    return any(step in message for step in steps[-2:])
