"""Stopping is one step for suspend, finish, retry and delete."""

from __future__ import annotations

from datetime import timedelta

import pytest

from influence_operator.decisions.actions import DeleteJob, RemoveFinalizer
from influence_operator.decisions.decide import decide_orphans
from influence_operator.decisions.snapshot import Children
from operator_objects import (
    FINALIZER,
    NOW,
    UID,
    World,
    base,
    child,
    computing,
    driver_ends,
    influence_job,
    pod,
    pods_end,
    stamp,
    started,
    words,
)


def deleted(decision) -> list[str]:
    return [action.kind for action in decision.actions]


def test_suspending_deletes_cluster_and_driver_and_keeps_the_status():
    world = computing()
    world.change(suspend=True)
    decision = world.step(1)
    assert deleted(decision) == ["DaskCluster", "Job"]
    assert world.condition("Suspended") == "False Suspending"
    assert world.condition("Reconciling") == "True Suspending"
    assert world.status["phase"] == "Suspending"
    assert world.status["progress"]["display"] == "10/100"


def test_suspended_is_true_only_when_no_pod_is_left():
    world = computing()
    world.change(suspend=True)
    world.step(1)
    world.remove("Pod", "driver")
    world.remove("Deployment")
    world.step(1)
    assert world.condition("Suspended") == "False Suspending", "workers are still ending"
    pods_end(world)
    decision = world.step(1)
    assert deleted(decision) == ["Secret", *["NetworkPolicy"] * 3, "ConfigMap"]
    assert world.condition("Suspended") == "True Suspended"
    assert world.condition("Ready") == "True Suspended"
    assert world.condition("Reconciling") == ""
    assert world.status["phase"] == "Suspended"


def test_a_deployment_that_may_still_make_pods_counts_as_a_pod():
    world = computing()
    world.change(suspend=True)
    world.step(1)
    world.remove("Pod")
    world.remove("DaskWorkerGroup")
    world.step(1)
    assert world.condition("Suspended") == "False Suspending"


def test_a_pod_that_does_not_end_is_lost_a_minute_after_its_grace_period():
    world = computing()
    world.change(suspend=True)
    world.step(1)
    worker = world.find("Pod", "worker")[0]
    pods_end(world)
    worker["metadata"]["deletionTimestamp"] = stamp(world.now + timedelta(seconds=30))
    world.add(worker)
    world.step(89)
    assert world.condition("Suspended") == "False Suspending"
    world.step(1)
    assert world.condition("Suspended") == "True Suspended"
    assert world.find("NetworkPolicy"), "what guards it must be there when its node comes back"


def test_a_job_that_is_created_suspended_starts_nothing():
    world = World(influence_job(suspend=True))
    decision = world.step()
    assert not decision.actions
    assert world.condition("Suspended") == "True Suspended"
    assert world.condition("Ready") == "True Suspended"
    assert "attempts" not in world.status


def test_a_suspended_job_is_left_alone():
    world = World(influence_job(suspend=True))
    world.step()
    decision = world.step(100_000)
    assert decision.status == world.job["status"]
    assert not decision.actions
    assert not decision.urgent
    assert decision.again_after is None


def test_resuming_starts_the_next_attempt_at_once():
    world = computing()
    world.change(suspend=True)
    world.step(1)
    pods_end(world)
    world.step(1)
    world.change(suspend=False)
    world.step(1)
    assert world.attempt == 2
    assert world.condition("Suspended") == "False Resumed"
    assert world.condition("Reconciling") == "True Starting"
    assert world.status["attempts"]["countedFailures"] == 0
    assert world.status["attempts"]["recorded"] == 0
    assert "progress" not in world.status
    assert world.events[-3:] == ["Suspended", "AttemptStarted", "Resumed"]


def test_resuming_waits_for_pods_that_are_still_ending():
    world = computing()
    world.change(suspend=True)
    world.step(1)
    world.change(suspend=False)
    world.step(1)
    assert world.attempt == 1
    pods_end(world)
    world.step(1)
    assert world.attempt == 2


def complete(**spec) -> World:
    world = computing(**spec)
    driver_ends(world, 0, words(finished=True))
    return world


def test_a_finished_job_keeps_its_driver_for_the_logs():
    world = complete()
    decision = world.step(1)
    assert deleted(decision) == ["DaskCluster"]
    assert decision.status_first, "the end is stored before what tells it is deleted"
    world.remove("Pod", "worker")
    world.remove("Pod", "scheduler")
    world.remove("Deployment")
    assert deleted(world.step(1)) == ["Secret", *["NetworkPolicy"] * 3]
    assert not world.step(1).actions
    assert [thing["kind"] for thing in world.objects if thing["kind"] in ("Job", "ConfigMap", "Pod")]


