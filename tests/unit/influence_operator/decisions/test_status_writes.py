"""Transitions are written at once, progress when the whole percent changed or after 30 s, never within 5."""

from __future__ import annotations

from operator_objects import World, computing, pod, progress, worker_name


def compute(world: World, done: int, **more) -> None:
    fields = {"workersNeeded": True, "stage": "Scores", "recorded": done, "rate": 2.0} | more
    world.report = progress(1, regions={"done": done, "total": 1000}, **fields)


def at_ten_percent() -> World:
    world = computing()
    compute(world, 100)
    world.step(60)
    assert world.status["progress"]["percent"] == 10
    return world


def test_a_new_percent_is_written_after_five_seconds():
    world = at_ten_percent()
    compute(world, 110)
    assert world.step(4).status["progress"]["percent"] == 10
    decision = world.step(1)
    assert decision.status["progress"]["percent"] == 11
    assert not decision.urgent


def test_less_than_a_percent_is_written_after_thirty_seconds():
    world = at_ten_percent()
    compute(world, 101)
    assert world.step(29).status["progress"]["done"] == 100
    assert world.step(1).status["progress"]["done"] == 101


def test_nothing_new_is_never_written():
    world = at_ten_percent()
    before = world.status
    assert world.step(10_00).status == before


def test_a_new_stage_is_written_at_once():
    world = at_ten_percent()
    compute(world, 0, stage="Verifying")
    decision = world.step(1)
    assert decision.urgent
    assert decision.status["stage"] == "Verifying"
    assert decision.status["progress"]["done"] == 0


def test_the_first_recorded_region_is_written_at_once_for_it_decides_what_counts():
    world = computing()
    world.job["status"]["attempts"]["recorded"] = 0
    assert world.step(1).urgent
    assert not world.step(1).urgent


def test_a_worker_that_comes_is_progress():
    world = at_ten_percent()
    world.remove("Pod", worker_name(1, 1))
    world.step(4)
    world.add(pod(1, "worker", worker_name(1, 1)))
    compute(world, 101)
    assert world.step(5).status["workers"]["display"] == "2/2"


def test_what_the_table_shows_is_ready_to_be_read():
    world = computing()
    compute(world, 37, etaSeconds=39.4)
    world.step(60)
    shown = world.status["progress"]
    assert (shown["display"], shown["eta"], shown["etaSeconds"]) == ("37/1000", "39s", 39)
    compute(world, 50, etaSeconds=7300.0)
    world.step(60)
    assert world.status["progress"]["eta"] == "2h"


def test_the_scale_subresource_finds_the_workers():
    selector = computing().status["workers"]["selector"]
    assert selector.endswith(",influence-operator.dev/role=worker")
    assert selector.startswith("influence-operator.dev/job-uid=")
