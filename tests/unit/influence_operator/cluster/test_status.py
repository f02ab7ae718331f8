"""The rate that all jobs' progress shares."""

import pytest

from influence_operator.cluster.status import Rate


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_more_turns_than_the_rate_over_any_longer_time():
    clock = Clock()
    rate = Rate(10.0, clock)
    taken = 0
    for _ in range(10_000):  # ten seconds
        taken += rate.wait() == 0.0
        clock.now += 0.001

    assert taken == pytest.approx(10 * 10 + 10, abs=1)


def test_whoever_must_wait_is_told_how_long():
    clock = Clock()
    rate = Rate(2.0, clock)
    assert (rate.wait(), rate.wait()) == (0.0, 0.0)

    wait = rate.wait()

    assert wait == pytest.approx(0.5)
    clock.now += wait
    assert rate.wait() == 0.0
