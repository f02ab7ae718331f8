"""The conditions follow kstatus; this is how kstatus reads them."""

from __future__ import annotations

from typing import Any

from operator_objects import (
    World,
    computing,
    driver_ends,
    influence_job,
    pod,
    pods_end,
    progress,
    started,
    words,
)


def kstatus(job: dict[str, Any]) -> str:
    """In the order of sigs.k8s.io/cli-utils: deletion, generation, Reconciling, Stalled, Ready."""
    if "deletionTimestamp" in job["metadata"]:
        return "Terminating"
    if job["status"].get("observedGeneration") != job["metadata"]["generation"]:
        return "InProgress"
    held = {c["type"]: c["status"] for c in job["status"].get("conditions", ())}
    if held.get("Reconciling") == "True":
        return "InProgress"
    if held.get("Stalled") == "True":
        return "Failed"
    return "Current" if held.get("Ready") == "True" else "InProgress"


def test_a_new_job_is_in_progress_until_its_preflight_has_passed():
    world = World()
    assert kstatus(world.job) == "InProgress"
    world.step()
    assert kstatus(world.job) == "InProgress"
    world.add(pod(1, "driver"))
    world.report = progress(1)
    world.step(1)
    assert kstatus(world.job) == "InProgress"
    world.report = progress(1, workersNeeded=True)
    world.step(1)
    assert kstatus(world.job) == "Current"


def test_a_change_that_a_running_job_carries_out_is_current_after_one_pass():
    world = computing()
    world.change(workers={"replicas": 3})
    assert kstatus(world.job) == "InProgress"
    world.step(1)
    assert kstatus(world.job) == "Current"


def test_a_retry_of_the_same_generation_stays_current():
    world = computing()
    driver_ends(world, 1)
    for seconds in (1, 1, 300):
        world.step(seconds)
        pods_end(world)
        assert kstatus(world.job) == "Current"
    assert world.attempt == 2


def test_a_retry_before_any_preflight_passed_stays_in_progress():
    world = started()
    driver_ends(world, 1)
    world.step(1)
    assert kstatus(world.job) == "InProgress"


def test_a_change_between_two_attempts_is_in_progress_until_the_next_preflight_has_passed():
    world = computing()
    driver_ends(world, 1)
    world.step(1)
    pods_end(world)
    world.change(image="other:1")
    world.step(1)
    assert kstatus(world.job) == "InProgress"
    world.step(20)
    world.add(pod(2, "driver"))
    world.report = progress(2, workersNeeded=True)
    world.step(1)
    assert kstatus(world.job) == "Current"


def test_suspending_is_in_progress_until_it_is_current():
    world = computing()
    world.change(suspend=True)
    world.step(1)
    assert kstatus(world.job) == "InProgress"
    pods_end(world)
    world.step(1)
    assert kstatus(world.job) == "Current"
    world.change(suspend=False)
    world.step(1)
    assert kstatus(world.job) == "InProgress"


def test_a_complete_job_is_current_and_a_failed_one_failed():
    world = computing()
    driver_ends(world, 0)
    world.step(1)
    assert kstatus(world.job) == "Current"
    world = computing()
    driver_ends(world, 64)
    world.step(1)
    assert kstatus(world.job) == "Failed"
    world.change(image="other:1")
    assert kstatus(world.job) == "InProgress"
    world.step(1)
    assert kstatus(world.job) == "InProgress"


def test_reconciling_and_stalled_are_absent_unless_true():
    world = World()
    for make in (lambda: None, lambda: world.add(pod(1, "driver"))):
        make()
        world.step(1)
        for condition in world.status["conditions"]:
            assert condition["type"] not in ("Reconciling", "Stalled") or condition["status"] == "True"


def test_a_condition_keeps_its_time_while_its_status_stays():
    world = computing()
    before = {c["type"]: c["lastTransitionTime"] for c in world.status["conditions"]}
    world.remove("Pod", "worker")
    world.step(100)
    after = {c["type"]: c["lastTransitionTime"] for c in world.status["conditions"]}
    assert after["Ready"] == before["Ready"]
    assert after["ClusterReady"] > before["ClusterReady"]
    world.step(100)
    assert {c["type"]: c["lastTransitionTime"] for c in world.status["conditions"]} == after


def test_every_condition_is_of_the_generation_that_was_looked_at():
    world = computing()
    world.change(workers={"replicas": 3})
    world.step(1)
    assert {c["observedGeneration"] for c in world.status["conditions"]} == {2}
    assert world.status["observedGeneration"] == 2


def test_events_tell_of_transitions_only():
    world = computing()
    assert world.events == ["AttemptStarted", "Running", "ClusterReady"]
    for _ in range(20):
        world.step(3)
    assert world.events == ["AttemptStarted", "Running", "ClusterReady"]
    driver_ends(world, 75, words(recorded=5))
    world.step(3)
    world.step(3)
    pods_end(world)
    world.step(30)
    assert world.events[3:] == ["AttemptEnded", "AttemptStarted"]


def test_the_phases_of_a_life():
    world = World(influence_job(suspend=True))
    phases = []

    def look(seconds: float = 1) -> None:
        world.step(seconds)
        if phases[-1:] != [world.status["phase"]]:
            phases.append(world.status["phase"])

    look()
    world.change(suspend=False)
    look()
    world.add(pod(1, "driver"))
    world.report = progress(1, workersNeeded=True, stage="Scores")
    look()
    driver_ends(world, 1)
    look()
    pods_end(world)
    look(60)
    world.add(pod(2, "driver"))
    world.change(suspend=True)
    look()
    pods_end(world)
    look()
    world.change(suspend=False)
    look()
    world.add(pod(3, "driver"))
    driver_ends(world, 0)
    look()
    assert phases == [
        *("Suspended", "Starting", "Running", "Retrying", "Starting"),
        *("Suspending", "Suspended", "Starting", "Complete"),
    ]
