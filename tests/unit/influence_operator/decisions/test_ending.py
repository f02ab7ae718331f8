"""How an attempt's end is read, what it counts, and when the next one starts."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from operator_objects import (
    UID,
    World,
    base,
    computing,
    driver_ends,
    influence_job,
    pod,
    pods_end,
    problem,
    progress,
    stamp,
    started,
    terminated,
    words,
)

RESULT = {"url": "gs://bucket/digits.zarr", "shape": [300, 1400], "dtype": "float32", "bytes": 1680000}


def failed_attempts(world: World) -> int:
    return world.status["attempts"]["countedFailures"]


def retried(world: World, code: int, message: str = "") -> None:
    """The driver ends, everything goes, the delay passes, the next attempt's driver runs."""
    driver_ends(world, code, message)
    world.step(1)
    pods_end(world)
    world.step(301)
    if "outcome" not in world.status and world.status["phase"] not in ("Failed", "Complete"):
        world.add(pod(world.attempt, "driver"))
        world.report = progress(world.attempt)
        world.step(1)


def test_exit_code_0_is_the_result():
    world = computing()
    driver_ends(world, 0, words(stage="Verifying", finished=True, result=RESULT))
    world.step(1)
    assert world.condition("Complete") == "True Complete"
    assert world.condition("Ready") == "True Complete"
    assert world.condition("Stalled") == ""
    assert world.status["result"] == RESULT
    assert world.status["phase"] == "Complete"
    assert world.status["completionTime"] == stamp(world.now)


def test_exit_code_0_counts_though_the_job_controller_has_not_said_so_yet():
    world = computing()
    world.add(pod(1, "driver", **terminated("driver", 0, words(finished=True, result=RESULT))))
    world.step(1)
    assert world.condition("Complete") == "True Complete"


def test_a_result_without_last_words_is_at_least_where_the_spec_says():
    world = computing()
    driver_ends(world, 0, "not json")
    world.step(1)
    assert world.status["result"] == {"url": "gs://bucket/digits.zarr"}


def test_exit_code_64_fails_the_job_at_once_with_the_drivers_reason_and_words():
    world = started()
    said = "task.entrypoint: calling package.module:task raised:\nTraceback ...\nValueError: no such digit"
    driver_ends(world, 64, words(lastError=problem("InvalidTask", said)))
    world.step(1)
    assert world.condition("Failed") == "True InvalidTask"
    assert world.condition("Stalled") == "True InvalidTask"
    assert world.condition("Ready") == "False InvalidTask"
    assert world.message("Failed").endswith("ValueError: no such digit")
    assert world.status["phase"] == "Failed"
    assert "InvalidTask" in world.events


def test_a_gpu_that_torch_does_not_see_is_named_as_the_reason():
    world = computing()
    driver_ends(world, 64, words(lastError=problem("GpuNotVisible", "torch.cuda.is_available() is False")))
    world.step(1)
    assert world.condition("Failed") == "True GpuNotVisible"


def test_the_jobs_own_words_tell_64_when_the_pod_is_gone():
    world = computing()
    (job,) = world.find("Job")
    failed = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "exit code 64"}
    job["status"] = {"conditions": [failed]}
    world.remove("Pod", "driver")
    world.step(1)
    assert world.condition("Failed") == "True PermanentError"


def test_a_reason_that_is_no_word_is_replaced_and_its_message_made_printable():
    world = started()
    driver_ends(world, 64, words(lastError=problem("no reason\x00!", "bad\x1b[31m news\u2028" * 40)))
    world.step(1)
    assert world.condition("Failed") == "True PermanentError"
    assert "\x1b" not in world.message("Failed")


def test_exit_code_75_after_a_recorded_region_does_not_count():
    world = computing()
    driver_ends(world, 75, words(recorded=3, lastError=problem("WorkersLost", "no scheduler for 60 s")))
    world.step(1)
    assert failed_attempts(world) == 0
    assert world.status["attempts"]["counted"] is False
    assert world.status["attempts"]["lastReason"] == "WorkersLost"
    assert world.status["phase"] == "Retrying"


