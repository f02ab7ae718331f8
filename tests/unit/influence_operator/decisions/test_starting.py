"""An attempt starts with its driver; workers are asked for when the driver says that work is left."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from influence_operator.decisions.actions import Create, CreateTls, Decision, Delete
from influence_operator.decisions.snapshot import Conflict
from operator_objects import (
    NOW,
    SETTINGS,
    World,
    base,
    child,
    computing,
    influence_job,
    pod,
    pods_end,
    progress,
    started,
    waiting,
)


def created(decision) -> list[str]:
    return [f"{a.manifest['kind']} {a.manifest['metadata']['name']}" for a in decision.actions]


def test_a_new_job_gets_its_first_attempt_guards_before_the_driver():
    decision = World().decide()
    name = base(1)
    assert created(decision) == [
        f"ConfigMap {name}",
        f"NetworkPolicy {name}-driver",
        f"NetworkPolicy {name}-scheduler",
        f"NetworkPolicy {name}-worker",
        f"Secret {name}",
        f"Job {name}",
    ]
    assert decision.status["attempts"]["current"] == 1
    assert [event.reason for event in decision.events] == ["AttemptStarted"]


def test_the_attempts_number_is_stored_before_its_children_are_made():
    assert World().decide().status_first


def test_a_pass_that_was_cut_short_is_repeated_with_the_same_names():
    world = World()
    first = world.decide()
    world.job["status"] = first.status
    again = world.decide()
    assert again.actions == first.actions
    assert again.status == first.status
    assert not again.status_first


def test_the_certificate_lives_a_week_longer_than_the_job_may_run_and_a_year_at_least():
    """The deadline may be raised while the attempt runs, whose workers have this one certificate."""
    for seconds, days in ((3600, 365), (400 * 86400, 407)):
        world = World(influence_job(activeDeadlineSeconds=seconds))
        (tls,) = [a for a in world.decide().actions if isinstance(a, CreateTls)]
        assert tls.not_after == NOW + timedelta(days=days)


def test_without_workers_needed_no_cluster_is_asked_for():
    world = started()
    assert not world.step(3).actions
    assert world.condition("ClusterReady") == "False Preflight"


def test_the_cluster_is_made_when_the_driver_needs_workers():
    world = started()
    world.report = progress(1, workersNeeded=True)
    decision = world.step(3)
    assert created(decision) == [f"DaskCluster {base(1)}"]
    assert world.condition("Ready") == "True Running"
    assert world.condition("Reconciling") == ""


def test_a_report_of_another_attempt_or_job_starts_nothing():
    for foreign in (progress(2, workersNeeded=True), progress(1, workersNeeded=True, jobUid="another")):
        world = started()
        world.report = foreign
        assert not world.step(3).actions


def test_a_driver_that_is_ending_gets_no_cluster():
    world = started()
    world.find("Pod")[0]["metadata"]["deletionTimestamp"] = "2026-03-01T12:00:30Z"
    world.report = progress(1, workersNeeded=True)
    assert not world.step(3).actions


def test_a_cluster_that_is_being_deleted_is_replaced_only_when_it_is_gone():
    world = computing()
    (cluster,) = world.find("DaskCluster")
    cluster["metadata"]["deletionTimestamp"] = "2026-03-01T12:00:11Z"
    assert not world.step(1).actions
    world.remove("DaskCluster")
    assert created(world.step(1)) == [f"DaskCluster {base(1)}"]


def test_a_deleted_policy_is_made_again():
    world = computing()
    world.remove("NetworkPolicy", "worker")
    assert created(world.step(1)) == [f"NetworkPolicy {base(1)}-worker"]


MOVED = replace(SETTINGS, namespace="platform", operator_selector={"app.kubernetes.io/instance": "other"})


def test_policies_that_let_in_an_operator_which_has_moved_are_replaced_at_once_by_ours():
    """Else the new operator could not read the driver, and would end the job for it."""
    world = computing()
    world.step(60)
    world.settings = MOVED
    actions = world.step(3).actions
    replaced = [f"{base(1)}-driver", f"{base(1)}-scheduler"]
    assert [action.name for action in actions if isinstance(action, Delete)] == replaced
    assert [a.manifest["metadata"]["name"] for a in actions if isinstance(a, Create)] == replaced
    assert [type(action) for action in actions] == [Delete, Create] * 2
    assert {action.uid for action in actions if isinstance(action, Delete)} == {
        f"uid-of-NetworkPolicy-{name}" for name in replaced
    }
    (policy,) = world.find("NetworkPolicy", "driver")
    (peer,) = policy["spec"]["ingress"][0]["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "platform"}
    assert not world.step(100).actions


def test_a_policy_that_somebody_changes_again_and_again_is_replaced_once_a_minute_at_most():
    world = computing()
    world.step(60)
    taken = 0
    for _ in range(60):
        (policy,) = world.find("NetworkPolicy", "worker")
        policy["spec"] = {"podSelector": {}}
        taken += len(world.step(2).actions)
    assert taken == 2 * 2


def test_a_policy_that_is_being_deleted_is_waited_for():
    world = computing()
    world.step(60)
    world.settings = MOVED
    for policy in world.find("NetworkPolicy"):
        policy["metadata"]["deletionTimestamp"] = "2026-03-01T12:01:00Z"
    assert not world.step(3).actions


def test_a_driver_is_asked_for_its_progress_every_few_seconds():
    assert 2 <= computing().decide().again_after <= 5


def test_a_job_whose_driver_waits_for_a_node_is_looked_at_less_often():
    world = World()
    world.step()
    assert world.step(1).again_after == 10


def test_the_tasks_source_must_exist_before_an_attempt_gets_a_number():
    source = {"source": {"configMap": {"name": "tasks"}}}
    world = World(influence_job(task=source), more={"missing": ("ConfigMap tasks",)})
    decision = world.step()
    assert not decision.actions
    assert world.condition("ClusterReady") == "False MissingReference"
    assert "ConfigMap tasks" in world.message("ClusterReady")
    world.more = {"source": {"data": {"code.py": "pass"}}}
    assert f"Job {base(1)}" in created(world.step(10))


def test_the_cluster_mounts_the_copy_of_the_source_whatever_became_of_the_original():
    world = World(influence_job(task={"source": {"configMap": {"name": "tasks"}}}))
    world.more = {"source": {"data": {"code.py": "pass"}}}
    world.step()
    world.more = {}
    world.add(pod(1, "driver"))
    world.report = progress(1, workersNeeded=True)
    (action,) = world.step(3).actions
    assert isinstance(action, Create)
    assert "code.py" in str(action.manifest)


def test_a_name_that_is_taken_stalls_the_job_until_it_is_free():
    world = World()
    world.step()
    world.remove("Job")
    world.more = {"conflicts": (Conflict("Job", base(1)),)}
    decision = world.step(1)
    assert not decision.actions
    assert world.condition("Stalled") == "True NameConflict"
    assert world.condition("Ready") == "False NameConflict"
    assert f"Job {base(1)}" in world.message("Stalled")
    world.more = {}
    assert f"Job {base(1)}" in created(world.step(10))
    assert world.condition("Stalled") == ""


def test_a_child_that_another_owner_made_is_none_of_ours():
    world = World()
    world.step()
    world.remove("Job")
    world.add(child("Job", base(1), 1, "another-owner"))
    assert f"Job {base(1)}" in created(world.decide())


def test_the_number_is_the_highest_of_status_and_children_so_that_no_name_comes_twice():
    world = World()
    world.add(child("ConfigMap", base(4), 4, world.job["metadata"]["uid"]))
    world.step()
    assert world.attempt == 4


def test_labels_that_somebody_else_set_make_no_attempt():
    """Only children that the operator made count: they name the job as their owner."""
    world = computing()
    world.add(child("Service", "theirs", 7, "nobody"), child("ConfigMap", "theirs", 7, "nobody"))
    world.add(pod(7, "driver", "theirs", owner="nobody"))
    decision = world.step(3)
    assert not decision.actions
    assert world.attempt == 1


def changed(world: World, **spec: Any) -> Decision:
    """The user changes the spec; the next pass."""
    world.job["spec"] |= spec
    world.job["metadata"]["generation"] += 1
    return world.step(5)


def waiting_driver(**spec: Any) -> World:
    """A job whose first attempt's driver waits for its image."""
    world = World(influence_job(**spec))
    world.step()
    world.add(pod(1, "driver", **waiting("driver", "ImagePullBackOff", "no such image")))
    world.step(5)
    return world


