"""One step for suspend, finish and retry: what belongs to attempts that do not go on is deleted.

First what runs pods, DaskCluster and driver Job; then, when no pod of the attempt is left, what guards them:
Secret and policies. `cleanupPolicy` has a say in the last attempt of a job that has ended, and there a driver
that ended itself stays for its logs.
"""

from __future__ import annotations

from dataclasses import replace

from influence_job.spec import CleanupPolicy
from influence_operator.decisions import driver, observed, remains
from influence_operator.decisions.actions import Action, Delete
from influence_operator.decisions.course import Course, Outcome
from influence_operator.decisions.snapshot import Children, Object
from influence_operator.decisions.step import Step
from influence_operator.decisions.view import View


def stop(view: View, course: Course) -> Step:
    """Deletes what is left of every attempt but the open one."""
    actions: list[Action] = []
    for attempt, children in sorted(view.attempts.items()):
        if attempt == course.number and course.open:
            continue
        if attempt == course.number and course.outcome:
            actions += _finish(view, course, course.outcome, children)
        else:
            actions += _delete_all(view, attempt, children)
    return Step(tuple(actions), tuple(remains.seconds_until_lost(view)))


def _finish(view: View, course: Course, outcome: Outcome, children: Children) -> list[Action]:
    policy = view.spec.cleanup_policy
    if policy is CleanupPolicy.ALL or not _ended_itself(view, course):
        # The copy of a spec that failed tells whether it was mended since.
        left = children if outcome.complete else replace(children, config_maps=())
        return _delete_all(view, course.number, left)
    if policy is CleanupPolicy.NONE:
        return []
    return [*_clusters(children), *_guards(view, course.number, children)]


def _ended_itself(view: View, course: Course) -> bool:
    """Whether the driver's Job can stay: it has ended and its controller starts no further pod."""
    job = view.driver_job(course.number)
    if job is None:
        return True
    if observed.holds(job, "Complete") or observed.holds(job, "Failed"):
        return True
    end = driver.driver_end(view, course.attempts)
    return end is not None and end.exit_code is not None


def _delete_all(view: View, attempt: int, children: Children) -> list[Action]:
    running = [*_clusters(children), *_jobs(children)]
    guards = _guards(view, attempt, children)
    return [*running, *guards, *(_config_maps(children) if _quiet(children) else [])]


def _guards(view: View, attempt: int, children: Children) -> list[Action]:
    """The Secret, which nobody can look up, is there as long as policies are: they are made before it."""
    if not children.network_policies or not _quiet(children):
        return []
    secret = Delete("v1", "Secret", view.base(attempt), None)
    policies = _delete("networking.k8s.io/v1", "NetworkPolicy", children.network_policies)
    return [secret, *policies]


def _quiet(children: Children) -> bool:
    """A lost pod counts here: what guards it must be there when its node comes back."""
    return not children.deployments and all(map(observed.ended, children.pods))


def _clusters(children: Children) -> list[Action]:
    return _delete("kubernetes.dask.org/v1", "DaskCluster", children.dask_clusters)


def _jobs(children: Children) -> list[Action]:
    return _delete("batch/v1", "Job", children.driver_jobs)


def _config_maps(children: Children) -> list[Action]:
    return _delete("v1", "ConfigMap", children.config_maps)


def _delete(api_version: str, kind: str, things: tuple[Object, ...]) -> list[Action]:
    return [
        Delete(api_version, kind, observed.name(thing), observed.uid(thing))
        for thing in things
        if not observed.being_deleted(thing)
    ]
