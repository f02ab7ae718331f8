"""Everything that one attempt of a job is made of. Called by `influence_operator.decisions`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from influence_job.spec import InfluenceJobSpec
from influence_operator.decisions.snapshot import Object
from influence_operator.manifests.child import Attempt, Manifest
from influence_operator.manifests.config_map import config_map
from influence_operator.manifests.dask_cluster import dask_cluster
from influence_operator.manifests.driver_job import driver_job
from influence_operator.manifests.policies import network_policies
from influence_operator.settings import Settings


@dataclass(frozen=True)
class AttemptManifests:
    """The children of one attempt, in the order in which they are created."""

    config_map: Manifest
    secret: Manifest
    """Without data: the cluster package adds `ca.crt`, `tls.crt` and `tls.key`."""
    network_policies: tuple[Manifest, ...]
    driver_job: Manifest
    dask_cluster: Manifest
    """Created once the driver says that workers are needed."""


def attempt_manifests(
    job: Object, spec: InfluenceJobSpec, attempt: int, settings: Settings, source: Object | None
) -> AttemptManifests:
    """The manifests of attempt number `attempt`.

    Args:
        job: the InfluenceJob as stored.
        spec: its parsed spec.
        attempt: from 1.
        settings: the operator's.
        source: the ConfigMap that `task.source.configMap` names, if it names one.

    Raises:
        ValueError: the spec names a source that was not given.
    """
    if spec.task.source is None:
        source = None
    elif source is None:
        name = spec.task.source.config_map.name
        raise ValueError(f"task.source.configMap: expected the ConfigMap {name}, got none; look it up first")
    made = Attempt(job, spec, attempt, settings, source)
    return AttemptManifests(
        config_map=config_map(made),
        secret=_secret(made),
        network_policies=network_policies(made),
        driver_job=driver_job(made),
        dask_cluster=dask_cluster(made),
    )


def certificate_end(spec: InfluenceJobSpec, now: datetime) -> datetime:
    """When the certificate of an attempt that starts now runs out; the deadline may be raised meanwhile."""
    longest = timedelta(seconds=spec.active_deadline_seconds or 0, days=7)
    return now + max(longest, timedelta(days=365))


def _secret(attempt: Attempt) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": attempt.metadata(attempt.base),
        "immutable": True,
        "type": "kubernetes.io/tls",
    }