def test_a_finished_job_is_left_alone():
    world = complete()
    world.step(1)
    pods_end(world)
    world.step(1)
    decision = world.step(100_000)
    assert decision.status == world.job["status"]
    assert not decision.actions
    assert decision.again_after is None


def test_cleanup_policy_all_deletes_everything():
    world = complete(cleanupPolicy="All")
    assert deleted(world.step(1)) == ["DaskCluster", "Job"]
    pods_end(world)
    world.step(1)
    assert not world.objects


def test_a_failed_job_keeps_its_copy_of_the_spec_whatever_the_policy():
    world = computing(cleanupPolicy="All")
    driver_ends(world, 64)
    world.step(1)
    pods_end(world)
    world.step(1)
    assert [thing["kind"] for thing in world.objects] == ["ConfigMap"]
    world.change(backoffLimit=7)
    world.step(1)
    world.step(1)
    assert [thing["metadata"]["name"] for thing in world.find("ConfigMap")] == [base(2)]


def test_cleanup_policy_none_deletes_nothing():
    world = complete(cleanupPolicy="None")
    assert not world.step(1).actions
    assert not world.step(100).actions


def test_a_driver_that_did_not_end_itself_is_deleted_whatever_the_policy():
    for policy in ("Workers", "None"):
        world = computing(activeDeadlineSeconds=60, cleanupPolicy=policy)
        assert deleted(world.step(60)) == ["DaskCluster", "Job"]
        assert world.condition("Failed") == "True DeadlineExceeded"


def test_an_old_attempts_leftovers_go_while_the_next_one_runs():
    world = started()
    driver_ends(world, 1)
    world.step()
    pods_end(world)
    world.step(10)
    world.add(pod(2, "driver"))
    late = child("DaskCluster", base(1), 1, UID)
    world.add(late)
    assert [(a.kind, a.name) for a in world.step(1).actions] == [("DaskCluster", base(1))]


@pytest.mark.parametrize("suspend", [True, False])
def test_a_cluster_that_hangs_for_30_seconds_loses_kopfs_finalizer_and_no_other(suspend: bool):
    world = computing(suspend=False)
    world.change(suspend=suspend)
    (cluster,) = world.find("DaskCluster")
    cluster["metadata"] |= {"deletionTimestamp": stamp(NOW), "finalizers": ["other/one", FINALIZER]}
    world.now = NOW
    assert not [a for a in world.step(29).actions if isinstance(a, RemoveFinalizer)]
    assert world.decide().again_after <= 1.0
    (action,) = [a for a in world.step(1).actions if isinstance(a, RemoveFinalizer)]
    assert (action.name, action.uid, action.finalizer) == (base(1), cluster["metadata"]["uid"], FINALIZER)


def test_a_job_that_is_being_deleted_is_left_to_the_garbage_collector_but_for_hanging_clusters():
    world = computing()
    world.job["metadata"]["deletionTimestamp"] = stamp(world.now)
    decision = world.step(1)
    assert not decision.actions
    assert decision.status == world.status
    (cluster,) = world.find("DaskCluster")
    cluster["metadata"] |= {"deletionTimestamp": stamp(world.now), "finalizers": [FINALIZER]}
    assert world.step(1).again_after == 29
    assert [type(a) for a in world.step(30).actions] == [RemoveFinalizer]


def test_clusters_whose_job_is_gone_are_let_go_too():
    hanging = {"deletionTimestamp": stamp(NOW), "finalizers": [FINALIZER]}
    ours = child("DaskCluster", base(1), 1, UID)
    ours["metadata"] |= hanging
    foreign = child("DaskCluster", "theirs", 1, "somebody-else")
    foreign["metadata"] |= hanging
    children = Children(dask_clusters=(ours, foreign))
    assert decide_orphans(children, NOW + timedelta(seconds=29)) == ()
    (action,) = decide_orphans(children, NOW + timedelta(seconds=30))
    assert isinstance(action, RemoveFinalizer)
    assert action.name == base(1)


def test_a_finished_job_is_deleted_when_its_time_to_live_is_over():
    world = complete(ttlSecondsAfterFinished=600)
    world.step(1)
    assert world.step(1).again_after == 599
    (action,) = [a for a in world.step(599).actions if isinstance(a, DeleteJob)]
    assert action == DeleteJob(UID, "7")


def test_a_job_of_another_manager_is_not_touched():
    world = World(influence_job(managedBy="example.com/other"))
    decision = world.decide()
    assert not decision.actions
    assert not decision.events
    assert decision.status == {"observedGeneration": -1}


def test_a_cluster_that_somebody_else_holds_is_left_to_them():
    world = computing()
    (cluster,) = world.find("DaskCluster")
    cluster["metadata"] |= {"deletionTimestamp": stamp(NOW), "finalizers": ["other/one"]}
    assert not world.step(1000).actions
