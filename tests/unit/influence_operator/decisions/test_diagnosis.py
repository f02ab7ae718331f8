"""`ClusterReady` names what is missing, in the words of whoever said so, without failing the job."""

from __future__ import annotations

import pytest

from operator_objects import (
    NOW,
    World,
    base,
    child,
    computing,
    kept_by_kopf,
    pod,
    progress,
    started,
    unschedulable,
    waiting,
)

SECURITY = (
    'pods "x" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false'
)
QUOTA = 'pods "x" is forbidden: exceeded quota: team, requested: cpu=1, used: cpu=4, limited: cpu=4'
NO_GPU = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: 0/1 nodes are available"


def seen(world: World, seconds: float = 6.0) -> tuple[str, str]:
    world.step(seconds)
    assert world.condition("Failed") == ""
    return world.condition("ClusterReady"), world.message("ClusterReady")


def event(kind: str, name: str, reason: str, message: str) -> dict:
    return {"involvedObject": {"kind": kind, "name": name}, "reason": reason, "message": message}


def without(world: World, *gone: str) -> World:
    """The world without objects of a kind, or those of them whose name holds the second word."""
    for each in gone:
        world.remove(*each.split())
    return world


PODS = [
    ("ImagePullFailed", waiting("main", "ErrImagePull", 'failed to pull "nope:1": not found'), "nope:1"),
    ("ImagePullFailed", waiting("main", "ImagePullBackOff", 'Back-off pulling image "nope:1"'), "nope:1"),
    ("ImagePullFailed", waiting("main", "InvalidImageName", "couldn't parse image"), "parse"),
    ("Unschedulable", unschedulable(NO_GPU, NOW), "Insufficient nvidia.com/gpu"),
    ("MissingReference", unschedulable('0/1 nodes: persistentvolumeclaim "data" not found', NOW), "data"),
    ("MissingReference", waiting("main", "CreateContainerConfigError", 'secret "keys" not found'), "keys"),
    (
        "MissingReference",
        waiting("main", "CreateContainerConfigError", "couldn't find key a in Secret x"),
        "a",
    ),
    (
        "ContainerFailed",
        waiting("main", "CreateContainerError", "executable file not found in $PATH"),
        "PATH",
    ),
]


@pytest.mark.parametrize(("reason", "status", "word"), PODS)
@pytest.mark.parametrize("role", ["driver", "scheduler", "worker"])
def test_a_pod_that_cannot_run_is_named_with_the_kubelets_words(role: str, reason: str, status, word: str):
    world = computing(workers=1)
    (there,) = world.find("Pod", role)
    world.add(pod(1, role, name=there["metadata"]["name"], **status))
    condition, message = seen(world)
    assert condition == f"False {reason}"
    assert word in message
    assert f"{role} pod {there['metadata']['name']}" in message
    assert reason in world.events


def test_a_pod_may_be_unschedulable_for_a_moment():
    world = computing(workers=1)
    (there,) = world.find("Pod", "worker")
    world.add(pod(1, "worker", name=there["metadata"]["name"], **unschedulable(NO_GPU, world.now)))
    assert seen(world, 2)[0] == "False WorkersStarting"
    assert seen(world, 4)[0] == "False Unschedulable"


def test_one_worker_that_cannot_run_is_told_while_the_others_compute():
    world = computing(workers=2)
    there = world.find("Pod", "worker")[1]["metadata"]["name"]
    world.add(pod(1, "worker", name=there, **unschedulable(NO_GPU, NOW)))
    condition, message = seen(world)
    assert condition == "True SomeWorkersReady"
    assert "Insufficient nvidia.com/gpu" in message


def test_a_crashing_worker_tells_its_exit_code():
    world = computing(workers=1)
    (there,) = world.find("Pod", "worker")
    crashing = waiting("worker", "CrashLoopBackOff", "back-off 10s restarting failed container")
    last = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    crashing["containerStatuses"][0]["lastState"] = last
    world.add(pod(1, "worker", name=there["metadata"]["name"], **crashing))
    condition, message = seen(world)
    assert condition == "False ContainerFailed"
    assert "exit code 137 (OOMKilled)" in message


