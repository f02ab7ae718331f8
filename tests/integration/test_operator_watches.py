"""kopf's watches with what the operator adds to them, against lists and watches that follow a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from kubernetes.aio.client import Configuration

from influence_operator import handlers
from influence_operator.cluster import watching
from influence_operator.cluster.kinds import INFLUENCE_JOB, POD, Kind
from influence_operator.cluster.watching import Watches
from influence_operator.manifests.names import JOB_UID
from scripted_api import ScriptedApi, scripted_api

GONE = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "old"}}


class Told:
    """What the watches have told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str | None, str]] = []
        self.lists = 0
        self.watches: Watches

    def seen(self, kind: Kind, event_type: str | None, obj: Any) -> None:
        """Notes an event."""
        self.events.append((kind.plural, event_type, obj["metadata"]["name"]))

    def listed(self) -> None:
        """Notes that a kind is known."""
        self.lists += 1

    def of(self, name: str) -> list[str | None]:
        """The types of the events about one object."""
        return [event_type for _, event_type, named in self.events if named == name]


@asynccontextmanager
async def watching_pods_and_jobs(prepare: Callable[[ScriptedApi], None]) -> AsyncIterator[tuple[Any, Told]]:
    async with scripted_api() as api:
        prepare(api)
        told = Told()
        configuration = Configuration(host=api.url)
        told.watches = Watches(told.seen, told.listed, configuration, ())
        kinds = (INFLUENCE_JOB, POD)
        told.watches.start(kinds, handlers.registry(kinds, told.watches.tell))
        try:
            yield api, told
        finally:
            told.watches.stop()
            for stream in api.streams.values():
                stream.put_nowait(None)


def pod(name: str, version: int = 1) -> dict[str, Any]:
    metadata = {
        "name": name,
        "namespace": "ns",
        "uid": f"uid-{name}",
        "resourceVersion": str(version),
        "labels": {JOB_UID: "u"},
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def pods(api: ScriptedApi, *names: str) -> None:
    api.lists[POD.plural] = [pod(name) for name in names]


def test_what_vanished_while_no_watch_ran_is_told_as_deleted():
    async def scenario() -> None:
        async with watching_pods_and_jobs(lambda api: pods(api, "a", "b")) as (api, told):
            await until(lambda: told.of("a") and told.of("b"))
            api.streams[POD.plural].put_nowait({"type": "ADDED", "object": pod("c", 101)})
            await until(lambda: told.of("c"))

            pods(api, "b")
            api.streams[POD.plural].put_nowait(GONE)
            await until(lambda: told.of("a")[-1] == told.of("c")[-1] == "DELETED")

            assert told.of("b")[-1] is None

    run(scenario())


def test_everything_may_vanish_at_once():
    async def scenario() -> None:
        async with watching_pods_and_jobs(lambda api: pods(api, "a")) as (api, told):
            await until(lambda: told.of("a"))
            pods(api)
            api.streams[POD.plural].put_nowait(GONE)
            await until(lambda: told.of("a")[-1] == "DELETED")

    run(scenario())


def test_an_end_of_a_watch_alone_deletes_nothing_and_lists_nothing():
    async def scenario() -> None:
        async with watching_pods_and_jobs(lambda api: pods(api, "a")) as (api, told):
            await until(lambda: told.of("a"))
            pods(api)
            api.streams[POD.plural].put_nowait(None)
            api.streams[POD.plural].put_nowait({"type": "ADDED", "object": pod("b", 102)})
            await until(lambda: told.of("b"))

            assert told.of("a") == [None]
            lists = [q for plural, q in api.queries if plural == POD.plural and "watch" not in q]
            assert len(lists) == 1

    run(scenario())


def test_the_watches_are_complete_when_all_that_was_listed_has_been_told():
    async def scenario() -> None:
        many = [f"pod-{number}" for number in range(200)]
        async with watching_pods_and_jobs(lambda api: pods(api, *many)) as (_, told):
            assert not told.watches.complete()
            await until(told.watches.complete)
            await until(lambda: told.lists == 2)

            assert {name for _, _, name in told.events} == set(many)

    run(scenario())


@pytest.mark.parametrize("code", [403, 404, 500])
def test_a_kind_that_is_refused_is_tried_again_and_ends_nothing(code, monkeypatch):
    monkeypatch.setattr(watching, "REFUSED_DELAY", 0.1)
    monkeypatch.setattr(watching, "CONNECT_DELAYS", (0.05,))

    async def scenario() -> None:
        def refuse(api: ScriptedApi) -> None:
            api.lists[POD.plural] = code

        async with watching_pods_and_jobs(refuse) as (api, told):
            await until(lambda: [plural for plural, _ in api.queries].count(POD.plural) > 5)
            assert told.watches.serves(POD) is (code != 404)
            assert not told.watches.failed.done()

            pods(api, "a")
            await until(lambda: told.of("a"))
            await until(lambda: told.watches.serves(POD) and told.watches.complete())

    run(scenario())


def test_children_are_selected_on_the_server_and_jobs_are_not():
    async def scenario() -> None:
        async with watching_pods_and_jobs(lambda api: pods(api, "a")) as (api, told):
            await until(lambda: told.of("a"))
            await until(lambda: len(api.queries) >= 4)

            for plural, query in api.queries:
                expected = JOB_UID if plural == POD.plural else None
                assert query.get("labelSelector") == expected

    run(scenario())


def test_watching_writes_nothing_not_even_on_objects_of_other_operators_built_on_kopf():
    async def scenario() -> None:
        held = pod("held")
        held["metadata"]["finalizers"] = ["kopf.zalando.org/KopfFinalizerMarker"]
        held["metadata"]["annotations"] = {"kopf.zalando.org/last-handled-configuration": "{}"}

        def prepare(api: ScriptedApi) -> None:
            api.lists[POD.plural] = [held]
            api.lists[INFLUENCE_JOB.plural] = [pod("job")]

        async with watching_pods_and_jobs(prepare) as (api, told):
            await until(lambda: told.of("held") and told.of("job"))
            for event_type in ("MODIFIED", "DELETED"):
                api.streams[POD.plural].put_nowait({"type": event_type, "object": held})
            await until(lambda: told.of("held")[-1] == "DELETED")
            await asyncio.sleep(0.5)

            assert api.writes == []

    run(scenario())


def test_every_bookmark_is_a_sign_of_life():
    async def scenario() -> None:
        async with watching_pods_and_jobs(lambda api: pods(api, "a")) as (api, told):
            await until(told.watches.complete)
            await asyncio.sleep(0.3)
            silence = told.watches.silence()
            for stream in api.streams.values():
                bookmark = {"kind": "Pod", "metadata": {"resourceVersion": "200"}}
                stream.put_nowait({"type": "BOOKMARK", "object": bookmark})

            assert silence >= 0.3
            await until(lambda: told.watches.silence() < 0.2)

    run(scenario())
