"""When the watches of single namespaces have told everything, though one of these may be refused.

kopf itself is left out: a scripted stream stands for its own, and an `operator` that hands on every event.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import kopf
import pytest
from kopf._cogs.clients import errors
from kopf._cogs.clients import watching as kopf_watching
from kubernetes.aio.client import Configuration

from influence_operator.cluster import watching
from influence_operator.cluster.kinds import DASK_CLUSTER, INFLUENCE_JOB, POD, Kind
from influence_operator.cluster.watching import Watches

KINDS = (INFLUENCE_JOB, POD)
FORBIDDEN = errors.APIForbiddenError("forbidden", status=403, headers={})
NOT_FOUND = errors.APINotFoundError("not found", status=404, headers={})
BROKEN = errors.APIServerError("broken", status=500, headers={})
Place = tuple[Kind, str | None]


class Script:
    """What the lists answer, and what came of it."""

    def __init__(self) -> None:
        self.answers: dict[Place, list[str] | Exception | None] = {}
        """Names of objects, or an error; None for no answer yet. By default there are no objects."""
        self.told: list[str] = []
        self.complete_when_listed: list[bool] = []
        self.watches: Watches
        self.held = threading.Event()
        """Clear while a handler must not run."""
        self.held.set()

    async def stream(self, *, resource: Any, namespace: str | None, **_: Any) -> AsyncIterator[Any]:
        """In the place of kopf's: a list, and then a watch that tells nothing."""
        kind = next(kind for kind in watching.WATCHED_KINDS if kind.plural == resource.plural)
        while (answer := self.answers.get((kind, namespace), [])) is None:
            await asyncio.sleep(0.01)
        if isinstance(answer, Exception):
            raise answer
        for name in answer:
            metadata = {"name": name, "namespace": namespace or "a", "uid": f"uid of {name}"}
            yield {"type": None, "object": {"metadata": metadata}}
        yield kopf_watching.Bookmark.LISTED
        while True:
            await asyncio.sleep(0.01)

    async def operate(self, kinds: tuple[Kind, ...], namespaces: list[str]) -> None:
        """In the place of kopf: runs every stream and the handlers of its events."""

        async def follow(kind: Kind, namespace: str | None) -> None:
            resource = SimpleNamespace(group=kind.group, plural=kind.plural)
            async for event in kopf_watching.infinite_watch(  # type: ignore[call-arg]
                resource=resource,  # type: ignore[arg-type]
                namespace=namespace,  # type: ignore[arg-type]
            ):
                if isinstance(event, dict):
                    while not self.held.is_set():
                        await asyncio.sleep(0.01)
                    self.watches.tell(kind, event["type"], event["object"])

        places = [(kind, namespace) for kind in kinds for namespace in namespaces or [None]]
        following = [asyncio.ensure_future(follow(*place)) for place in places]
        while not self.watches._stopping.is_set():
            await asyncio.sleep(0.01)
        for task in following:
            task.cancel()

    def seen(self, _: Kind, __: str | None, obj: Any) -> None:
        """Notes an object."""
        self.told.append(obj["metadata"]["name"])

    def listed(self) -> None:
        """Notes what `complete` says when somebody is told to look."""
        self.complete_when_listed.append(self.watches.complete())


@contextmanager
def watches_of(
    monkeypatch: pytest.MonkeyPatch, *namespaces: str, **answers: list[str] | Exception | None
) -> Iterator[Script]:
    """Running watches. An answer is named by its namespace and kind, as `b_pods`."""
    script = Script()
    for place, answer in answers.items():
        namespace, _, plural = place.partition("_")
        kind = next(kind for kind in watching.WATCHED_KINDS if kind.plural == plural)
        script.answers[kind, namespace if namespaces else None] = answer
    started: list[tuple[Kind, ...]] = []

    async def operator(*, namespaces: list[str], **_: Any) -> None:
        await script.operate(started.pop(0), namespaces)

    monkeypatch.setattr(kopf, "operator", operator)
    monkeypatch.setattr(kopf_watching, "infinite_watch", kopf_watching.infinite_watch)  # put back
    monkeypatch.setattr(watching, "_kopf_stream", script.stream)
    monkeypatch.setattr(watching, "REFUSED_DELAY", 0.01)
    script.watches = Watches(script.seen, script.listed, Configuration(host="http://nowhere"), namespaces)
    start = script.watches.start

    def started_with(kinds: tuple[Kind, ...], registry: Any) -> None:
        started.append(kinds)
        start(kinds, registry)

    monkeypatch.setattr(script.watches, "start", started_with)
    script.watches.start(KINDS, kopf.OperatorRegistry())
    try:
        yield script
    finally:
        script.watches.stop()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def a_while() -> None:
    """For tries that must change nothing."""
    await asyncio.sleep(0.2)


def test_a_namespace_that_is_refused_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        refused = {"b_influencejobs": FORBIDDEN, "b_pods": FORBIDDEN}
        with watches_of(monkeypatch, "a", "b", a_pods=["pod-of-a"], **refused) as script:
            await until(script.watches.complete)
            await until(lambda: script.complete_when_listed and script.complete_when_listed[-1])
            await a_while()

            assert script.told == ["pod-of-a"]
            assert script.watches.told("a")
            assert not script.watches.told("b")
            assert script.watches.serves(INFLUENCE_JOB)

    asyncio.run(scenario())


