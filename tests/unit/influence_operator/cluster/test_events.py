"""The warnings about a job's children: what is told of them, and what is kept meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from influence_operator.cluster.cache import JobKey
from influence_operator.cluster.events import FRESH_SECONDS, KEPT, Events
from influence_operator.manifests import names

UID = "0d3e6a3a-52a2-4b2b-9a77-3a1f8d0a1c11"
KEY = JobKey("ns", "digits", UID)
BASE = names.base_name("digits", UID, 1)
Run = Callable[[Coroutine[Any, Any, None]], None]


def event(name: str, second: int = 0, kind: str = "Pod", message: str = "no room") -> dict[str, Any]:
    """One as the API server sends it."""
    return {
        "metadata": {
            "name": f"{name}.17f0a3b2c4d5e6f7",
            "namespace": "ns",
            "uid": f"uid of {name}",
            "creationTimestamp": "2026-11-30T03:00:00Z",
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:reason": {}, "f:message": {}}}],
        },
        "involvedObject": {"kind": kind, "namespace": "ns", "name": name, "uid": "u", "apiVersion": "v1"},
        "reason": "FailedMount",
        "message": message,
        "type": "Warning",
        "lastTimestamp": f"2026-11-30T03:{second // 60:02}:{second % 60:02}Z",
        "source": {"component": "kubelet"},
    }


class FakeApi:
    """Lists events, after a while."""

    def __init__(self, *events: dict[str, Any]) -> None:
        self.events = list(events)
        self.lists = 0

    async def list(self, *_: object, **__: str) -> AsyncIterator[dict[str, Any]]:
        """All of them."""
        self.lists += 1
        for found in self.events:
            await asyncio.sleep(0)
            yield found


def events_of(api: FakeApi) -> Events:
    return Events(api, "operator-0")  # type: ignore[arg-type]


def kept(events: Events) -> list[Any]:
    """What stays in memory."""
    return [*events._listed.values(), *events._locks.values()]


@pytest.mark.parametrize(
    "name",
    [
        BASE,
        names.scheduler_name(BASE),
        names.worker_group_name(BASE),
        f"{BASE}-driver",
        f"{BASE}-default-worker-0a1b2c3d4e-7d9f8b6c5d-x2x9z",
        names.base_name("digits", UID, 999_999),
    ],
)
def test_a_warning_about_a_child_of_any_name_is_told(run_at_once: Run, name: str):
    async def scenario() -> None:
        (told,) = await events_of(FakeApi(event(name, message="no such secret"))).warnings(KEY)

        assert (told["involvedObject"]["kind"], told["involvedObject"]["name"]) == ("Pod", name)
        assert (told["reason"], told["message"]) == ("FailedMount", "no such secret")

    run_at_once(scenario())


def test_the_newest_come_first_and_the_oldest_of_too_many_are_left_out(run_at_once: Run):
    async def scenario() -> None:
        seconds = [(7 * number) % (2 * KEPT) for number in range(2 * KEPT)]
        api = FakeApi(*(event(f"{BASE}-driver", second, message=str(second)) for second in seconds))
        told = await events_of(api).warnings(KEY)

        assert [warning["message"] for warning in told] == [str(2 * KEPT - 1 - i) for i in range(KEPT)]

    run_at_once(scenario())


def test_the_time_is_the_last_that_an_event_names(run_at_once: Run):
    """A series, as the scheduler counts, has one of its own; the oldest form has none but its creation."""

    async def scenario() -> None:
        series = event(BASE, message="series") | {
            "lastTimestamp": None,
            "series": {"lastObservedTime": "2026-11-30T03:00:05.000000Z"},
        }
        once = event(BASE, message="once") | {"lastTimestamp": None, "eventTime": "2026-11-30T03:00:04Z"}
        bare = event(BASE, message="bare") | {"lastTimestamp": None}
        told = await events_of(FakeApi(bare, once, series, event(BASE, 3))).warnings(KEY)

        assert [warning["message"] for warning in told] == ["series", "once", "no room", "bare"]

    run_at_once(scenario())


def test_nothing_is_kept_of_events_about_others_and_of_ours_what_is_decided_by(run_at_once: Run):
    async def scenario() -> None:
        others = [event(f"train-7d9f8b6c5d-{number:05}") for number in range(500)]
        strange = [
            event(BASE) | {"involvedObject": None},
            event(BASE) | {"involvedObject": {"kind": "Pod", "name": 7}},
        ]
        events = events_of(FakeApi(*others, *strange, event(f"{BASE}-driver", 9)))
        told = await events.warnings(KEY)

        (kept_of_namespace,) = kept(events)
        assert kept_of_namespace == list(told)
        assert told == (
            {
                "involvedObject": {"kind": "Pod", "name": f"{BASE}-driver"},
                "reason": "FailedMount",
                "message": "no room",
                "lastTimestamp": "2026-11-30T03:00:09Z",
            },
        )

    run_at_once(scenario())


def test_all_jobs_of_a_namespace_share_a_list_while_it_is_fresh_and_nothing_is_kept_afterwards(
    run_at_once: Run,
):
    async def scenario() -> None:
        another = JobKey("ns", "another", "ffffffff-52a2-4b2b-9a77-3a1f8d0a1c11")
        api = FakeApi(event(BASE), event("another-fffff-1"))
        events = events_of(api)

        told = await asyncio.gather(events.warnings(KEY), events.warnings(another), events.warnings(KEY))
        assert [len(warnings) for warnings in told] == [1, 1, 1]
        await asyncio.sleep(FRESH_SECONDS - 0.1)
        assert await events.warnings(KEY) == told[0]
        assert api.lists == 1

        await asyncio.sleep(0.2)
        assert kept(events) == []
        await events.warnings(KEY)
        assert api.lists == 2

    run_at_once(scenario())