REFUSALS = [
    ("QuotaExceeded", QUOTA),
    ("PodSecurityRefused", SECURITY),
    ("MissingReference", 'error looking up service account team/x: serviceaccount "x" not found'),
    ("MissingReference", "no PriorityClass with name urgent was found"),
    ("Refused", 'admission webhook "policy.example" denied the request: no'),
]


@pytest.mark.parametrize(("reason", "message"), REFUSALS)
def test_what_the_api_server_refuses_is_told_in_its_words(reason: str, message: str):
    by_itself = World()
    by_itself.step()
    by_itself.more = {"refusals": (f"Job x: {message}",)}
    assert seen(by_itself) == (f"False {reason}", f"refused: Job x: {message}")

    through_the_job = World()
    through_the_job.step()
    through_the_job.more = {"warnings": (event("Job", base(1), "FailedCreate", message),)}
    assert seen(through_the_job) == (f"False {reason}", f"driver: {message}")

    through_a_deployment = computing(workers=1)
    through_a_deployment.remove("Pod", "worker")
    (made,) = through_a_deployment.find("Deployment", "worker")
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    made["status"] = {"conditions": [failure]}
    condition, words = seen(through_a_deployment)
    assert condition == f"False {reason}"
    assert words.endswith(message)


INVALID = (
    'Deployment.apps "x" is invalid: spec.template.spec.containers[0].volumeMounts[0].name: Not found: "a"'
)


@pytest.mark.parametrize(("reason", "message"), [*REFUSALS, ("Refused", INVALID)])
def test_what_the_api_server_refuses_dask_kubernetes_is_told_in_its_words(reason: str, message: str):
    told = (f"False {reason}", f"dask-kubernetes: {message}")

    the_scheduler = without(
        computing(), "Deployment", "Service", "DaskWorkerGroup", "Pod scheduler", "Pod worker"
    )
    (cluster,) = the_scheduler.find("DaskCluster")
    cluster["status"] = {"phase": "Created"}
    kept_by_kopf(cluster, "daskcluster_create_components/status.phase", message)
    assert seen(the_scheduler) == told
    assert the_scheduler.condition("Ready") == "True Running"

    the_workers = without(computing(), "Deployment worker", "Pod worker")
    (group,) = the_workers.find("DaskWorkerGroup")
    kept_by_kopf(group, "daskworkergroup_create", message)
    assert seen(the_workers) == told

    one_of_them = without(computing(), "Deployment worker-0001", "Pod worker-0001")
    (group,) = one_of_them.find("DaskWorkerGroup")
    kept_by_kopf(group, "daskworkergroup_replica_update/spec.worker.replicas", message)
    assert seen(one_of_them) == ("True SomeWorkersReady", f"dask-kubernetes: {message}")


def test_what_dask_kubernetes_failed_at_before_is_old_news_once_everything_is_there():
    world = computing()
    (cluster,) = world.find("DaskCluster")
    kept_by_kopf(cluster, "daskcluster_create_components/status.phase", QUOTA)
    assert seen(world) == ("True ClusterReady", "driver, scheduler and workers run")


@pytest.mark.parametrize(
    "state",
    [
        '{"started":"2026-03-01T12:00:00.000000Z","retries":0,"success":false,"failure":false}',
        '{"message":"Added maximum number of workers for this batch but still need to create more workers"}',
        '{"message":7}',
        "[" * 100_000,
        "no JSON",
        None,
    ],
)
def test_what_dask_kubernetes_has_yet_to_do_is_no_problem(state: str | None):
    world = without(computing(), "Deployment worker", "Pod worker")
    (group,) = world.find("DaskWorkerGroup")
    group["metadata"]["annotations"] = {"kopf.zalando.org/daskworkergroup_create": state}
    assert seen(world)[0] == "False WorkersStarting"


def test_a_volume_that_cannot_be_mounted_is_known_from_events_alone():
    world = World()
    world.step()
    world.add(pod(1, "driver", **waiting("driver", "ContainerCreating")))
    told = 'MountVolume.SetUp failed for volume "keys" : secret "keys" not found'
    world.more = {"warnings": (event("Pod", f"{base(1)}-driver", "FailedMount", told),)}
    assert seen(world) == ("False MissingReference", f"driver pod {base(1)}-driver: {told}")