def test_exit_code_75_of_an_attempt_that_recorded_nothing_counts():
    world = started()
    driver_ends(world, 75, words(recorded=0, regions={"done": 50, "total": 100}))
    world.step(1)
    assert failed_attempts(world) == 1


def test_every_other_exit_code_counts_whatever_was_recorded():
    world = computing()
    driver_ends(world, 1, words(recorded=90))
    world.step(1)
    assert failed_attempts(world) == 1


def test_an_exit_code_that_cannot_be_read_any_more_is_taken_for_75():
    world = computing()
    (job,) = world.find("Job")
    job["status"] = {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]}
    world.remove("Pod", "driver")
    world.report = None
    world.step(1)
    assert failed_attempts(world) == 0  # the last status knew of recorded regions
    assert world.status["attempts"]["lastReason"] == "DriverLost"
    assert "lastExitCode" not in world.status["attempts"]


def test_a_driver_job_that_somebody_deleted_ends_the_attempt():
    world = computing()
    world.remove("Job")
    world.remove("Pod", "driver")
    world.report = None
    world.step(1)
    assert world.status["attempts"]["lastReason"] == "DriverLost"
    assert world.status["phase"] == "Retrying"


def test_a_disrupted_pod_that_its_job_replaces_belongs_to_the_same_attempt():
    world = computing()
    disrupted = terminated("driver", 75, words(recorded=5))
    disrupted["conditions"].append({"type": "DisruptionTarget", "status": "True"})
    world.add(pod(1, "driver", **disrupted))
    world.report = None
    world.step(1)
    assert world.attempt == 1
    assert "ended" not in world.status["attempts"]
    world.add(pod(1, "driver", name=f"{base(1)}-second"))
    world.report = progress(1, workersNeeded=True, stage="Scores")
    world.step(1)
    assert world.attempt == 1
    assert world.condition("ClusterReady") == "True ClusterReady"


def test_a_driver_on_a_node_that_does_not_answer_is_lost_a_minute_after_its_grace_period():
    world = computing()
    (driver,) = world.find("Pod", "driver")
    driver["metadata"]["deletionTimestamp"] = stamp(world.now)
    world.report = None
    world.step(59)
    assert "ended" not in world.status["attempts"]
    world.step(1)
    assert world.status["attempts"]["lastReason"] == "DriverLost"
    assert failed_attempts(world) == 0


def test_a_driver_killed_at_its_memory_limit_counts_and_says_so():
    world = computing()
    driver_ends(world, 137, "", reason="OOMKilled")
    world.step(1)
    assert world.status["attempts"]["lastReason"] == "OOMKilled"
    assert failed_attempts(world) == 1


def test_last_words_about_another_job_are_dropped():
    world = started()
    driver_ends(world, 64, words(jobUid="another", lastError=problem("StoreClaimed", "not mine")))
    world.step(1)
    assert world.condition("Failed") == "True PermanentError"


def test_a_pod_of_somebody_else_with_our_labels_ends_nothing():
    world = started()
    world.add(pod(1, "driver", name="fake", owner="mallory", **terminated("driver", 0)))
    world.step(1)
    assert world.condition("Complete") == ""


def test_the_next_attempt_waits_for_its_delay_and_for_the_last_pod():
    world = computing()
    driver_ends(world, 1)
    world.step()
    world.remove("Pod", "driver")
    world.step(10)
    assert world.attempt == 1, "workers are still ending"
    pods_end(world)
    world.step(1)
    assert world.attempt == 2
    assert [job["metadata"]["name"] for job in world.find("Job")] == [base(2)]
    assert world.condition("Ready") == "True Running", "this generation has passed its preflight before"