def test_whoever_waits_is_told_when_a_refusal_is_all_that_was_missing(monkeypatch: pytest.MonkeyPatch):
    """Whether the refusal is of a right (403) or of a kind that is gone (404)."""

    async def scenario(refusal: Exception) -> None:
        with watches_of(monkeypatch, "a", "b", b_pods=None) as script:
            await until(lambda: len(script.complete_when_listed) == 3)
            assert not script.watches.complete()

            script.answers[POD, "b"] = refusal
            await until(lambda: len(script.complete_when_listed) == 4)
            assert script.complete_when_listed == [False, False, False, True]

    for refusal in (FORBIDDEN, NOT_FOUND):
        asyncio.run(scenario(refusal))


def test_a_namespace_counts_once_all_of_it_has_been_told(monkeypatch: pytest.MonkeyPatch):
    """While it comes back kind by kind, the others go on and it waits."""

    async def scenario() -> None:
        refused = {"b_influencejobs": FORBIDDEN, "b_pods": FORBIDDEN}
        with watches_of(monkeypatch, "a", "b", **refused) as script:
            await until(script.watches.complete)

            script.answers[INFLUENCE_JOB, "b"] = ["job-of-b"]
            await until(lambda: "job-of-b" in script.told)
            script.answers[POD, "b"] = BROKEN
            await a_while()
            assert script.watches.complete()
            assert not script.watches.told("b")

            lists = len(script.complete_when_listed)
            script.answers[POD, "b"] = ["pod-of-b"]
            await until(lambda: script.watches.told("b"))
            assert "pod-of-b" in script.told, "nothing counts as told that was not seen before"
            assert script.watches.complete()
            assert script.complete_when_listed[lists:] == [True]

    asyncio.run(scenario())


def test_a_namespace_whose_handlers_have_not_run_is_not_told(monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        with watches_of(monkeypatch, "a", a_pods=None) as script:
            script.held.clear()
            script.answers[POD, "a"] = ["pod-of-a"]
            await a_while()
            assert not script.watches.told("a")

            script.held.set()
            await until(lambda: script.watches.told("a"))
            assert script.told == ["pod-of-a"]

    asyncio.run(scenario())


@pytest.mark.parametrize("namespaces", [(), ("a",), ("a", "b")])
@pytest.mark.parametrize("kind", KINDS)
def test_while_everything_is_refused_nothing_is_complete(
    monkeypatch: pytest.MonkeyPatch, namespaces: tuple[str, ...], kind: Kind
):
    """Without namespaces, one kind is enough: its children are everywhere."""

    async def scenario() -> None:
        refused = {f"{namespace}_{kind.plural}": FORBIDDEN for namespace in namespaces or ("all",)}
        with watches_of(monkeypatch, *namespaces, **refused) as script:
            await until(lambda: len(script.complete_when_listed) == 2 * len(refused))
            await a_while()
            assert not script.watches.complete()
            assert not script.watches.told("a")
            assert not any(script.complete_when_listed)

            first = namespaces[0] if namespaces else None
            script.answers[kind, first] = []
            await until(script.watches.complete)
            assert script.watches.told("a")
            assert script.complete_when_listed[-1]

    asyncio.run(scenario())


def test_a_namespace_that_fails_otherwise_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    """An API server that is broken is so for a while, and its jobs are there."""

    async def scenario() -> None:
        with watches_of(monkeypatch, "a", "b", b_pods=BROKEN) as script:
            await until(lambda: script.watches.told("a"))
            await a_while()
            assert not script.watches.complete()

            script.answers[POD, "b"] = []
            await until(script.watches.complete)

    asyncio.run(scenario())


def test_kinds_that_come_later_are_waited_for_where_they_are_not_refused(monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        refused = {f"b_{kind.plural}": FORBIDDEN for kind in (*KINDS, DASK_CLUSTER)}
        with watches_of(monkeypatch, "a", "b", a_daskclusters=None, **refused) as script:
            await until(script.watches.complete)

            script.watches.start((DASK_CLUSTER,), kopf.OperatorRegistry())
            await a_while()
            assert not script.watches.complete()
            assert not script.watches.told("a")

            script.answers[DASK_CLUSTER, "a"] = []
            await until(script.watches.complete)
            assert script.watches.told("a")

    asyncio.run(scenario())


def test_a_refusal_is_logged_once_and_so_is_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", watching.__name__)

    async def scenario() -> None:
        with watches_of(monkeypatch, "a", "b", b_pods=FORBIDDEN) as script:
            await until(lambda: caplog.messages)
            await a_while()
            script.answers[POD, "b"] = BROKEN
            await until(lambda: len(caplog.messages) == 2)
            await a_while()
            script.answers[POD, "b"] = []
            await until(script.watches.complete)
            await a_while()

    asyncio.run(scenario())
    assert caplog.messages == [
        "watching pods in b: forbidden; tried again every 0 s",
        "watching pods in b: broken; tried again every 0 s",
        "watching pods in b again",
    ]
