"""Has dask-kubernetes make again what it left out or what somebody deleted.

Its controller makes scheduler, Service and worker group when `status.phase` becomes Created, and never looks
again; a transient error at the wrong moment leaves a cluster without workers for ever (dask-kubernetes #976).
Setting the phase again makes it repeat what is missing, within seconds.
"""

from __future__ import annotations

from dataclasses import replace

from influence_operator.decisions import observed, scaling
from influence_operator.decisions.actions import Action, Patch
from influence_operator.decisions.cluster_parts import ClusterParts, cluster_parts
from influence_operator.decisions.course import Course
from influence_operator.decisions.step import Step
from influence_operator.decisions.view import View

YOUNG_SECONDS = 10.0
"""A DaskCluster so young is still being made."""
PATIENCE_SECONDS = 10.0
"""What is left undone for so long, dask-kubernetes has overlooked. A scheduler that did not choose workers to
retire is asked again so often."""
REPEATING_SECONDS = 75.0
"""What failed it repeats itself, once a minute: in phase Created the parts of a cluster, and the workers of a
group that it has not finished."""
FAILED_SECONDS = 600.0
"""So long it is left what it repeats and says why it failed (a quota, a setting that the API server refuses):
a step of ours makes it begin anew, and fail again."""


def tend(view: View, course: Course) -> tuple[Course, Step]:
    """The course with its note of an incomplete cluster, and the step towards a complete one."""
    parts = cluster_parts(view, course)
    if parts is None or parts.complete:
        return replace(course, cluster_incomplete_since=None), Step()
    waited = view.seconds_since(course.cluster_incomplete_since)
    silent = bool(view.snapshot.unretired)
    patience = REPEATING_SECONDS if parts.unfinished else PATIENCE_SECONDS
    left = bool(parts.failure) and waited < FAILED_SECONDS
    action = scaling.scale(parts, waited >= patience, silent, left) or _heal(parts, waited, left)
    actions = (action,) if action else ()
    young = YOUNG_SECONDS - view.seconds_since(observed.created(parts.cluster))
    if course.cluster_incomplete_since is None and young > 0:
        return course, Step(actions, (young,))
    # A step that was taken starts the wait anew, so that none is repeated hot.
    since = view.now if action else course.cluster_incomplete_since or view.now
    waited = view.seconds_since(since)
    limits = (PATIENCE_SECONDS - waited, REPEATING_SECONDS - waited, REPEATING_SECONDS)
    due = min(limit for limit in limits if limit > 0)
    return replace(course, cluster_incomplete_since=since), Step(actions, (due,))


def _heal(parts: ClusterParts, waited: float, left: bool) -> Action | None:
    if not parts.missing or not parts.phase:
        return None
    if parts.phase != "Created":
        return _set_phase(parts, "Created") if waited >= PATIENCE_SECONDS else None
    return _set_phase(parts, "Pending") if waited >= REPEATING_SECONDS and not left else None


def _set_phase(parts: ClusterParts, phase: str) -> Patch:
    # The CRD has no status subresource: the status is a field like any other.
    return Patch(
        api_version="kubernetes.dask.org/v1",
        kind="DaskCluster",
        name=observed.name(parts.cluster),
        uid=observed.uid(parts.cluster),
        patch={"status": {"phase": phase}},
    )