@pytest.mark.parametrize(
    "change",
    [{"image": "mended:1"}, {"driver": {"nodeSelector": {}}}, {"workers": {"deviceMemory": "1Gi"}}],
)
def test_a_change_of_the_pods_begins_an_attempt_anew_whose_driver_has_not_started(change):
    world = waiting_driver(image="misspelt:1", driver={"nodeSelector": {"no.such/node": "1"}})
    changed(world, **change)
    assert not world.find("Job")
    pods_end(world)
    world.step(1)
    assert world.attempt == 2
    assert world.job["status"]["attempts"]["countedFailures"] == 0
    assert world.job["status"]["attempts"]["lastReason"] == "SpecChanged"
    (job,) = world.find("Job")
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == change.get("image", "misspelt:1")


def test_a_driver_that_waits_is_left_alone_when_nothing_that_pods_are_made_from_changes():
    world = waiting_driver()
    before = world.find("Job")
    changed(world, workers={"replicas": 3}, backoffLimit=9, startupDeadlineSeconds=99)
    world.step(5)
    assert world.attempt == 1
    assert world.find("Job") == before


def test_a_driver_that_runs_keeps_the_spec_it_began_with():
    world = started()
    changed(world, image="other:2")
    world.step(5)
    assert world.attempt == 1
