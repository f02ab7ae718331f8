"""The three deadlines: running time of the whole job, waiting for driver or workers, standing still.

None runs while a job is suspended. The startup deadline runs while something is awaited, the progress
deadline while a worker is ready, so that one of both always does. Both begin anew when they passed while no
operator looked; one that is lowered below what has passed is over.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from influence_job.status import ConditionType
from influence_operator.decisions import driver, words
from influence_operator.decisions.attempts import Ending, Verdict
from influence_operator.decisions.course import Course
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.view import View, seconds_between

LATE_SECONDS = 60.0
"""A deadline is looked at when it passes; nobody who is there comes so late."""


def with_clocks(view: View, course: Course) -> Course:
    """The course with `waiting_since` and `progressed` as of now."""
    if course.outcome or view.spec.suspend or (view.refusal and not course.open):
        return replace(course, waiting_since=None)
    spec = view.spec
    if not (course.open and view.ready_workers(course.number)):
        missed = _nobody_looked(view, course.waiting_since, spec.startup_deadline_seconds)
        return replace(course, waiting_since=view.now if missed else course.waiting_since or view.now)
    first = course.waiting_since is not None or course.progressed is None
    missed = _nobody_looked(view, course.progressed, spec.progress_deadline_seconds)
    moved = first or missed or _moved(view, course)
    return replace(course, waiting_since=None, progressed=view.now if moved else course.progressed)


def passed(view: View, course: Course) -> Ending | None:
    """What a deadline ends: the job, or, if nothing moves, the attempt."""
    left = _seconds_left(view, course)
    spec = view.spec
    if left.get("active", 1.0) <= 0:
        message = (
            f"the job ran for activeDeadlineSeconds, {spec.active_deadline_seconds} s, over all attempts"
        )
        return Ending(Verdict.FAILED, Reason.DEADLINE_EXCEEDED, message, view.now)
    if left.get("startup", 1.0) <= 0:
        message = (
            f"driver or workers did not come within startupDeadlineSeconds, {spec.startup_deadline_seconds} s"
        )
        reason = Reason.STARTUP_DEADLINE_EXCEEDED
        return Ending(Verdict.FAILED, reason, words.sentence(message + _what_was_awaited(view)), view.now)
    if left.get("progress", 1.0) <= 0:
        message = (
            f"no stage change, region or fit step for progressDeadlineSeconds, "
            f"{spec.progress_deadline_seconds} s, while a worker was ready"
        )
        reason, unread = Reason.PROGRESS_DEADLINE_EXCEEDED, driver.unread(view, course.number)
        message = words.sentence(f"{message}; {unread}" if unread else message)
        return Ending(Verdict.AGAIN, reason, message, view.now, counted=True)
    return None


def due(view: View, course: Course) -> list[float]:
    """Seconds until each deadline that runs."""
    if course.outcome or view.spec.suspend:
        return []
    return list(_seconds_left(view, course).values())


def _seconds_left(view: View, course: Course) -> dict[str, float]:
    spec, left = view.spec, {}
    if spec.active_deadline_seconds is not None:
        present = view.seconds_since(course.attempts.started) if course.open else 0.0
        left["active"] = spec.active_deadline_seconds - course.active_seconds - present
    if course.waiting_since is not None:
        left["startup"] = spec.startup_deadline_seconds - view.seconds_since(course.waiting_since)
    elif course.open and course.progressed is not None:
        left["progress"] = spec.progress_deadline_seconds - view.seconds_since(course.progressed)
    return left


def _nobody_looked(view: View, since: datetime | None, limit: int) -> bool:
    """Whether the deadline passed while no operator was there, who would have acted on it: what was awaited
    may have waited for the operator. One that lies before a look was lowered after it.
    """
    looked = view.snapshot.looked
    lowered = looked is not None and seconds_between(since, looked) >= limit
    return view.seconds_since(since) >= limit + LATE_SECONDS and not lowered


def _moved(view: View, course: Course) -> bool:
    """Whether the driver counts other rows, or is in another stage, than when it was last written down."""
    if course.progress is None:
        return False
    stored = view.stored
    done = stored.progress.done if stored.progress else 0
    return (course.progress.stage, course.progress.regions.done) != (stored.stage, done)


def _what_was_awaited(view: View) -> str:
    cluster = view.condition(ConditionType.CLUSTER_READY)
    return f"; {cluster.reason}: {cluster.message}" if cluster and cluster.status != "True" else ""
