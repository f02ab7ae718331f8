"""`ttlSecondsAfterFinished`: deletes the InfluenceJob itself, as batch/v1 does; its children go with it."""

from __future__ import annotations

from influence_operator.decisions import observed
from influence_operator.decisions.actions import DeleteJob
from influence_operator.decisions.course import Course
from influence_operator.decisions.step import Step
from influence_operator.decisions.view import View


def expire(view: View, course: Course) -> Step:
    """Deletes a job that ended long enough ago."""
    ttl = view.spec.ttl_seconds_after_finished
    if ttl is None or course.outcome is None or course.completion_time is None:
        return Step()
    left = ttl - view.seconds_since(course.completion_time)
    if left > 0:
        return Step(due=(left,))
    version = observed.text(view.snapshot.job, "metadata", "resourceVersion")
    return Step((DeleteJob(view.uid, version),))
