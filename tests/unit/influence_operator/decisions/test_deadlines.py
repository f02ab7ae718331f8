"""Three deadlines; none of them runs while a job is suspended."""

from __future__ import annotations

import pytest

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


def compute(world: World, done: int) -> None:
    world.report = progress(
        world.attempt,
        workersNeeded=True,
        stage="Scores",
        regions={"done": done, "total": 100_000},
        recorded=done,
    )


def test_active_deadline_fails_the_job_however_well_it_runs():
    world = computing(activeDeadlineSeconds=100)
    world.step(88)
    assert world.condition("Failed") == ""
    assert world.decide().again_after == 1
    world.step(1)
    assert world.condition("Failed") == "True DeadlineExceeded"
    assert world.condition("Stalled") == "True DeadlineExceeded"


def test_active_deadline_sums_attempts_and_resumes_without_the_time_between():
    world = computing(activeDeadlineSeconds=100)
    world.step(39)
    driver_ends(world, 75, words(recorded=1))
    world.step()
    pods_end(world)
    assert world.status["activeSeconds"] == 50
    world.step(1000)
    world.add(pod(2, "driver"))
    world.step(20)
    world.change(suspend=True)
    world.step()
    pods_end(world)
    world.step(50_000)
    assert world.status["activeSeconds"] == 70
    world.change(suspend=False)
    world.step()
    world.add(pod(3, "driver"))
    world.step(29)
    assert world.condition("Failed") == ""
    world.step(1)
    assert world.condition("Failed") == "True DeadlineExceeded"


def test_an_attempt_that_ended_while_nobody_looked_is_not_charged_for_that_time():
    world = computing(activeDeadlineSeconds=10_000)
    driver_ends(world, 75, words(recorded=1))
    world.step(5_000)
    assert world.status["activeSeconds"] == 11


