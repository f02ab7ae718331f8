"""Where a job stands: which attempt, whether it goes on, how the job ended, and its clocks.

A `Course` is recalled from the stored status, moved on by `advance`, and written back by `status`. An
attempt is open from the pass that gives it its number to the pass that finds its end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from influence_job.progress import Progress
from influence_job.status import AttemptsStatus, ConditionType
from influence_operator.decisions import backoff, observed
from influence_operator.decisions.attempts import Ending, Verdict
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.view import View, seconds_between


@dataclass(frozen=True)
class Outcome:
    """How the job ended."""

    complete: bool
    """Else it failed."""
    reason: str
    message: str


@dataclass(frozen=True)
class Course:
    """Where a job stands after this pass."""

    attempts: AttemptsStatus
    outcome: Outcome | None = None
    """None while the job goes on."""
    progress: Progress | None = None
    """What the driver of the present attempt says, or said last, in this pass."""
    incompatible: str | None = None
    """Why the driver's documents cannot be understood."""
    waiting_changes: tuple[str, ...] = ()
    """Fields of the spec that were changed since the present attempt began and wait for the next one."""
    start_time: datetime | None = None
    completion_time: datetime | None = None
    active_seconds: int = 0
    """Of all ended attempts."""
    waiting_since: datetime | None = None
    progressed: datetime | None = None
    cluster_incomplete_since: datetime | None = None

    @property
    def open(self) -> bool:
        """Whether the present attempt goes on."""
        return self.attempts.current > 0 and self.attempts.ended is None

    @property
    def number(self) -> int:
        """Of the present attempt; 0 before the first."""
        return self.attempts.current

    def with_attempts(self, **changes: object) -> Course:
        """The course with fields of `attempts` changed."""
        return replace(self, attempts=self.attempts.model_copy(update=changes))


def recall(view: View) -> Course:
    """The course as the last pass left it.

    The attempt is the highest among our children and the status, so that a lost status never
    leads to a name that was used before.
    """
    stored = view.stored
    attempts = stored.attempts or AttemptsStatus()
    if view.latest > attempts.current:
        job = view.driver_job(view.latest)
        started = observed.created(job) if job else None
        fresh = {"driver": None, "recorded": 0, "ended": None, "next_start": None}
        attempts = attempts.model_copy(
            update={"current": view.latest, "started": started or view.now, **fresh}
        )
    return Course(
        attempts=attempts,
        outcome=_stored_outcome(view),
        start_time=stored.start_time or attempts.started,
        completion_time=stored.completion_time,
        active_seconds=stored.active_seconds,
        waiting_since=stored.waiting_since,
        progressed=stored.progressed,
        cluster_incomplete_since=stored.cluster_incomplete_since,
    )


def reopened(view: View, course: Course) -> Course:
    """A failed job whose spec was changed: its failures are forgiven, the sum of its running time is not."""
    changed = replace(course, outcome=None, completion_time=None, waiting_since=None)
    ended = course.attempts.ended or view.now
    return changed.with_attempts(counted_failures=0, ended=ended, next_start=None)


def opened(view: View, course: Course) -> Course:
    """The next attempt begins."""
    begun = replace(
        course,
        progress=None,
        start_time=course.start_time or view.now,
        waiting_since=course.waiting_since or view.now,
        progressed=None,
    )
    return begun.with_attempts(
        current=course.number + 1, started=view.now, driver=None, recorded=0, ended=None, next_start=None
    )


def closed(view: View, course: Course, ending: Ending) -> Course:
    """The present attempt has ended, and with it, as the case may be, the job."""
    attempts = course.attempts
    failures = attempts.counted_failures + ending.counted
    waits = ending.verdict is Verdict.AGAIN
    ran = round(seconds_between(attempts.started, ending.at))
    after = replace(course, active_seconds=course.active_seconds + ran).with_attempts(
        ended=ending.at,
        counted=ending.counted,
        counted_failures=failures,
        next_start=ending.at + backoff.delay(failures, ending.counted) if waits else None,
        last_exit_code=ending.exit_code,
        last_reason=ending.reason,
        last_message=ending.message,
    )
    if waits and failures > view.spec.backoff_limit:
        message = f"{failures} counted failures, backoffLimit is {view.spec.backoff_limit}; the last: "
        last = f"{message}{ending.reason}: {ending.message}"
        return finished(view, after, Outcome(False, Reason.BACKOFF_LIMIT_EXCEEDED, last))
    if ending.verdict in (Verdict.COMPLETE, Verdict.FAILED):
        complete = ending.verdict is Verdict.COMPLETE
        return finished(view, after, Outcome(complete, ending.reason, ending.message))
    return after


def finished(view: View, course: Course, outcome: Outcome) -> Course:
    """The job has ended."""
    attempts = course.with_attempts(next_start=None)
    return replace(attempts, outcome=outcome, completion_time=view.now, waiting_since=None)


def _stored_outcome(view: View) -> Outcome | None:
    for kind in (ConditionType.COMPLETE, ConditionType.FAILED):
        condition = view.condition(kind)
        if condition and condition.status == "True":
            return Outcome(kind is ConditionType.COMPLETE, condition.reason, condition.message)
    return None
