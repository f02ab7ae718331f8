"""Moves a job's course on: attempts end, jobs end, the next attempt begins. Called once per pass.

The whole way is gone in one pass: an attempt that ends and may be followed at once is followed, so that
the same snapshot with the new status gives the same course again.
"""

from __future__ import annotations

from dataclasses import replace

from influence_job.progress import Progress
from influence_job.status import ConditionType
from influence_operator.decisions import attempts, deadlines, driver, observed, remains
from influence_operator.decisions.attempts import Ending, Verdict
from influence_operator.decisions.course import Course, Outcome, closed, finished, opened, recall, reopened
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.spec_change import (
    calls_for_an_attempt,
    changed_before_start,
    waiting_changes,
)
from influence_operator.decisions.view import View
from influence_operator.settings import Settings


def advance(view: View, settings: Settings) -> Course:
    """The course after this pass."""
    course = recall(view)
    if course.outcome:
        if course.outcome.complete or not _changed_since_failure(view, course, settings):
            return course
        course = reopened(view, course)
    if course.open:
        course = _through_the_attempt(view, course, settings)
    if not course.open and not course.outcome:
        course = _between_attempts(view, course)
    if may_open(view, course):
        course = opened(view, course)
    return replace(course, waiting_changes=waiting_changes(view, course, settings.defaults.image))


def may_open(view: View, course: Course) -> bool:
    """Whether the next attempt may begin."""
    if course.outcome or course.open or view.spec.suspend or view.refusal or source_missing(view):
        return False
    return not seconds_to_wait(view, course) and not remains.anything_left(view)


def seconds_to_wait(view: View, course: Course) -> float:
    """Seconds until the delay before the next attempt is over."""
    following = course.attempts.next_start
    ended = observed.in_utc(following) if following else None
    return max(0.0, (ended - view.now).total_seconds()) if ended else 0.0


def source_missing(view: View) -> str | None:
    """The ConfigMap with the task's code, if the spec names one that does not exist."""
    source = view.spec.task.source
    return f"ConfigMap {source.config_map.name}" if source and view.snapshot.source is None else None


def _changed_since_failure(view: View, course: Course, settings: Settings) -> bool:
    failed = view.condition(ConditionType.FAILED)
    if failed is None or failed.observed_generation in (None, view.generation) or view.refusal:
        return False
    return calls_for_an_attempt(view, course, settings.defaults.image)


def _through_the_attempt(view: View, course: Course, settings: Settings) -> Course:
    job = view.driver_job(course.number)
    if job is not None:
        course = course.with_attempts(driver=observed.name(job))
    course = _listen(view, course)
    end = driver.driver_end(view, course.attempts)
    if end is not None:
        course = _hear(course, end.progress)
        judged = attempts.judge(end, course.attempts.recorded)
        if judged.verdict is Verdict.FAILED and waiting_changes(view, course, settings.defaults.image):
            judged = replace(judged, verdict=Verdict.STOPPED)  # what waits for the next attempt may mend it
        return closed(view, course, judged)
    course = deadlines.with_clocks(view, course)
    ending = _stopped(view, course, settings) or deadlines.passed(view, course)
    return closed(view, course, ending) if ending else course


def _between_attempts(view: View, course: Course) -> Course:
    course = deadlines.with_clocks(view, course)
    ending = None if view.spec.suspend else deadlines.passed(view, course)
    if ending is None:
        return course
    return finished(view, course, Outcome(False, ending.reason, ending.message))


def _stopped(view: View, course: Course, settings: Settings) -> Ending | None:
    """The user's wish, before any deadline."""
    if view.spec.suspend:
        return Ending(Verdict.STOPPED, Reason.SUSPENDED, "suspend was set", view.now)
    stalled = view.condition(ConditionType.STALLED)
    mended = (
        stalled is not None
        and stalled.reason == Reason.IMAGE_INCOMPATIBLE
        and stalled.observed_generation != view.generation
        and not view.refusal
    )
    if mended or changed_before_start(view, course, settings.defaults.image):
        return Ending(Verdict.STOPPED, Reason.SPEC_CHANGED, "the spec was changed", view.now)
    return None


def _listen(view: View, course: Course) -> Course:
    report = view.report(course.number)
    if report is None:
        return replace(course, incompatible=_still_incompatible(view))
    if not driver.understood(report):
        return replace(course, incompatible=driver.other_contract(report))
    return _hear(course, report)


def _hear(course: Course, progress: Progress | None) -> Course:
    if progress is None or not driver.understood(progress):
        return course
    recorded = max(course.attempts.recorded, driver.recorded(progress))
    return replace(course, progress=progress).with_attempts(recorded=recorded)


def _still_incompatible(view: View) -> str | None:
    """A driver that does not answer now still speaks as it did."""
    stalled = view.condition(ConditionType.STALLED)
    same = stalled is not None and stalled.reason == Reason.IMAGE_INCOMPATIBLE
    return stalled.message if stalled is not None and same else None
