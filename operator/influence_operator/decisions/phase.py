"""One word for a table's column, derived at the very end; nothing decides by it."""

from __future__ import annotations

from influence_job.progress import Stage
from influence_job.status import Phase
from influence_operator.decisions.cluster_state import ClusterState
from influence_operator.decisions.conditions import is_suspended
from influence_operator.decisions.course import Course
from influence_operator.decisions.view import View


def phase(view: View, course: Course, cluster: ClusterState, stage: Stage | None) -> Phase:
    """The word."""
    if course.outcome:
        return Phase.COMPLETE if course.outcome.complete else Phase.FAILED
    if view.spec.suspend:
        return Phase.SUSPENDED if is_suspended(view, course) else Phase.SUSPENDING
    if not course.number:
        return Phase.PENDING
    if not course.open:
        return Phase.RETRYING
    computing = stage not in (None, Stage.PREFLIGHT, Stage.LOADING)
    return Phase.RUNNING if cluster.ready or computing else Phase.STARTING
