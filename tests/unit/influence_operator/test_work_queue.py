"""The queue of jobs that are due, by a clock that the tests move."""

import asyncio

import pytest

from influence_operator.work_queue import EVENT_BACKOFF, LAST_BACKOFF, SPACING, WorkQueue


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue[str]:
    return WorkQueue(clock)


def taken(queue: WorkQueue[str]) -> list[str]:
    """Everything that is due now."""
    keys = []
    while (key := queue.take_now()) is not None:
        keys.append(key)
    return keys


def test_many_events_of_one_job_become_one_pass(queue):
    for _ in range(5):
        queue.add("a")
    queue.add("b")

    assert taken(queue) == ["a", "b"]


def test_a_job_is_never_given_away_twice_at_a_time(queue, clock):
    queue.add("a")
    assert taken(queue) == ["a"]

    queue.add("a", changed=True)
    clock.now += 60

    assert taken(queue) == []


def test_an_event_during_a_pass_brings_one_more_after_it(queue, clock):
    queue.add("a")
    taken(queue)
    queue.add("a")
    queue.add("a")

    queue.done("a")
    clock.now += SPACING

    assert taken(queue) == ["a"]
    queue.done("a")
    clock.now += SPACING
    assert taken(queue) == []


def test_a_stream_of_events_brings_passes_no_faster_than_the_spacing(queue, clock):
    passes = 0
    for _ in range(100):  # one second in hundredths
        queue.add("a")
        for key in taken(queue):
            passes += 1
            queue.done(key)
        clock.now += 0.01

    assert passes == pytest.approx(1 / SPACING, abs=1)


def test_a_job_asked_for_later_is_due_then_and_not_before(queue, clock):
    queue.add_after("a", 5)
    queue.add_after("a", 30)

    clock.now += 4.9
    assert taken(queue) == []
    clock.now += 0.2
    assert taken(queue) == ["a"]
    queue.done("a")
    clock.now += 60
    assert taken(queue) == []


def test_failures_are_repeated_ever_more_slowly_up_to_a_limit(queue, clock):
    queue.add("a")
    delays = []
    for _ in range(10):
        assert taken(queue) == ["a"]
        delays.append(queue.failed("a"))
        clock.now += delays[-1]

    assert delays == sorted(delays)
    assert delays[:3] == [0.5, 1.0, 2.0]
    assert delays[-1] == LAST_BACKOFF


def test_events_do_not_make_a_failing_job_hot(queue, clock):
    queue.add("a")
    passes = 0
    for _ in range(1200):  # a minute in steps of 50 ms, with an event at each
        queue.add("a")
        for key in taken(queue):
            passes += 1
            queue.failed(key)
        clock.now += 0.05

    assert passes <= 60 / EVENT_BACKOFF + 5


def test_a_change_by_the_user_ends_the_wait_after_a_failure(queue, clock):
    queue.add("a")
    for _ in range(8):
        taken(queue)
        clock.now += queue.failed("a")
    taken(queue)
    queue.failed("a")

    queue.add("a", changed=True)

    assert taken(queue) == ["a"]
    assert queue.failed("a") == 0.5


def test_success_forgets_the_failures_before_it(queue, clock):
    queue.add("a")
    taken(queue)
    clock.now += queue.failed("a")
    taken(queue)
    queue.done("a")
    clock.now += 1
    queue.add("a")
    taken(queue)

    assert queue.failed("a") == 0.5


def test_depth_and_age_tell_how_far_behind_the_passes_are(queue, clock):
    queue.add("a")
    clock.now += 3
    queue.add("b")

    assert queue.depth() == 2
    assert queue.oldest() == 3.0


def test_a_waiting_taker_wakes_for_what_is_added(clock):
    async def wait_for_one() -> str:
        queue: WorkQueue[str] = WorkQueue(asyncio.get_running_loop().time)
        taking = asyncio.create_task(queue.take())
        await asyncio.sleep(0.01)
        queue.add_after("later", 0.02)
        return await asyncio.wait_for(taking, 5)

    assert asyncio.run(wait_for_one()) == "later"