def test_what_ended_is_deleted_before_the_next_attempt():
    world = computing()
    driver_ends(world, 1)
    decision = world.step()
    assert [(a.kind, a.name) for a in decision.actions] == [("DaskCluster", base(1)), ("Job", base(1))]
    assert decision.status_first
    pods_end(world)
    decision = world.step(1)
    assert [a.kind for a in decision.actions] == ["Secret", *["NetworkPolicy"] * 3, "ConfigMap"]


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 10), (2, 20), (3, 40), (4, 80), (5, 160), (6, 300), (60, 300)]
)
def test_the_delay_doubles_from_10_seconds_to_5_minutes(failures: int, seconds: int):
    world = computing(backoffLimit=1000)
    world.job["status"]["attempts"]["countedFailures"] = failures - 1
    driver_ends(world, 1)
    world.step()
    pods_end(world)
    assert world.decide().again_after == seconds
    world.step(seconds - 1)
    assert world.attempt == 1
    world.step(1)
    assert world.attempt == 2


def test_more_counted_failures_than_backoff_limit_fail_the_job():
    world = started(backoffLimit=2)
    for _ in range(2):
        retried(world, 1, words(attempt=world.attempt, lastError=problem("Internal", "boom")))
    assert world.attempt == 3
    retried(world, 1, words(attempt=3, lastError=problem("Internal", "boom")))
    assert world.condition("Failed") == "True BackoffLimitExceeded"
    assert "Internal: boom" in world.message("Failed")
    assert world.attempt == 3


def test_lost_infrastructure_never_uses_up_the_limit_while_regions_are_recorded():
    world = started(backoffLimit=0)
    for number in range(1, 6):
        retried(world, 75, words(attempt=number, recorded=1))
    assert world.attempt == 6
    assert world.condition("Failed") == ""


def test_changing_a_failed_job_starts_the_next_attempt_and_forgives_its_failures():
    world = started(backoffLimit=0)
    driver_ends(world, 1)
    world.step(1)
    assert world.condition("Failed") == "True BackoffLimitExceeded"
    world.change(image="registry.example/worker:2")
    world.step(1)
    assert world.condition("Failed") == ""
    assert world.condition("Stalled") == ""
    assert world.condition("Reconciling") == "True Starting"
    pods_end(world)
    world.step(1)
    assert world.attempt == 2
    assert failed_attempts(world) == 0
    assert "completionTime" not in world.status


def test_a_failed_job_that_nobody_changed_stays_failed():
    world = started()
    driver_ends(world, 64)
    world.step(1)
    before = world.status
    world.step(1)
    pods_end(world)
    world.step(100_000)
    assert world.status == before


def test_a_complete_job_stays_complete_whatever_is_changed():
    world = computing()
    driver_ends(world, 0)
    world.step(1)
    pods_end(world)
    world.change(image="registry.example/worker:2", suspend=True)
    world.step(1)
    assert world.condition("Complete") == "True Complete"
    assert world.condition("Suspended") == ""
    assert world.status["observedGeneration"] == 2
    assert world.attempt == 1


def test_another_contract_version_stalls_the_job_until_its_image_is_changed():
    world = started()
    world.report = progress(1, contractVersion=9, workersNeeded=True)
    decision = world.step(1)
    assert not decision.actions
    assert world.condition("Stalled") == "True ImageIncompatible"
    assert "contract version 9" in world.message("Stalled")
    world.report = None
    world.step(1)
    assert world.condition("Stalled") == "True ImageIncompatible", "it still speaks as it did"
    world.change(image="registry.example/worker:2")
    world.step(1)
    assert world.condition("Stalled") == ""
    pods_end(world)
    world.step(1)
    assert world.attempt == 2


def test_the_contract_before_ours_is_understood():
    world = started()
    world.report = progress(1, contractVersion=0, workersNeeded=True)
    world.step(1)
    assert world.condition("Stalled") == ""
    assert world.find("DaskCluster")


def test_the_same_job_created_anew_has_names_of_its_own():
    first, second = World(), World(influence_job())
    second.job["metadata"]["uid"] = UID.replace("0a1b2", "f00d5")
    names = [
        {action.manifest["metadata"]["name"] for action in world.decide().actions}
        for world in (first, second)
    ]
    assert not names[0] & names[1]


