"""The progress document: counts, rate and time left, stages with their times, each warning once."""

from __future__ import annotations

import pytest

from influence_job.driver import reporting
from influence_job.driver.reporting import ProgressTracker
from influence_job.errors import PermanentError, Reason
from influence_job.identity import JobIdentity
from influence_job.progress import Progress, Stage


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(reporting.time, "monotonic", stopped.monotonic)
    return stopped


@pytest.fixture
def told() -> list[Progress]:
    """The documents that a listener got."""
    return []


@pytest.fixture
def tracker(clock: Clock, told: list[Progress]) -> ProgressTracker:
    return ProgressTracker(JobIdentity("uid-1", 3, "pod"), told.append)


def test_rate_and_time_left_are_those_of_the_last_minute(tracker: ProgressTracker, clock: Clock) -> None:
    tracker.enter(Stage.SCORES)
    tracker.start_counting(done=10, total=210)
    document = tracker.snapshot()
    assert (document.regions.done, document.regions.total) == (10, 210)
    assert document.rate is document.eta_seconds is None
    for second in range(1, 31):
        clock.now += 1
        tracker.count(10 + 4 * second)
    document = tracker.snapshot()
    assert document.rate == pytest.approx(4.0)
    assert document.eta_seconds == pytest.approx((210 - 130) / 4.0)
    for second in range(1, 71):
        clock.now += 1
        tracker.count(130 + second)
    assert tracker.snapshot().rate == pytest.approx(1.0), "the faster half minute is forgotten"
    assert tracker.snapshot().eta_seconds == pytest.approx(10)


def test_rows_that_an_earlier_attempt_left_are_done_and_not_of_this_attempt(
    tracker: ProgressTracker, clock: Clock
) -> None:
    tracker.enter(Stage.FACTORS)
    tracker.start_counting(done=5, total=7)
    clock.now += 1
    tracker.count(7)
    assert tracker.snapshot().recorded == 2
    tracker.enter(Stage.VERIFYING)
    tracker.start_counting(done=0, total=16)
    tracker.count(16)
    assert tracker.snapshot().recorded == 2, "verifying writes no rows"


def test_a_stage_ends_when_the_next_begins(tracker: ProgressTracker) -> None:
    for stage in (Stage.PREFLIGHT, Stage.LOADING, Stage.FITTING):
        tracker.enter(stage)
    document = tracker.snapshot()
    assert [(times.name, times.end is None) for times in document.stages] == [
        (Stage.PREFLIGHT, False),
        (Stage.LOADING, False),
        (Stage.FITTING, True),
    ]
    assert (document.stage, document.job_uid, document.attempt) == (Stage.FITTING, "uid-1", 3)


def test_each_warning_is_kept_once_and_there_are_never_too_many(tracker: ProgressTracker) -> None:
    for number in range(50):
        tracker.warn("λ is small")
        tracker.warn(f"warning {number}")
    warnings = tracker.snapshot().warnings
    assert warnings[:2] == ["λ is small", "warning 0"]
    assert len(warnings) == len(set(warnings)) == reporting.MAX_WARNINGS


def test_an_end_closes_the_stage_and_has_no_time_left(tracker: ProgressTracker, clock: Clock) -> None:
    tracker.enter(Stage.SCORES)
    tracker.start_counting(0, 10)
    clock.now += 1
    tracker.count(3)
    tracker.failed("region 3: OSError: gone")
    assert tracker.snapshot().regions.failed == 1
    tracker.fail(PermanentError(Reason.REGION_FAILED, "region 3 raised 3 times"))
    document = tracker.snapshot()
    assert document.last_error is not None
    assert (document.last_error.reason, document.last_error.message) == (
        "RegionFailed",
        "region 3 raised 3 times",
    )
    assert document.eta_seconds is None
    assert document.stages[-1].end is not None
    assert not document.finished


def test_a_listener_is_told_ten_times_a_second_at_most_and_of_every_stage(
    tracker: ProgressTracker, clock: Clock, told: list[Progress]
) -> None:
    tracker.enter(Stage.SCORES)
    told.clear()
    for done in range(100):
        clock.now += 0.01
        tracker.count(done)
    assert 9 <= len(told) <= 10
    tracker.enter(Stage.VERIFYING)
    assert told[-1].stage is Stage.VERIFYING


def test_a_snapshot_does_not_change_any_more(tracker: ProgressTracker) -> None:
    tracker.enter(Stage.PREFLIGHT)
    before = tracker.snapshot()
    tracker.enter(Stage.LOADING)
    tracker.warn("later")
    assert (len(before.stages), before.warnings) == (1, [])
