"""What one pass sees: a job, its children, and what its driver said.

Kubernetes objects stay the plain mappings that the API server sent; whoever needs a field of one reads it
with a function of `observed`. Made by `influence_operator.cluster.gather`, read by everything in `decisions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from influence_job.progress import Progress

Object = Mapping[str, Any]
"""A Kubernetes object as the API server sent it."""


@dataclass(frozen=True)
class Children:
    """Every object that carries the job's UID as a label, of all its attempts."""

    config_maps: tuple[Object, ...] = ()
    network_policies: tuple[Object, ...] = ()
    driver_jobs: tuple[Object, ...] = ()
    dask_clusters: tuple[Object, ...] = ()
    worker_groups: tuple[Object, ...] = ()
    deployments: tuple[Object, ...] = ()
    """Of the scheduler and of each worker, made by dask-kubernetes."""
    services: tuple[Object, ...] = ()
    pods: tuple[Object, ...] = ()
    """Of driver, scheduler and workers."""


@dataclass(frozen=True)
class DriverReport:
    """What the driver of one attempt said of itself."""

    attempt: int
    progress: Progress | None
    """None: it did not answer, or with something that is no progress document of this job."""
    problem: str | None = None
    """Why there is no document, for a condition."""
    unread_since: datetime | None = None
    """Since when no document came from this driver, which was ready all the time; None while one comes."""


@dataclass(frozen=True)
class Conflict:
    """An object that stands where a child should, and is not ours."""

    kind: str
    name: str


@dataclass(frozen=True)
class Snapshot:
    """Everything a decision may depend on."""

    job: Object
    """The InfluenceJob as stored, with its status."""
    children: Children
    now: datetime
    """UTC."""
    driver: DriverReport | None = None
    conflicts: tuple[Conflict, ...] = ()
    """Names found taken when the last pass tried to create a child."""
    refusals: tuple[str, ...] = ()
    """What the API server said when it refused a child in the last pass (quota, Pod Security, webhook)."""
    unretired: str = ""
    """Why the scheduler did not choose workers that were to go, when it was last asked; empty if it did."""
    source: Object | None = None
    """The ConfigMap that `task.source.configMap` names, if it exists."""
    missing: tuple[str, ...] = ()
    """References of the spec that do not exist, such as "ConfigMap tasks". Secrets cannot be looked up."""
    warnings: tuple[Object, ...] = ()
    """Kubernetes Events of type Warning about the children, newest first; read while not ready."""
    dask_operator: bool = True
    """Whether the API server serves DaskClusters."""
    looked: datetime | None = None
    """When this process last carried a pass over the job through, if it was one with clocks to look at."""
