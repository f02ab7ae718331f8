"""A change that waits for the next attempt is told of in `Ready`, field by field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from operator_objects import (
    SETTINGS,
    World,
    computing,
    driver_ends,
    influence_job,
    pod,
    pods_end,
    problem,
    progress,
    started,
    words,
)

IMAGE = "; the change of image takes effect with the next attempt"


def test_a_changed_image_waits_for_the_next_attempt_and_says_so_until_it_comes():
    world = computing()
    assert world.message("Ready") == "attempt 1 runs"
    world.change(image="other:1")
    world.step(1)
    assert world.message("Ready") == f"attempt 1 runs{IMAGE}"
    world.step(60)
    assert world.message("Ready") == f"attempt 1 runs{IMAGE}"
    driver_ends(world, 75, words(recorded=5))
    world.step(1)
    assert "takes effect" not in world.message("Ready")
    pods_end(world)
    world.step(20)
    world.add(pod(2, "driver"))
    world.report = progress(2, workersNeeded=True)
    world.step(1)
    assert world.message("Ready") == "attempt 2 runs"


def test_a_change_that_is_taken_back_waits_no_more():
    world = computing()
    world.change(image="other:1")
    world.step(1)
    world.change(image=SETTINGS.defaults.image)
    world.step(1)
    assert world.message("Ready") == "attempt 1 runs"


MEMORY = {"resources": {"limits": {"memory": "8Gi"}}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"driver": MEMORY}, "the change of driver takes effect"),
        ({"podDefaults": {"labels": {"a": "b"}}}, "the change of podDefaults takes effect"),
        ({"workers": {"replicas": 2} | MEMORY}, "the change of workers takes effect"),
        ({"image": "a:1", "scheduler": MEMORY}, "the changes of image and scheduler take effect"),
        (
            {"image": "a:1", "driver": MEMORY, "workers": {"replicas": 2} | MEMORY},
            "the changes of image, driver and workers take effect",
        ),
    ],
)
def test_each_changed_field_is_named(change: dict[str, Any], told: str):
    world = computing(workers=2)
    world.change(**change)
    world.step(1)
    assert world.message("Ready") == f"attempt 1 runs; {told} with the next attempt"


@pytest.mark.parametrize(
    "change", [{"workers": {"replicas": 3}}, {"backoffLimit": 7}, {"cleanupPolicy": "All"}]
)
def test_what_takes_effect_at_once_does_not_wait(change: dict[str, Any]):
    world = computing(workers=2)
    world.change(**change)
    world.step(1)
    assert world.message("Ready") == "attempt 1 runs"


def test_a_change_during_the_preflight_waits_too():
    world = started()
    world.change(image="other:1")
    world.step(1)
    assert world.condition("Ready") == "False Starting"
    assert world.message("Ready").endswith(IMAGE)


def test_a_new_default_image_of_the_operator_waits_as_a_changed_one_does():
    world = computing()
    world.settings = replace(SETTINGS, defaults=replace(SETTINGS.defaults, image="registry.example/worker:2"))
    world.step(60)
    assert world.message("Ready") == f"attempt 1 runs{IMAGE}"


def test_before_an_attempt_has_its_copy_nothing_waits():
    world = World(influence_job(image="other:1"))
    world.step()
    assert "takes effect" not in world.message("Ready")


@pytest.mark.parametrize("policy", ["Workers", "All"])
@pytest.mark.parametrize(
    "change",
    [{"ttlSecondsAfterFinished": 600}, {"cleanupPolicy": "None"}, {"workers": {"replicas": 9}}],
    ids=lambda change: next(iter(change)),
)
def test_what_becomes_of_a_failed_job_is_no_reason_to_try_it_again(change: dict[str, Any], policy: str):
    world = failed(cleanupPolicy=policy)
    world.change(**change)
    world.step(1)
    world.step(1)
    assert (world.attempt, world.condition("Failed")) == (1, "True InvalidTask")
    world.change(image="registry.example/worker:2")
    world.step(1)  # what is left of the first attempt goes
    world.step(1)
    assert (world.attempt, world.condition("Failed")) == (2, "")


@pytest.mark.parametrize(
    "change",
    [{"image": "registry.example/worker:2"}, {"backoffLimit": 9}, {"suspend": True}, {"podDefaults": {}}],
    ids=lambda change: next(iter(change)),
)
def test_any_other_change_of_a_failed_job_opens_it_again(change: dict[str, Any]):
    world = failed(podDefaults={"labels": {"team": "a"}})
    world.change(**change)
    world.step(1)
    assert world.condition("Failed") == ""


@pytest.mark.parametrize(
    "change",
    [{"ttlSecondsAfterFinished": 600}, {"cleanupPolicy": "None"}, {"workers": {"replicas": 9}}],
    ids=lambda change: next(iter(change)),
)
def test_a_job_whose_driver_got_no_pod_is_no_more_tried_again_for_it(change: dict[str, Any]):
    world = World(influence_job(startupDeadlineSeconds=60))
    world.step()
    world.step(60)
    assert world.condition("Failed") == "True StartupDeadlineExceeded"
    world.change(**change)
    world.step(1)
    world.step(1)
    assert (world.attempt, world.condition("Failed")) == (1, "True StartupDeadlineExceeded")
    world.change(startupDeadlineSeconds=600)
    world.step(1)
    world.step(1)
    assert (world.attempt, world.condition("Failed")) == (2, "")


def test_a_failed_job_without_its_copy_of_the_spec_is_tried_again_after_any_change():
    world = failed()
    world.remove("ConfigMap")
    world.change(ttlSecondsAfterFinished=600)
    world.step(1)
    world.step(1)
    assert world.attempt == 2


def test_a_failure_that_no_retry_mends_is_not_the_end_where_a_change_waits():
    world = computing()
    world.change(image="registry.example/worker:2")
    world.step(1)
    driver_ends(world, 64, words(lastError=problem("InvalidTask", "no such function")))
    world.step(5)
    pods_end(world)
    world.step(60)
    assert (world.attempt, world.condition("Failed")) == (2, "")
    assert world.status["attempts"]["lastReason"] == "InvalidTask"
    world.add(pod(2, "driver"))
    world.step(1)
    driver_ends(world, 64, words(attempt=2, lastError=problem("InvalidTask", "no such function")))
    world.step(1)
    assert world.condition("Failed") == "True InvalidTask"


def failed(**spec: Any) -> World:
    """A job whose first attempt found its task wrong."""
    world = computing(**spec)
    driver_ends(world, 64, words(lastError=problem("InvalidTask", "no such function")))
    world.step(1)
    pods_end(world)
    world.step(1)
    assert world.condition("Failed") == "True InvalidTask"
    return world
