"""What is left of a job's attempts, and how long that can be: a new attempt waits for it, and so does
`Suspended=True`.
"""

from __future__ import annotations

from influence_operator.decisions import observed
from influence_operator.decisions.snapshot import Children, Object
from influence_operator.decisions.view import LOST_SECONDS, View


def anything_left(view: View) -> bool:
    """Whether a pod of the job runs, or could still be made by what is left."""
    return any(_makes_pods(children) or running_pods(view, children) for children in view.attempts.values())


def running_pods(view: View, children: Children) -> list[Object]:
    """Pods that have not ended and are not lost."""
    return [pod for pod in children.pods if not observed.ended(pod) and not view.lost(pod)]


def seconds_until_lost(view: View) -> list[float]:
    """For each pod that is ending, how long until nobody waits for it any more."""
    return [
        LOST_SECONDS - view.seconds_since(observed.deleted(pod))
        for children in view.attempts.values()
        for pod in running_pods(view, children)
        if observed.being_deleted(pod)
    ]


def _makes_pods(children: Children) -> bool:
    """A Deployment counts until it is gone; what owns it only until it is on its way."""
    owners = (*children.driver_jobs, *children.dask_clusters, *children.worker_groups)
    return bool(children.deployments) or any(not observed.being_deleted(owner) for owner in owners)
