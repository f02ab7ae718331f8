"""`ClusterReady`: whether driver, scheduler and a worker run, and if not, what is awaited or wrong."""

from __future__ import annotations

from dataclasses import dataclass

from influence_job.status import ConditionType
from influence_operator.decisions import driver, observed, remains, starting
from influence_operator.decisions.cluster_parts import cluster_parts
from influence_operator.decisions.course import Course
from influence_operator.decisions.diagnosis import diagnose
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.view import View
from influence_operator.manifests.names import Role


@dataclass(frozen=True)
class ClusterState:
    """`ClusterReady`, and whether something is wrong rather than on its way."""

    ready: bool
    reason: Reason
    message: str
    wrong: bool = False


def cluster_state(view: View, course: Course) -> ClusterState:
    """The state of the present attempt's pods."""
    if course.outcome:
        return ClusterState(False, Reason.FINISHED, "the job has ended")
    if view.spec.suspend:
        return ClusterState(False, Reason.SUSPENDED, "the job is suspended")
    unread = driver.unread(view, course.number) if course.open else ""
    if unread:
        reason = Reason.DRIVER_UNREACHABLE
        return ClusterState(False, reason, _steady(view, reason, unread), wrong=True)
    problem = diagnose(view, course)
    waiting = _waiting(view, course)
    if waiting:
        if problem:
            message = _steady(view, problem.reason, problem.message)
            return ClusterState(False, problem.reason, message, wrong=True)
        return waiting
    if blocked := _scale_down_blocked(view, course):
        return blocked
    if view.ready_workers(course.number) >= view.spec.workers.replicas:
        return ClusterState(True, Reason.CLUSTER_READY, "driver, scheduler and workers run")
    message = problem.message if problem else "the other workers are starting"
    return ClusterState(True, Reason.SOME_WORKERS_READY, message)


def _waiting(view: View, course: Course) -> ClusterState | None:
    """What is awaited; None when there is something of everything."""
    number = course.number
    if not course.open:
        return _between_attempts(view, course)
    pod = driver.driver_pod(view, number)
    if pod is None or not observed.ready(pod):
        return ClusterState(False, Reason.DRIVER_STARTING, f"the driver of attempt {number} is starting")
    if not view.of(number).dask_clusters:
        asked = starting.workers_needed(view, course)
        message = "the driver has asked for workers" if asked else "the driver has not asked for workers"
        return ClusterState(False, Reason.PREFLIGHT, message)
    if not any(map(observed.ready, view.pods(number, Role.SCHEDULER))):
        return ClusterState(False, Reason.SCHEDULER_STARTING, "the Dask scheduler is starting")
    if not view.ready_workers(number):
        return ClusterState(False, Reason.WORKERS_STARTING, "no worker is ready yet")
    return None


def _scale_down_blocked(view: View, course: Course) -> ClusterState | None:
    """Workers that nobody retires. What was told stays told until they are gone, also by a new leader."""
    stored, said = view.condition(ConditionType.CLUSTER_READY), view.snapshot.unretired
    told = stored.message if stored and stored.reason == Reason.SCALE_DOWN_BLOCKED else ""
    parts = cluster_parts(view, course) if said or told else None
    if parts is None or not parts.too_many:
        return None
    if said:
        number = f"workers: {parts.wanted} wanted, {len(parts.deployments)} there"
        told = f"{number}; {said}; suspending and resuming the job starts fewer"
    return ClusterState(True, Reason.SCALE_DOWN_BLOCKED, told, wrong=True)


def _between_attempts(view: View, course: Course) -> ClusterState:
    if not course.number:
        return ClusterState(False, Reason.NOT_STARTED, "no attempt has been started")
    if remains.anything_left(view):
        return ClusterState(False, Reason.RETRYING, f"what is left of attempt {course.number} is ending")
    return ClusterState(False, Reason.RETRYING, f"attempt {course.number + 1} is due")


def _steady(view: View, reason: Reason, message: str) -> str:
    """A kubelet says in turns that an image cannot be pulled and that it waits; a user's code may have the
    driver answer anything in turns: the first words stay.
    """
    stored = view.condition(ConditionType.CLUSTER_READY)
    if stored is None or stored.reason != reason:
        return message
    if reason is Reason.IMAGE_PULL_FAILED:
        return stored.message if _subject(stored.message) == _subject(message) else message
    return stored.message if reason is Reason.DRIVER_UNREACHABLE else message


def _subject(message: str) -> str:
    return message.partition(": ")[0]