@pytest.mark.parametrize("more", [{}, {"stage": "Dancing", "regions": "many"}], ids=["known", "unknown"])
def test_last_words_of_another_contract_tell_that_the_image_is_incompatible(more: dict):
    world = started()
    said = {"contractVersion": 3, "jobUid": UID, "attempt": 1, "lastError": problem("Elsewhere", "unknown")}
    driver_ends(world, 64, json.dumps(said | more))
    world.step(1)
    assert world.condition("Failed") == "True ImageIncompatible"
    assert world.message("Failed") == (
        "the driver's image speaks contract version 3, expected 1 or 0; "
        "set image to one of this operator's release"
    )
    world.change(image="registry.example/worker:2")
    world.step(1)
    pods_end(world)
    world.step(1)
    assert world.attempt == 2
    assert world.condition("Stalled") == ""


EVICTED = {"reason": "Evicted", "message": 'Usage of EmptyDir volume "home" exceeds the limit "10Gi". '}
FULL = {"reason": "OutOfcpu", "message": "Pod was rejected: Node didn't have enough resource: cpu"}


def driver_job_fails(world: World, **status: Any) -> None:
    """The driver's pod ends, and the Job's controller says no more than that."""
    world.add(pod(world.attempt, "driver", **status))
    world.report = None
    failed = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "the limit"}
    world.find("Job")[0]["status"] = {"conditions": [failed]}
    world.step(1)


def test_why_the_kubelet_ended_a_drivers_pod_is_told_before_our_own_words():
    world = computing()
    driver_job_fails(world, **terminated("driver", 137, "", world.now) | EVICTED)
    assert world.status["attempts"]["lastReason"] == "DriverFailed"
    assert world.status["attempts"]["lastMessage"] == (
        'Evicted: Usage of EmptyDir volume "home" exceeds the limit "10Gi"; '
        "the driver ended with exit code 137"
    )
    assert failed_attempts(world) == 1

    world = computing()
    stopped = words(recorded=3, lastError=problem("Terminated", "stopped on purpose"))
    driver_job_fails(world, **terminated("driver", 75, stopped, world.now) | EVICTED)
    assert world.status["attempts"]["lastReason"] == "Terminated"
    assert world.status["attempts"]["lastMessage"].startswith("Evicted: Usage of EmptyDir")
    assert world.status["attempts"]["lastMessage"].endswith("; stopped on purpose")


def test_a_driver_that_its_kubelet_did_not_take_does_not_count():
    world = started()
    driver_job_fails(world, phase="Failed", conditions=[], containerStatuses=[], **FULL)
    assert world.status["attempts"]["lastReason"] == "DriverLost"
    assert world.status["attempts"]["lastMessage"] == (
        "OutOfcpu: Pod was rejected: Node didn't have enough resource: cpu; "
        "no container of the driver's pod ran"
    )
    assert failed_attempts(world) == 0
    assert world.status["phase"] == "Retrying"


def test_a_driver_whose_pod_began_and_was_ended_without_an_exit_code_counts_and_says_why():
    world = started()
    states = {
        "initContainerStatuses": [{"name": "mesh", "state": {"terminated": {"exitCode": 0}}}],
        "containerStatuses": [{"name": "driver", "state": {"waiting": {"reason": "PodInitializing"}}}],
    }
    driver_job_fails(world, phase="Failed", conditions=[], **states, **EVICTED)
    assert world.status["attempts"]["lastReason"] == "DriverLost"
    assert world.status["attempts"]["lastMessage"].startswith("Evicted: Usage of EmptyDir")
    assert failed_attempts(world) == 1


def test_of_two_pods_the_last_one_tells_how_the_attempt_ended():
    """The first one was disrupted and replaced; a full node did not take the second."""
    world = computing()
    world.add(pod(1, "driver", **terminated("driver", 137, "", world.now)))
    world.now += timedelta(seconds=5)
    second = pod(1, "driver", f"{base(1)}-second", phase="Failed", containerStatuses=[], **FULL)
    second["metadata"]["creationTimestamp"] = stamp(world.now)
    world.add(second)
    driver_job_fails(world, **terminated("driver", 137, "", world.now - timedelta(seconds=5)))
    assert world.status["attempts"]["lastMessage"].startswith("OutOfcpu: ")
    assert failed_attempts(world) == 0
