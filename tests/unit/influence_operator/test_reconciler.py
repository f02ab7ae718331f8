"""Which jobs get a pass."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from influence_operator.cluster.cache import Cache, JobKey
from influence_operator.cluster.errors import UnreachableError
from influence_operator.cluster.kinds import INFLUENCE_JOB, POD
from influence_operator.cluster.memory import Memory, Outcome
from influence_operator.decisions.snapshot import Children, Snapshot
from influence_operator.manifests import names
from influence_operator.metrics import Metrics
from influence_operator.reconciler import Reconciler
from influence_operator.settings import Defaults, Settings
from influence_operator.work_queue import WorkQueue
from operator_objects import influence_job


class Passes:
    """Stands for what gathers and what applies: notes each pass and ends it there."""

    def __init__(self) -> None:
        self.of: list[str] = []

    async def snapshot(self, key: JobKey, *_: object) -> Any:
        """The beginning of a job's pass."""
        return self._end(key)

    async def apply(self, key: JobKey, *_: object) -> Any:
        """Of children whose job is gone."""
        return self._end(key)

    def _end(self, key: JobKey) -> None:
        self.of.append(str(key))
        raise UnreachableError("far enough")


def reconciler_of(passes: Passes, told: set[str]) -> Reconciler:
    stands_for_all: Any = passes
    return Reconciler(
        Settings(Defaults("worker:1")),
        Cache(),
        WorkQueue(asyncio.get_running_loop().time),
        stands_for_all,
        stands_for_all,
        stands_for_all,
        stands_for_all,
        Metrics(),
        lambda: datetime.now(UTC),
        told.__contains__,
    )


def obj(namespace: str, name: str, **metadata: Any) -> dict[str, Any]:
    own = {"namespace": namespace, "name": name, "uid": f"uid of {name}", "resourceVersion": "1"}
    return {"metadata": own | metadata, "spec": {}}


def test_no_pass_is_made_in_a_namespace_of_which_not_all_is_told_and_then_each_is_made():
    """A job without its pods would be given others; a pod without its job would be cleared away."""

    async def scenario() -> None:
        passes, told = Passes(), {"a"}
        reconciler = reconciler_of(passes, told)
        reconciler.seen(INFLUENCE_JOB, None, obj("a", "job-of-a"))
        reconciler.seen(INFLUENCE_JOB, None, obj("b", "job-of-b"))
        labels = names.labels("unseen-of-b", "u-2", 1)
        reconciler.seen(POD, None, obj("b", "pod-of-b", labels=labels))
        reconciler.open(True)
        running = asyncio.create_task(reconciler.run())

        await asyncio.sleep(0.1)
        assert passes.of == ["a/job-of-a"]

        told.add("b")
        reconciler.all_due()
        async with asyncio.timeout(10):
            while not {"b/job-of-b", "b/unseen-of-b"} <= set(passes.of):
                await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(scenario())


class Looking:
    """Stands for what gathers, applies and writes: every second pass does not get through."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, tzinfo=UTC)
        self.looked: list[datetime | None] = []

    async def snapshot(self, key: JobKey, job: Any, memory: Memory) -> Snapshot:
        self.looked.append(memory.looked)
        self.now += timedelta(seconds=1)
        return Snapshot(influence_job(), Children(), self.now)

    async def apply(self, *_: object) -> Outcome:
        return Outcome() if len(self.looked) % 2 else Outcome(error=UnreachableError("far enough"))

    def wait(self, *_: object) -> None:
        """The status is what it should be."""


def test_a_pass_that_was_carried_through_is_a_look_at_the_job_and_no_other():
    async def scenario() -> None:
        passes = Looking()
        reconciler = reconciler_of(cast(Any, passes), {"a"})
        reconciler.open(True)
        running = asyncio.create_task(reconciler.run())
        async with asyncio.timeout(10):
            while len(passes.looked) < 4:
                reconciler.seen(INFLUENCE_JOB, None, obj("a", "job", resourceVersion=str(len(passes.looked))))
                reconciler.all_due()
                await asyncio.sleep(0.01)
        running.cancel()
        first = datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=1)
        assert passes.looked[:4] == [None, first, first, first + timedelta(seconds=2)]

    asyncio.run(scenario())


def test_an_older_version_is_news_from_a_list_alone():
    """A list may be that of a restored API server; what a watch tells late, a pass has seen."""

    async def scenario() -> None:
        reconciler = reconciler_of(Passes(), {"a"})

        def makes_due(event_type: str | None, version: int) -> bool:
            told = obj("a", "job-of-a", resourceVersion=str(version), generation=version)
            reconciler.seen(INFLUENCE_JOB, event_type, told)
            key = reconciler._queue.take_now()
            if key:
                reconciler._queue.done(key)
            return key is not None

        assert makes_due(None, 900)
        assert not makes_due("MODIFIED", 400)
        assert not makes_due(None, 900)
        assert makes_due(None, 400)
        assert makes_due("MODIFIED", 401)

    asyncio.run(scenario())
