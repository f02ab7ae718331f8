"""What a pass reads of the network."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from influence_operator.cluster import gather
from influence_operator.cluster.cache import JobKey
from influence_operator.cluster.gather import Gatherer
from influence_operator.cluster.memory import Memory
from influence_operator.decisions.snapshot import Children, DriverReport
from operator_objects import UID, child, influence_job, pod, progress

NAME = "digits-0a1b2-1"


class OneConfigMap:
    """An API server with the task's source, which counts how often it is read."""

    def __init__(self) -> None:
        self.reads: list[str] = []

    async def get(self, kind: Any, namespace: str, name: str) -> dict[str, Any]:
        self.reads.append(name)
        return {"metadata": {"name": name}, "data": {"m.py": "x"}}


class Cached:
    """The watches' cache, with some children."""

    def __init__(self, **kinds: Any) -> None:
        self._children = Children(**kinds)

    def children(self, key: Any) -> Children:
        return self._children


class NoEvents:
    """Nobody warned of anything."""

    async def warnings(self, key: Any) -> tuple[()]:
        return ()


DRIVER = child("Job", NAME, 1, UID)
COPY = child("ConfigMap", NAME, 1, UID)
OTHERS = child("ConfigMap", "digits-0a1b2-2", 2, UID)


@pytest.mark.parametrize(
    ("children", "read"),
    [
        ({}, True),
        ({"driver_jobs": (DRIVER,), "config_maps": (COPY,)}, False),
        ({"driver_jobs": (DRIVER,)}, True),
        ({"driver_jobs": (DRIVER,), "config_maps": (OTHERS,)}, True),
    ],
    ids=["no attempt", "an attempt and its copy", "the copy was deleted", "another attempt's copy"],
)
def test_the_tasks_source_is_read_where_no_attempt_has_its_copy(children: dict[str, Any], read: bool) -> None:
    job, api = influence_job(task={"source": {"configMap": {"name": "code"}}}), OneConfigMap()
    gatherer = Gatherer(
        cast(Any, api),
        cast(Any, Cached(**children)),
        cast(Any, NoEvents()),
        cast(Any, None),
        lambda: True,
        clock=lambda: datetime(2026, 3, 1, tzinfo=UTC),
    )
    snapshot = asyncio.run(gatherer.snapshot(JobKey("team", "digits", UID), job, Memory()))
    assert api.reads == (["code"] if read else [])
    assert (snapshot.source is not None) is read


class Asking:
    """A running driver that is asked every three seconds; what it answers a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        self.ready = True
        self.said = DriverReport(1, progress(1))
        self._memory = Memory()
        monkeypatch.setattr(gather.time, "monotonic", lambda: 1000.0 + self.seconds)

    async def report(self, *_: object) -> DriverReport:
        return self.said

    def clock(self) -> datetime:
        return datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def unread_for(self, seconds: float) -> list[float | None]:
        """How long each answer of so many seconds says that there was none."""
        told: list[float | None] = []
        for _ in range(round(seconds / 3)):
            self.seconds += 3
            since = self._report().unread_since
            told.append((self.clock() - since).total_seconds() if since else None)
        return told

    def _report(self) -> DriverReport:
        driver = pod(1, "driver", owner=DRIVER["metadata"]["uid"])
        driver["metadata"]["ownerReferences"][0]["controller"] = True
        driver["status"]["conditions"][0]["status"] = str(self.ready)
        gatherer = Gatherer(
            cast(Any, None),
            cast(Any, Cached(driver_jobs=(DRIVER,), pods=(driver,))),
            cast(Any, NoEvents()),
            cast(Any, self),
            lambda: True,
            clock=self.clock,
        )
        snapshot = asyncio.run(
            gatherer.snapshot(JobKey("team", "digits", UID), influence_job(), self._memory)
        )
        assert snapshot.driver is not None
        return snapshot.driver


def test_a_driver_that_cannot_be_read_is_silent_from_when_it_was_ready_to_its_next_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asking = Asking(monkeypatch)
    assert asking.unread_for(3) == [None]
    asking.said, asking.ready = DriverReport(1, None, "refused"), False
    assert asking.unread_for(6) == [None, None]
    asking.ready = True
    assert asking.unread_for(9) == [0, 3, 6]
    asking.said = DriverReport(1, progress(1))
    assert asking.unread_for(3) == [None]
    asking.said = DriverReport(1, None, "refused")
    assert asking.unread_for(6) == [0, 3]


def test_a_driver_that_cannot_be_read_is_logged_once_and_a_late_answer_never(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asking = Asking(monkeypatch)
    asking.said = DriverReport(1, None, "refused")
    with caplog.at_level(logging.WARNING):
        asking.unread_for(18)
        assert caplog.messages == []
        asking.unread_for(300)
    assert caplog.messages == ["team/digits: attempt 1: cannot read /progress: refused"]


def test_a_snapshot_says_when_this_process_looked_at_the_job_before() -> None:
    before = datetime(2026, 3, 1, tzinfo=UTC)
    nothing = cast(Any, None)
    gatherer = Gatherer(
        nothing, cast(Any, Cached()), cast(Any, NoEvents()), nothing, lambda: True, clock=lambda: before
    )
    memory = Memory(looked=before)
    snapshot = asyncio.run(gatherer.snapshot(JobKey("team", "digits", UID), influence_job(), memory))
    assert snapshot.looked == before
