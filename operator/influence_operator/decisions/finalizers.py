"""Lets a DaskCluster go whose controller does not.

dask-kubernetes' timers put kopf's finalizer on every DaskCluster: while its controller is away, a deletion
hangs and the pods keep running. It has 30 s; no other finalizer is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from influence_operator.decisions import observed
from influence_operator.decisions.actions import RemoveFinalizer
from influence_operator.decisions.snapshot import Children, Object
from influence_operator.decisions.step import Step
from influence_operator.decisions.view import seconds_between
from influence_operator.manifests import names

FINALIZER = "kopf.zalando.org/KopfFinalizerMarker"
PATIENCE_SECONDS = 30.0


def of_job(children: Children, job_uid: str, now: datetime) -> Step:
    """For the DaskClusters of a job, whatever their attempt."""
    return _release((c for c in children.dask_clusters if observed.owned_by(c, [job_uid])), now)


def of_nobody(children: Children, now: datetime) -> Step:
    """For DaskClusters whose job is gone: the garbage collector deletes them, and must get through."""
    return _release((c for c in children.dask_clusters if _made_by_us(c)), now)


def _made_by_us(cluster: Object) -> bool:
    owner = observed.label(cluster, names.JOB_UID)
    return bool(owner) and observed.owned_by(cluster, [owner])


def _release(clusters: Iterable[Object], now: datetime) -> Step:
    actions, due = [], []
    for cluster in clusters:
        held = observed.look(cluster, "metadata", "finalizers")
        if not (observed.being_deleted(cluster) and isinstance(held, list | tuple) and FINALIZER in held):
            continue
        left = PATIENCE_SECONDS - seconds_between(observed.deleted(cluster), now)
        if left > 0:
            due.append(left)
            continue
        actions.append(
            RemoveFinalizer(
                api_version="kubernetes.dask.org/v1",
                kind="DaskCluster",
                name=observed.name(cluster),
                uid=observed.uid(cluster),
                finalizer=FINALIZER,
            )
        )
    return Step(tuple(actions), tuple(due))
