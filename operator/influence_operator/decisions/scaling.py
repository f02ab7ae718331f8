"""The number of workers: follows `workers.replicas`, and replaces a Deployment that somebody deleted.

dask-kubernetes acts on changes of a number alone. It may add workers; it must never take any away, because
for that it speaks to a scheduler which the tenant chose. So a number is only lowered when as few Deployments
are left, and only when dask-kubernetes has done what it was asked for before, or had long enough: a number
that it has yet to act upon would meet more Deployments than we see. For the same reason a deleted Deployment
takes two steps: ask for as few as there are, and, when that has arrived, for as many as are wanted.
"""

from __future__ import annotations

from influence_operator.decisions import observed
from influence_operator.decisions.actions import Action, Patch, RetireWorkers
from influence_operator.decisions.cluster_parts import ClusterParts


def scale(parts: ClusterParts, patient: bool, silent: bool, left: bool) -> Action | None:
    """The next step towards the number of workers that is wanted.

    Args:
        parts: the cluster.
        patient: whether dask-kubernetes, or the scheduler, has had long enough since the last step.
        silent: whether the scheduler did not choose workers when it was last asked.
        left: whether what dask-kubernetes failed to make, and repeats, is left to it.
    """
    if parts.missing:
        return None
    if parts.too_many:
        return _retire(parts) if patient or (parts.settled and not silent) else None
    made = len(parts.deployments)
    if parts.asked > parts.wanted:
        return _ask(parts, parts.wanted) if patient else None
    if parts.asked < parts.wanted:
        arrived = parts.grouped <= parts.asked
        return _ask(parts, parts.wanted) if arrived else None
    deleted = made < parts.wanted and parts.grouped == parts.asked
    return _ask(parts, made) if deleted and patient and not left else None


def _ask(parts: ClusterParts, replicas: int) -> Patch:
    return Patch(
        api_version="kubernetes.dask.org/v1",
        kind="DaskCluster",
        name=observed.name(parts.cluster),
        uid=observed.uid(parts.cluster),
        patch={"spec": {"worker": {"replicas": replicas}}},
    )


def _retire(parts: ClusterParts) -> RetireWorkers:
    return RetireWorkers(
        cluster=observed.name(parts.cluster),
        cluster_uid=observed.uid(parts.cluster),
        count=parts.too_many,
        deployments=parts.deployments,
        replicas=parts.wanted,
    )
