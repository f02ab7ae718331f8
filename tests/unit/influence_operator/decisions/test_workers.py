"""The number of workers follows the spec; what dask-kubernetes leaves undone is healed."""

from __future__ import annotations

from influence_operator.decisions.actions import Patch, RetireWorkers
from operator_objects import (
    base,
    child,
    computing,
    kept_by_kopf,
    pod,
    progress,
    started,
    worker_deployment,
    worker_name,
)


def replicas(world) -> int:
    (cluster,) = world.find("DaskCluster")
    number: int = cluster["spec"]["worker"]["replicas"]
    return number


def group_follows(world) -> None:
    """dask-kubernetes hands the number on to the worker group."""
    (group,) = world.find("DaskWorkerGroup")
    group["spec"]["worker"]["replicas"] = replicas(world)


def test_more_workers_are_a_number_in_the_cluster():
    world = computing(workers=2)
    world.change(workers={"replicas": 4})
    (action,) = world.step(1).actions
    assert isinstance(action, Patch)
    assert action.patch == {"spec": {"worker": {"replicas": 4}}}
    assert world.status["workers"]["display"] == "2/4"
    assert "Scaled" in world.events


def test_fewer_workers_are_chosen_by_the_scheduler_among_ours():
    world = computing(workers=3)
    world.add(child("Deployment", "foreign", 1, "another-owner", "worker"))
    world.change(workers={"replicas": 1})
    (action,) = world.step(1).actions
    assert action == RetireWorkers(
        cluster=base(1),
        cluster_uid=f"uid-of-DaskCluster-{base(1)}",
        count=2,
        deployments=tuple(worker_name(1, index) for index in range(3)),
        replicas=1,
    )


def test_dask_kubernetes_never_gets_to_take_workers_away():
    """It makes 5 of which 2 are there; a lower number now would meet all 5 a moment later."""
    world = computing(workers=2)
    world.change(workers={"replicas": 5})
    world.step(1)
    group_follows(world)
    world.change(workers={"replicas": 3})
    assert not world.step(1).actions
    world.add(*(worker_deployment(1, index) for index in range(5)))
    (action,) = world.step(1).actions
    assert isinstance(action, RetireWorkers)
    assert (action.count, action.replicas) == (2, 3)


def test_nobody_is_retired_while_workers_are_still_being_made():
    world = computing(workers=2)
    world.change(workers={"replicas": 5})
    world.step(1)
    group_follows(world)
    world.add(*(worker_deployment(1, index) for index in range(4)))
    world.change(workers={"replicas": 3})
    assert not world.step(1).actions
    assert isinstance(world.step(10).actions[0], RetireWorkers), "they do not come"


def test_workers_that_a_quota_keeps_away_can_be_given_up_after_a_while():
    world = computing(workers=2)
    world.change(workers={"replicas": 5})
    world.step(1)
    group_follows(world)
    world.change(workers={"replicas": 2})
    assert not world.step(1).actions
    (action,) = world.step(10).actions
    assert action.patch == {"spec": {"worker": {"replicas": 2}}}


def test_a_deleted_worker_deployment_is_made_again_in_two_steps():
    world = computing(workers=3)
    world.remove("Deployment", worker_name(1, 2))
    (group,) = world.find("DaskWorkerGroup")
    group["metadata"]["annotations"] = {"kopf.zalando.org/last-handled-configuration": "{}"}
    assert not world.step(1).actions, "dask-kubernetes may be at it"
    (lower,) = world.step(10).actions
    assert lower.patch == {"spec": {"worker": {"replicas": 2}}}
    assert not world.step(1).actions, "the group has not followed"
    group_follows(world)
    (raised,) = world.step(1).actions
    assert raised.patch == {"spec": {"worker": {"replicas": 3}}}
    group_follows(world)
    world.add(worker_deployment(1, 2))
    assert not world.step(1).actions
    assert "clusterIncompleteSince" not in world.status


def test_a_worker_that_dask_kubernetes_will_try_to_make_again_is_left_to_it_for_longer():
    world = computing(workers=3)
    world.remove("Deployment", worker_name(1, 2))
    (group,) = world.find("DaskWorkerGroup")
    kopf = "kopf.zalando.org/"
    group["metadata"]["annotations"] = {
        f"{kopf}last-handled-configuration": "{}",
        f"{kopf}daskworkergroup_replica_update.spec.worker.replicas": '{"retries": 1, "success": false}',
    }
    for _ in range(8):
        assert not world.step(10).actions
    assert world.step(10).actions


QUOTA = 'deployments.apps "x" is forbidden: exceeded quota: team, requested: count/deployments.apps=1'


def test_workers_that_dask_kubernetes_may_not_make_are_left_to_it_for_ten_minutes():
    """It repeats what failed once a minute; a number of ours would make it begin anew."""
    world = computing(workers=2)
    world.remove("Deployment", "worker")
    (group,) = world.find("DaskWorkerGroup")
    kept_by_kopf(group, "daskworkergroup_create", QUOTA)
    for _ in range(60):
        assert not world.step(10).actions
    (lower,) = world.step(10).actions
    assert lower.patch == {"spec": {"worker": {"replicas": 0}}}