def test_startup_deadline_fails_a_job_whose_driver_never_came_and_says_what_was_awaited():
    world = World(influence_job(startupDeadlineSeconds=60))
    world.step()
    status = {"containerStatuses": [{"name": "driver", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]}
    world.add(pod(1, "driver", phase="Pending", conditions=[], **status))
    world.step(59)
    assert world.condition("Failed") == ""
    world.step(1)
    assert world.condition("Failed") == "True StartupDeadlineExceeded"
    assert "ImagePullFailed" in world.message("Failed")


def test_startup_deadline_runs_until_the_first_worker_is_ready():
    world = started(startupDeadlineSeconds=60)
    world.report = progress(1, workersNeeded=True)
    world.step(59)
    world.step(1)
    assert world.condition("Failed") == "True StartupDeadlineExceeded"


def test_startup_deadline_stops_when_a_worker_is_ready_and_starts_anew_when_all_are_gone():
    world = computing(startupDeadlineSeconds=60)
    assert "waitingSince" not in world.status
    world.step(1000)
    world.remove("Pod", "worker")
    world.step(1)
    world.step(59)
    assert world.condition("Failed") == ""
    world.step(1)
    assert world.condition("Failed") == "True StartupDeadlineExceeded"


def test_attempts_that_never_had_a_worker_wait_together():
    world = started(startupDeadlineSeconds=100)
    driver_ends(world, 75)
    world.step(60)
    pods_end(world)
    world.step(20)
    assert world.attempt == 2
    world.step(19)
    assert world.condition("Failed") == ""
    world.step(1)
    assert world.condition("Failed") == "True StartupDeadlineExceeded"


def test_suspended_time_is_no_time_of_waiting():
    world = World(influence_job(startupDeadlineSeconds=60))
    world.step()
    world.step(50)
    world.change(suspend=True)
    world.step()
    pods_end(world)
    world.step(50_000)
    world.change(suspend=False)
    world.step()
    world.step(59)
    assert world.condition("Failed") == ""


def test_progress_deadline_is_a_counted_failure():
    world = computing(progressDeadlineSeconds=600)
    world.step(599)
    assert world.status["attempts"]["countedFailures"] == 0
    world.step(1)
    assert world.status["attempts"]["countedFailures"] == 1
    assert world.status["attempts"]["lastReason"] == "ProgressDeadlineExceeded"
    assert world.status["phase"] == "Retrying"


def test_a_single_region_pushes_the_progress_deadline_though_the_percent_stays():
    world = computing(progressDeadlineSeconds=600)
    for done in range(11, 30):
        compute(world, done)
        world.step(590)
    assert world.condition("Failed") == ""
    assert world.status["attempts"]["countedFailures"] == 0


def test_progress_deadline_does_not_run_while_no_worker_is_ready():
    world = computing(progressDeadlineSeconds=600, startupDeadlineSeconds=100_000)
    workers = world.find("Pod", "worker")
    world.remove("Pod", "worker")
    world.step(5_000)
    world.add(*workers)
    world.step(599)
    world.step(599)
    assert world.status["attempts"]["countedFailures"] == 0
    world.step(1)
    assert world.status["attempts"]["countedFailures"] == 1


def test_a_driver_that_does_not_answer_makes_no_progress():
    world = computing(progressDeadlineSeconds=600)
    world.report = None
    world.step(600)
    assert world.status["attempts"]["countedFailures"] == 1


def test_a_deadline_that_passed_while_no_operator_was_there_begins_anew():
    """The driver asked for workers, and nobody made them."""
    world = started(startupDeadlineSeconds=600)
    world.report = progress(1, workersNeeded=True, stage="Preflight")
    world.step(660)
    assert world.condition("Failed") == ""
    assert world.find("DaskCluster")
    assert world.decide().again_after <= 600
    world.step(599)
    assert world.condition("Failed") == ""
    world.step(1)
    assert world.condition("Failed") == "True StartupDeadlineExceeded"


def test_an_attempt_whose_driver_does_not_answer_a_new_operator_at_once_goes_on():
    world = computing(progressDeadlineSeconds=600)
    world.report = None
    world.step(660)
    assert world.attempt == 1
    assert world.status["attempts"].get("ended") is None
    world.step(600)
    assert world.status["attempts"]["lastReason"] == "ProgressDeadlineExceeded"


def test_a_deadline_that_a_driver_meets_which_cannot_be_read_says_so():
    world = started(startupDeadlineSeconds=60)
    world.unreadable("connection refused")
    world.step(59)
    world.step(1)
    assert world.condition("Failed") == "True StartupDeadlineExceeded"
    assert world.message("Failed").endswith("the operator cannot read /progress: connection refused")

    world = computing(progressDeadlineSeconds=600)
    world.unreadable("connection refused")
    world.step(599)
    world.step(1)
    assert world.status["attempts"]["lastReason"] == "ProgressDeadlineExceeded"
    said = world.status["attempts"]["lastMessage"]
    assert said.endswith("the operator cannot read /progress: connection refused")


def waited(seconds: int) -> World:
    """A job that no worker came for, looked at all the time."""
    world = started()
    for _ in range(seconds // 10):
        world.step(10)
    return world


@pytest.mark.parametrize("limit", [300, 960, 1000])
def test_a_startup_deadline_that_is_lowered_below_what_has_passed_is_over(limit: int):
    world = waited(1000)
    world.change(startupDeadlineSeconds=limit)
    world.step(1)
    assert world.condition("Failed") == "True StartupDeadlineExceeded"


def test_a_progress_deadline_that_is_lowered_below_what_has_passed_is_over():
    world = computing()
    for _ in range(100):
        world.step(10)
    world.change(progressDeadlineSeconds=300)
    world.step(1)
    assert world.status["attempts"]["lastReason"] == "ProgressDeadlineExceeded"
    assert world.status["attempts"]["countedFailures"] == 1


@pytest.mark.parametrize("same_process", [True, False])
def test_a_deadline_that_passed_while_no_operator_looked_begins_anew_whatever_was_changed(same_process: bool):
    """The process was away, or could not reach the API server."""
    world = waited(100)
    if not same_process:
        world.looked = None
    world.change(startupDeadlineSeconds=300, workers={"replicas": 5})
    world.step(3000)
    assert world.condition("Failed") == ""
    for _ in range(30):
        world.step(10)
    assert world.condition("Failed") == "True StartupDeadlineExceeded"


def test_a_job_that_stood_with_a_wrong_spec_waits_from_when_it_is_mended():
    """No clock runs while nothing of it can be carried out."""
    source = {"source": {"configMap": {"name": "tasks"}}}
    world = World(
        influence_job(task=source, startupDeadlineSeconds=300), more={"missing": ("ConfigMap tasks",)}
    )
    world.step(10)
    world.change(nonsense=True)
    for _ in range(100):
        world.step(10)
    assert world.condition("Stalled") == "True InvalidSpec"
    del world.job["spec"]["nonsense"]
    world.change()
    world.step(10)
    assert world.condition("Failed") == ""
