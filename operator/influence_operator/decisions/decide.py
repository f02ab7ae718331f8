"""The pure decision about one job: what is to be done, and what its status says. Called once per pass.

view       the snapshot, read
advance    attempts end, the job ends, the next attempt begins
policies   each adds the actions of its concern
status     what is written, and the Events of its transitions
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from influence_job.status import InfluenceJobStatus
from influence_operator.decisions import deadlines, finalizers, healing, observed, starting, stopping, ttl
from influence_operator.decisions.actions import Action, Decision
from influence_operator.decisions.advance import advance, seconds_to_wait
from influence_operator.decisions.cluster_state import ClusterState, cluster_state
from influence_operator.decisions.course import Course
from influence_operator.decisions.events import transitions
from influence_operator.decisions.refused_spec import spec_begun_with, stalled_status
from influence_operator.decisions.snapshot import Children, Object, Snapshot
from influence_operator.decisions.specification import RefusedSpecError, managed_elsewhere, spec_of
from influence_operator.decisions.status import as_json, same, significant, status_of, worth_writing
from influence_operator.decisions.step import Step, soonest, together
from influence_operator.decisions.view import View, generation, stored_status
from influence_operator.settings import Settings


def decide(snapshot: Snapshot, settings: Settings) -> Decision:
    """What one pass over a job does. Never raises, whatever stands in the snapshot."""
    job, now = snapshot.job, whole_seconds(snapshot.now)
    if managed_elsewhere(job):
        return Decision((), _stored(job), urgent=False)
    release = finalizers.of_job(snapshot.children, observed.uid(job), now)
    if observed.being_deleted(job):
        # Its children go with it; whether and when is for the garbage collector to say.
        return Decision(release.actions, _stored(job), urgent=False, again_after=soonest(release.due))
    stored = stored_status(job)
    try:
        view = View(snapshot, spec_of(job, settings.api_audiences), stored, now)
    except RefusedSpecError as error:
        begun = spec_begun_with(snapshot)
        if begun is None:
            status = stalled_status(stored, str(error), generation(job), now)
            return _decision(job, stored, status, release)
        view = View(snapshot, begun, stored, now, str(error))
    course = advance(view, settings)
    course, tended = healing.tend(view, course)
    cluster = cluster_state(view, course)
    status = status_of(view, course, cluster)
    if significant(status) == significant(stored) and not worth_writing(view, status):
        status = stored
    step = together(
        (
            release,
            stopping.stop(view, course),
            starting.start(view, course, settings),
            tended,
            ttl.expire(view, course),
            Step(due=(*deadlines.due(view, course), *_next_attempt(view, course))),
        )
    )
    return _decision(job, stored, status, step, cluster)


def decide_orphans(children: Children, now: datetime) -> tuple[Action, ...]:
    """What is done for children whose job is gone: garbage collection deletes them and must get through."""
    return finalizers.of_nobody(children, whole_seconds(now)).actions


def whole_seconds(now: datetime) -> datetime:
    """UTC as Kubernetes writes it."""
    return (observed.in_utc(now) or now).replace(microsecond=0)


def _decision(
    job: Object,
    stored: InfluenceJobStatus,
    status: InfluenceJobStatus,
    step: Step,
    cluster: ClusterState | None = None,
) -> Decision:
    transition = significant(status) != significant(stored)
    unchanged = not transition and same(stored, status)
    return Decision(
        actions=step.actions,
        status=_stored(job) if unchanged else as_json(status),
        urgent=transition,
        events=transitions(stored, status, cluster) if transition else (),
        again_after=soonest(step.due),
        status_first=_milestone(stored) != _milestone(status),
    )


def _milestone(status: InfluenceJobStatus) -> tuple[object, ...]:
    """What must be stored before anything is done about it: numbers of attempts, and ends."""
    attempts = status.attempts
    number, ended = (attempts.current, attempts.ended) if attempts else (0, None)
    return number, ended, status.completion_time


def _next_attempt(view: View, course: Course) -> tuple[float, ...]:
    """When to look whether the next attempt may begin."""
    if course.open or course.outcome or view.spec.suspend or view.refusal:
        return ()
    return (seconds_to_wait(view, course) or starting.AGAIN_SECONDS,)


def _stored(job: Object) -> Mapping[str, Any]:
    status = observed.look(job, "status")
    return status if isinstance(status, Mapping) else {}