def test_parts_that_dask_kubernetes_may_not_make_are_left_to_it_for_ten_minutes():
    world = computing()
    world.remove("Service")
    (cluster,) = world.find("DaskCluster")
    cluster["status"] = {"phase": "Created"}
    kept_by_kopf(cluster, "daskcluster_create_components/status.phase", QUOTA)
    for _ in range(60):
        assert not world.step(10).actions
    (action,) = world.step(10).actions
    assert action.patch == {"status": {"phase": "Pending"}}


def test_workers_that_dask_kubernetes_may_not_make_can_be_given_up():
    world = computing(workers=2)
    world.change(workers={"replicas": 5})
    world.step(1)
    group_follows(world)
    (group,) = world.find("DaskWorkerGroup")
    kept_by_kopf(group, "daskworkergroup_replica_update/spec.worker.replicas", QUOTA)
    world.change(workers={"replicas": 2})
    taken = [action for _ in range(9) for action in world.step(10).actions]
    assert [action.patch for action in taken] == [{"spec": {"worker": {"replicas": 2}}}]


def test_a_cluster_without_worker_group_is_created_again_by_its_phase():
    world = computing(workers=2)
    world.remove("DaskWorkerGroup")
    world.remove("Deployment", "worker")
    assert not world.step(1).actions
    (action,) = world.step(10).actions
    assert isinstance(action, Patch)
    assert (action.kind, action.patch) == ("DaskCluster", {"status": {"phase": "Created"}})


def test_a_deleted_scheduler_service_or_deployment_is_made_again_by_the_phase():
    for kind in ("Service", "Deployment"):
        world = computing()
        world.remove(kind, f"{base(1)}-scheduler")
        world.step(1)
        (action,) = world.step(10).actions
        assert action.patch == {"status": {"phase": "Created"}}


def test_healing_is_not_repeated_hot():
    world = computing()
    world.remove("Service")
    world.step(1)
    assert world.step(10).actions
    for _ in range(70):
        assert not world.step(1).actions, "in this phase dask-kubernetes tries again by itself"
    (action,) = world.step(10).actions
    assert action.patch == {"status": {"phase": "Pending"}}
    (action,) = world.step(10).actions
    assert action.patch == {"status": {"phase": "Created"}}


def test_a_young_cluster_is_left_alone():
    world = started()
    world.report = progress(1, workersNeeded=True)
    world.step(1)
    (cluster,) = world.find("DaskCluster")
    cluster["status"] = {"phase": "Created"}
    world.step(9)
    assert "clusterIncompleteSince" not in world.status
    world.step(1)
    assert "clusterIncompleteSince" in world.status


def test_a_cluster_that_nobody_took_up_cannot_be_healed():
    world = started()
    world.report = progress(1, workersNeeded=True)
    world.step(1)
    for _ in range(50):
        assert not world.step(5).actions
    assert world.condition("ClusterReady") == "False DaskOperatorMissing"


def test_a_worker_that_died_is_dask_kubernetes_own_affair():
    world = computing(workers=2)
    world.remove("Pod", worker_name(1, 1))
    assert not world.step(1).actions
    assert world.condition("ClusterReady") == "True SomeWorkersReady"
    world.add(pod(1, "worker", worker_name(1, 1)))
    world.step(10)
    assert world.status["workers"]["display"] == "2/2"


def test_a_number_that_nobody_acts_upon_is_not_changed_back_and_forth():
    world = computing(workers=2)
    world.change(workers={"replicas": 4})
    assert world.step(1).actions
    for _ in range(30):
        assert not world.step(10).actions, "dask-kubernetes is away"


SILENCE = "the scheduler did not say whom to retire: http://10.0.0.1:8787: expected status 200, got 404"


def test_workers_that_the_scheduler_does_not_retire_are_told_of_once_and_asked_for_seldom():
    world = computing(workers=3)
    world.change(workers={"replicas": 1})
    assert isinstance(world.step(1).actions[0], RetireWorkers)
    world.more["unretired"] = SILENCE
    asked = sum(len(world.step(1).actions) for _ in range(60))
    assert 5 <= asked <= 6, "every ten seconds"
    assert world.condition("ClusterReady") == "True ScaleDownBlocked"
    assert world.message("ClusterReady").startswith(f"workers: 1 wanted, 3 there; {SILENCE}; ")
    assert world.condition("Ready") == "True Running", "the job goes on"
    assert world.events.count("ScaleDownBlocked") == 1


def test_a_new_leader_does_not_tell_again_that_workers_are_not_retired():
    world = computing(workers=2)
    world.change(workers={"replicas": 1})
    world.step(1)
    world.more["unretired"] = SILENCE
    world.step(1)
    world.more["unretired"] = ""
    world.step(1)
    assert world.condition("ClusterReady") == "True ScaleDownBlocked"
    assert SILENCE in world.message("ClusterReady")
    assert world.events.count("ScaleDownBlocked") == 1


def test_workers_that_are_gone_or_wanted_again_block_nothing():
    for mend in ("gone", "wanted"):
        world = computing(workers=2)
        world.change(workers={"replicas": 1})
        world.step(1)
        world.more["unretired"] = SILENCE
        world.step(1)
        if mend == "gone":
            world.remove("Deployment", worker_name(1, 1))
        else:
            world.change(workers={"replicas": 2})
        world.step(1)
        assert world.condition("ClusterReady") == "True ClusterReady", mend
