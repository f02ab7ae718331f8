"""The conditions of a job, by the kstatus rules.

`Reconciling` stands from a new generation until its preflight has passed or the job is suspended, then
`Ready` is true; `Stalled` stands when nothing will move before somebody changes something. Both are absent
unless true. `Complete` and `Failed` alone tell the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from influence_job.progress import Stage
from influence_job.status import Condition, ConditionType
from influence_operator.decisions import remains, starting, words
from influence_operator.decisions.cluster_state import ClusterState
from influence_operator.decisions.course import Course
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.view import View


@dataclass(frozen=True)
class Statement:
    """A condition without its times."""

    kind: ConditionType
    holds: bool
    reason: str
    message: str


def conditions(view: View, course: Course, cluster: ClusterState) -> list[Condition]:
    """All conditions, each with the time when its status last changed."""
    ready = _ready(view, course, cluster)
    stalled = _stalled(view, course)
    stated = [ready]
    if stalled:
        stated.append(stalled)
    elif not ready.holds:
        stated.append(Statement(ConditionType.RECONCILING, True, ready.reason, ready.message))
    stated.append(Statement(ConditionType.CLUSTER_READY, cluster.ready, cluster.reason, cluster.message))
    stated += [s for s in (_suspended(view, course), _ended(course)) if s]
    return [timed(s, view.condition(s.kind), view.generation, view.now) for s in stated]


def timed(statement: Statement, stored: Condition | None, generation: int, now: datetime) -> Condition:
    """The condition, with the stored one's time if its status is the same."""
    status: Literal["True", "False"] = "True" if statement.holds else "False"
    since = stored.last_transition_time if stored and stored.status == status else now
    return Condition(
        type=statement.kind.value,
        status=status,
        observed_generation=generation,
        last_transition_time=since,
        reason=str(statement.reason),
        message=words.sentence(statement.message),
    )


def is_suspended(view: View, course: Course) -> bool:
    """Whether the job rests as its user asked: no pod of it is left."""
    asked = view.spec.suspend and course.outcome is None and not course.open
    return asked and not remains.anything_left(view)


def _ready(view: View, course: Course, cluster: ClusterState) -> Statement:
    kind = ConditionType.READY
    stalled = _stalled(view, course)
    if stalled:
        return Statement(kind, False, stalled.reason, stalled.message)
    if course.outcome:
        return Statement(kind, True, Reason.COMPLETE, course.outcome.message)
    if view.spec.suspend:
        if is_suspended(view, course):
            return Statement(kind, True, Reason.SUSPENDED, "suspended; what is done is kept")
        return Statement(kind, False, Reason.SUSPENDING, "pods of the job are ending")
    if _passed_preflight(view, course):
        return Statement(kind, True, Reason.RUNNING, _running(course))
    return Statement(kind, False, Reason.STARTING, cluster.message + _waiting_changes(course))


def _stalled(view: View, course: Course) -> Statement | None:
    kind = ConditionType.STALLED
    if view.refusal and not (course.outcome and course.outcome.complete):
        return Statement(kind, True, Reason.INVALID_SPEC, view.refusal)
    if course.outcome:
        outcome = course.outcome
        return None if outcome.complete else Statement(kind, True, outcome.reason, outcome.message)
    conflicts = starting.conflicts(view, course)
    if conflicts:
        named = ", ".join(f"{conflict.kind} {conflict.name}" for conflict in conflicts)
        message = f"{named} exists and is not this job's; delete it, or create this job under another name"
        return Statement(kind, True, Reason.NAME_CONFLICT, message)
    if course.open and course.incompatible:
        return Statement(kind, True, Reason.IMAGE_INCOMPATIBLE, course.incompatible)
    return None


def _passed_preflight(view: View, course: Course) -> bool:
    """In this attempt, or, of the same generation, in an earlier one."""
    if course.open and view.of(course.number).dask_clusters:
        return True
    progress = course.progress
    if course.open and progress and (progress.workers_needed or progress.stage is not Stage.PREFLIGHT):
        return True
    stored = view.condition(ConditionType.READY)
    ran = stored is not None and (stored.status, stored.reason) == ("True", Reason.RUNNING)
    return ran and stored is not None and stored.observed_generation == view.generation


def _running(course: Course) -> str:
    attempts = course.attempts
    if course.open:
        return f"attempt {attempts.current} runs{_waiting_changes(course)}"
    return f"attempt {attempts.current} ended: {attempts.last_reason}: {attempts.last_message}"


def _waiting_changes(course: Course) -> str:
    *others, last = course.waiting_changes or ("",)
    if not last:
        return ""
    if not others:
        return f"; the change of {last} takes effect with the next attempt"
    return f"; the changes of {', '.join(others)} and {last} take effect with the next attempt"


def _suspended(view: View, course: Course) -> Statement | None:
    kind = ConditionType.SUSPENDED
    if view.spec.suspend and course.outcome is None:
        if is_suspended(view, course):
            return Statement(kind, True, Reason.SUSPENDED, "no pod of the job is left")
        return Statement(kind, False, Reason.SUSPENDING, "pods of the job are ending")
    if view.condition(kind) is None:
        return None
    return Statement(kind, False, Reason.RESUMED, "the job is not suspended")


def _ended(course: Course) -> Statement | None:
    outcome = course.outcome
    if outcome is None:
        return None
    kind = ConditionType.COMPLETE if outcome.complete else ConditionType.FAILED
    return Statement(kind, True, outcome.reason, outcome.message)
