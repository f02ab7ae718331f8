"""Makes the children of the open attempt: driver first, the cluster when the driver asks for workers.

ConfigMap, policies and Secret come before the driver's Job, so that no pod is without its guards; the applier
stops at the first child that is refused. What exists is not made again, except what somebody deleted, and
policies that let in an operator which has moved.
"""

from __future__ import annotations

from influence_job.spec import InfluenceJobSpec
from influence_operator.decisions import driver, observed
from influence_operator.decisions.actions import Action, Create, CreateTls, Delete
from influence_operator.decisions.course import Course
from influence_operator.decisions.snapshot import Conflict, Object
from influence_operator.decisions.step import Step
from influence_operator.decisions.view import View
from influence_operator.manifests.attempt import AttemptManifests, attempt_manifests, certificate_end
from influence_operator.manifests.child import Attempt
from influence_operator.manifests.config_map import begun_with, copied_source
from influence_operator.manifests.names import Role
from influence_operator.manifests.policies import network_policies
from influence_operator.settings import Settings

AGAIN_SECONDS = 10.0
"""How often something that is in the way is looked for again."""
POLL_SECONDS = 3.0
"""How often a driver that runs is asked for its progress."""
SETTLED_SECONDS = 60.0
"""Policies are replaced no more often, whatever a webhook or a second operator makes of them."""


def start(view: View, course: Course, settings: Settings) -> Step:
    """Creates what the open attempt lacks."""
    if not course.open:
        return Step()
    due = (_pace(view, course),)
    job = view.driver_job(course.number)
    if conflicts(view, course) or (job is not None and observed.being_deleted(job)):
        return Step(due=due)
    children = view.of(course.number)
    lacks_guards = len(children.network_policies) < len(Role) or not children.config_maps
    lacks_cluster = _lacks_cluster(view, course)
    actions = _outdated_policies(view, course, settings)
    if job is not None and not lacks_guards and not lacks_cluster:
        return Step(tuple(actions), due)
    made = _manifests(view, course, settings)
    if made is None:
        return Step(tuple(actions), due)
    actions += _guards(view, course, made)
    if job is None:
        actions += _driver(view, made)
    elif lacks_cluster:
        actions.append(Create(made.dask_cluster))
    return Step(tuple(actions), due)


def conflicts(view: View, course: Course) -> list[Conflict]:
    """What stands where children of the open attempt should."""
    base = view.base(course.number)
    return [c for c in view.snapshot.conflicts if course.open and c.name.startswith(base)]


def workers_needed(view: View, course: Course) -> bool:
    """Whether the driver, which runs and is to stay, has asked for workers."""
    if course.progress is None or not course.progress.workers_needed:
        return False
    return not course.progress.finished and driver.driver_pod(view, course.number) is not None


def _manifests(view: View, course: Course, settings: Settings) -> AttemptManifests | None:
    """None while the task's source is missing."""
    spec, source = _begun_with(view, course)
    if spec.task.source is not None and source is None:
        return None
    return attempt_manifests(view.snapshot.job, spec, course.number, settings, source)


def _begun_with(view: View, course: Course) -> tuple[InfluenceJobSpec, Object | None]:
    """Spec and source: the attempt's own copies, once there are any, for changes are the next attempt's."""
    copies = view.of(course.number).config_maps
    if not copies:
        return view.spec, view.snapshot.source
    return begun_with(copies[0], view.spec), copied_source(copies[0])


def _guards(view: View, course: Course, made: AttemptManifests) -> list[Action]:
    children = view.of(course.number)
    there = {observed.name(policy) for policy in children.network_policies}
    first = [] if children.config_maps else [made.config_map]
    wanted = [policy for policy in made.network_policies if policy["metadata"]["name"] not in there]
    return [Create(manifest) for manifest in (*first, *wanted)]


def _outdated_policies(view: View, course: Course, settings: Settings) -> list[Action]:
    """Replaces policies that this operator would make otherwise: it runs elsewhere than the one before.

    For the moment between the two the certificates alone guard the attempt.
    """
    attempt = Attempt(view.snapshot.job, view.spec, course.number, settings, None)
    wanted = {policy["metadata"]["name"]: policy for policy in network_policies(attempt)}
    actions: list[Action] = []
    for policy in view.of(course.number).network_policies:
        name, age = observed.name(policy), view.seconds_since(observed.created(policy))
        other = name in wanted and observed.look(policy, "spec") != wanted[name]["spec"]
        if other and age >= SETTLED_SECONDS and not observed.being_deleted(policy):
            old = Delete("networking.k8s.io/v1", "NetworkPolicy", name, observed.uid(policy))
            actions += [old, Create(wanted[name])]
    return actions


def _driver(view: View, made: AttemptManifests) -> list[Action]:
    end = certificate_end(view.spec, view.now)
    return [CreateTls(made.secret, end), Create(made.driver_job)]


def _lacks_cluster(view: View, course: Course) -> bool:
    """One that is being deleted counts until it is gone: the next one needs its name."""
    asked = workers_needed(view, course) and view.snapshot.dask_operator
    return asked and not view.of(course.number).dask_clusters


def _pace(view: View, course: Course) -> float:
    pod = driver.driver_pod(view, course.number)
    return POLL_SECONDS if observed.text(pod, "status", "phase") == "Running" else AGAIN_SECONDS