def test_an_event_about_a_pod_that_runs_by_now_is_old_news():
    world = started()
    world.more = {"warnings": (event("Pod", f"{base(1)}-driver", "FailedMount", "timed out"),)}
    assert seen(world)[0] == "False Preflight"


def test_events_about_a_child_of_another_attempt_are_not_ours():
    world = World()
    world.step()
    world.more = {"warnings": (event("Job", base(2), "FailedCreate", QUOTA),)}
    assert seen(world)[0] == "False DriverStarting"


def test_an_api_server_without_daskclusters_is_told_once_workers_are_needed():
    world = started()
    world.more = {"dask_operator": False}
    assert seen(world)[0] == "False Preflight"
    world.report = progress(1, workersNeeded=True)
    decision = world.step(1)
    assert not decision.actions
    assert world.condition("ClusterReady") == "False DaskOperatorMissing"
    world.more = {}
    assert [a.manifest["kind"] for a in world.step(10).actions] == ["DaskCluster"]


def test_two_kubelet_messages_in_turn_are_one_condition_and_no_stream_of_writes():
    world = World()
    world.step()
    name = f"{base(1)}-driver"
    first = waiting("driver", "ErrImagePull", "rpc error: manifest unknown")
    second = waiting("driver", "ImagePullBackOff", 'Back-off pulling image "nope"')
    world.add(pod(1, "driver", name=name, **first))
    world.step(1)
    for _ in range(3):
        for status in (second, first):
            world.add(pod(1, "driver", name=name, **status))
            before = world.status
            assert world.step(20).status == before
    assert "manifest unknown" in world.message("ClusterReady")
    assert world.events.count("ImagePullFailed") == 1


def test_the_driver_is_told_of_before_the_workers():
    world = computing(workers=1)
    (worker,) = world.find("Pod", "worker")
    world.add(pod(1, "worker", name=worker["metadata"]["name"], **unschedulable(NO_GPU, NOW)))
    world.add(pod(1, "driver", **waiting("driver", "ErrImagePull", "gone")))
    assert seen(world)[0] == "False ImagePullFailed"


def test_leftovers_of_an_earlier_attempt_are_no_diagnosis():
    world = started()
    world.add(child("Pod", "old", 7, "x", "worker", status=waiting("worker", "ErrImagePull", "old")))
    world.objects[-1]["metadata"]["labels"]["influence-operator.dev/attempt"] = "0"
    assert seen(world)[0] == "False Preflight"


SILENT = "http://10.0.0.1:8080/progress: no whole answer within 2 s"


@pytest.mark.parametrize("there", [started, computing])
def test_a_ready_driver_whose_progress_cannot_be_read_is_told_of_after_some_seconds(there):
    world = there()
    world.step(1)
    before = world.condition("ClusterReady"), world.condition("Ready"), world.status["phase"]
    world.unreadable(SILENT)
    world.step(19)
    assert (world.condition("ClusterReady"), world.condition("Ready"), world.status["phase"]) == before
    world.step(1)
    assert world.condition("ClusterReady") == "False DriverUnreachable"
    assert world.message("ClusterReady") == f"the operator cannot read /progress: {SILENT}"
    assert (world.condition("Ready"), world.status["phase"]) == before[1:]
    world.step(3)
    assert world.events.count("DriverUnreachable") == 1
    world.problem = ""
    world.step(3)
    assert world.condition("ClusterReady") == before[0]


def test_a_driver_that_is_not_ready_may_stay_silent():
    world = started()
    world.unreadable(SILENT)
    (driver,) = world.find("Pod", "driver")
    driver["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    assert seen(world, 100)[0] == "False DriverStarting"


def test_whatever_an_unreadable_driver_answers_is_one_condition_and_no_stream_of_writes():
    world = started()
    world.unreadable(SILENT)
    world.step(20)
    for answer in ("stage: Input should be 'Preflight'", "expected attempt 1, got attempt 7", SILENT):
        world.problem = answer
        before = world.status
        assert world.step(20).status == before
    assert world.events.count("DriverUnreachable") == 1


def test_a_new_leader_goes_on_telling_of_a_driver_that_cannot_be_read():
    world = computing()
    world.unreadable(SILENT)
    world.step(20)
    world.unreadable(SILENT)
    world.looked = None
    assert seen(world, 1)[0] == "False DriverUnreachable"
