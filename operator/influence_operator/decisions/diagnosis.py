"""What keeps an attempt from having driver, scheduler and workers, for `ClusterReady`.

Looks at the driver first, then the scheduler, then the workers: without the one the others are not asked for.
"""

from __future__ import annotations

from influence_operator.decisions import observed, starting
from influence_operator.decisions.cluster_parts import cluster_parts
from influence_operator.decisions.course import Course
from influence_operator.decisions.pod_problems import Problem, event_problem, pod_problem, refusal
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.snapshot import Object
from influence_operator.decisions.view import View
from influence_operator.manifests.names import Role

UNTAKEN_SECONDS = 20.0
"""A DaskCluster that no controller has touched for so long has none."""


def diagnose(view: View, course: Course) -> Problem | None:
    """The first problem found, None if everything is there or on its way."""
    if view.snapshot.missing and not view.driver_job(course.number):
        return Problem(Reason.MISSING_REFERENCE, f"{', '.join(view.snapshot.missing)}: not found")
    if view.snapshot.refusals:
        return refusal(view.snapshot.refusals[0]).of("refused")
    if not course.open:
        return None
    return (
        _role(view, course, Role.DRIVER)
        or _driver_job(view, course)
        or _dask_operator(view, course)
        or _role(view, course, Role.SCHEDULER)
        or _role(view, course, Role.WORKER)
        or _deployments(view, course)
        or _unmade(view, course)
    )


def _role(view: View, course: Course, role: Role) -> Problem | None:
    """The first problem of the role's pods, by name so that it does not change from pass to pass."""
    pods = [pod for pod in view.pods(course.number, role) if _is_to_run(pod)]
    for pod in sorted(pods, key=observed.name):
        found = pod_problem(pod, view.now) or _event(view, pod)
        if found:
            return found.of(f"{role.value} pod {observed.name(pod)}")
    return None


def _event(view: View, pod: Object) -> Problem | None:
    """What the newest Warning about the pod says."""
    for event in view.snapshot.warnings:
        if observed.text(event, "involvedObject", "name") == observed.name(pod) and (
            found := event_problem(event, pod)
        ):
            return found
    return None


def _driver_job(view: View, course: Course) -> Problem | None:
    """Why the driver's Job has no pod: its controller says so in Events alone."""
    if view.driver_job(course.number) is None or view.pods(course.number, Role.DRIVER):
        return None
    for event in view.snapshot.warnings:
        about = observed.look(event, "involvedObject")
        job = (observed.text(about, "kind"), observed.text(about, "name"))
        if job == ("Job", view.base(course.number)) and observed.text(event, "reason") == "FailedCreate":
            return refusal(observed.text(event, "message")).of("driver")
    return None


def _dask_operator(view: View, course: Course) -> Problem | None:
    if not starting.workers_needed(view, course):
        return None
    if not view.snapshot.dask_operator:
        message = "the API server knows no DaskCluster; install the dask-kubernetes operator"
        return Problem(Reason.DASK_OPERATOR_MISSING, message)
    parts = cluster_parts(view, course)
    if parts is None or parts.phase or len(parts.missing) < 3:
        return None
    if view.seconds_since(observed.created(parts.cluster)) < UNTAKEN_SECONDS:
        return None
    message = (
        f"nobody takes up DaskCluster {view.base(course.number)}; does the dask-kubernetes operator run?"
    )
    return Problem(Reason.DASK_OPERATOR_MISSING, message)


def _deployments(view: View, course: Course) -> Problem | None:
    """Why a Deployment has no pod."""
    for deployment in sorted(view.of(course.number).deployments, key=observed.name):
        failure = observed.condition(deployment, "ReplicaFailure")
        if observed.text(failure, "status") == "True":
            found = refusal(observed.text(failure, "message"))
            return found.of(f"Deployment {observed.name(deployment)}")
    return None


def _unmade(view: View, course: Course) -> Problem | None:
    """Why a part of the cluster is not there: dask-kubernetes keeps what the API server told it."""
    parts = cluster_parts(view, course)
    if parts is None or parts.complete or not parts.failure:
        return None
    return refusal(parts.failure).of("dask-kubernetes")


def _is_to_run(pod: Object) -> bool:
    return not (observed.ready(pod) or observed.ended(pod) or observed.being_deleted(pod))
