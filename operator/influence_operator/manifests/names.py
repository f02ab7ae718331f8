"""Names, labels and owners of a job's children, shared by builders and decisions: both must mean the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

PREFIX = "influence-operator.dev/"
"""Of our label keys; users cannot set labels or annotations that begin so."""
JOB_UID = f"{PREFIX}job-uid"
"""On every child, and on the pods: watches of children select by it on the server."""
JOB = f"{PREFIX}job"
"""The job's name, for people."""
ATTEMPT = f"{PREFIX}attempt"
ROLE = f"{PREFIX}role"
"""On pods, and on what dask-kubernetes makes for them."""

_CHILD = re.compile(r"-[0-9a-f]{5}-[0-9]")

SCHEDULER_PORT = 8786
"""Dask's comms: TLS."""
DASHBOARD_PORT = 8787
"""The scheduler's HTTP API, `/health` and dashboard: plain HTTP, so a NetworkPolicy stands before it."""


class Role(StrEnum):
    """What a pod of a job does."""

    DRIVER = "driver"
    SCHEDULER = "scheduler"
    WORKER = "worker"


def base_name(job_name: str, uid: str, attempt: int) -> str:
    """`<job>-<first 5 hex digits of the UID>-<attempt>`: the name of an attempt's children.

    At most 53 characters, what dask-kubernetes accepts, for job names of 40 and a million attempts.
    """
    return f"{children_prefix(job_name, uid)}{attempt}"


def children_prefix(job_name: str, uid: str) -> str:
    """What the names of all children of a job begin with, and of what belongs to these."""
    return f"{job_name}-{uid[:5]}-"


def may_be_a_childs(name: str) -> bool:
    """Whether a child of any job, or what belongs to one, may be called so."""
    return _CHILD.search(name) is not None


def scheduler_name(base: str) -> str:
    """Name of the scheduler's Deployment and Service, as dask-kubernetes makes it."""
    return f"{base}-scheduler"


def worker_group_name(base: str) -> str:
    """Name of the DaskWorkerGroup, as dask-kubernetes makes it."""
    return f"{base}-default"


def scheduler_address(base: str, namespace: str) -> str:
    """Where driver and workers reach the scheduler; no cluster domain, which clusters may change."""
    return f"tls://{scheduler_name(base)}.{namespace}:{SCHEDULER_PORT}"


def labels(job_name: str, uid: str, attempt: int, role: Role | None = None) -> dict[str, str]:
    """Our labels of a child of an attempt."""
    own = {JOB_UID: uid, JOB: job_name, ATTEMPT: str(attempt)}
    return own | {ROLE: role.value} if role else own


def pod_selector(uid: str, attempt: int, role: Role | None = None) -> dict[str, str]:
    """The labels that pick an attempt's pods."""
    own = {JOB_UID: uid, ATTEMPT: str(attempt)}
    return own | {ROLE: role.value} if role else own


def owner_reference(job: Mapping[str, Any]) -> dict[str, Any]:
    """The reference by which a child belongs to `job` and is collected with it."""
    return {
        "apiVersion": job["apiVersion"],
        "kind": job["kind"],
        "name": job["metadata"]["name"],
        "uid": job["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
