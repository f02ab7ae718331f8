"""The reconcile loop: for each job that is due, gather, decide, apply and write one status.

Level-triggered: what happened is forgotten, only what is counts. One pass at a time per job, many jobs side
by side; every error ends here, is counted and repeated ever more slowly. Called by
`influence_operator.process`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from influence_operator.cluster.apply import Applier
from influence_operator.cluster.cache import Cache, JobKey, version
from influence_operator.cluster.errors import ApiError, ClusterError, LeaseLostError
from influence_operator.cluster.events import Events
from influence_operator.cluster.gather import Gatherer
from influence_operator.cluster.kinds import INFLUENCE_JOB, Kind
from influence_operator.cluster.memory import Memory
from influence_operator.cluster.status import StatusWriter
from influence_operator.decisions.actions import Decision
from influence_operator.decisions.decide import decide, decide_orphans
from influence_operator.decisions.snapshot import Object
from influence_operator.metrics import Metrics
from influence_operator.settings import Settings
from influence_operator.work_queue import WorkQueue

SIDE_BY_SIDE = 16
"""Passes at a time; each waits for the network most of its time."""
ORPHAN_SECONDS = 5.0
"""A DaskCluster whose job is gone and that does not go is looked at so often."""

log = logging.getLogger(__name__)


class Reconciler:
    """Keeps every job as it should be. Also the listener of the watches."""

    def __init__(
        self,
        settings: Settings,
        cache: Cache,
        queue: WorkQueue[JobKey],
        gatherer: Gatherer,
        applier: Applier,
        status: StatusWriter,
        events: Events,
        metrics: Metrics,
        clock: Callable[[], datetime],
        told: Callable[[str], bool],
    ) -> None:
        """`told` says whether all that exists in a namespace has been told."""
        self._settings = settings
        self._cache = cache
        self._queue = queue
        self._gatherer = gatherer
        self._applier = applier
        self._status = status
        self._events = events
        self._metrics = metrics
        self._clock = clock
        self._told = told
        self._memories: dict[JobKey, Memory] = {}
        self._complete = asyncio.Event()

    def seen(self, kind: Kind, event_type: str | None, obj: Mapping[str, Any]) -> None:
        """Takes an event of a watch."""
        self._metrics.watch_event(kind.kind)
        if event_type == "DELETED":
            key, changed = self._cache.remove(kind, obj), True
        else:
            listed = event_type is None
            before = self._cache.find(kind, obj)
            key = self._cache.put(kind, obj, listed)
            if before is not None and not _news(obj, before, listed):
                return  # the answer to a write of ours, which a pass has seen
            changed = kind == INFLUENCE_JOB and (before is None or _intent(before) != _intent(obj))
        if key is not None:
            self._queue.add(key, changed)

    def open(self, complete: bool) -> None:
        """Passes run only while all that exists has been told, but for namespaces that were refused."""
        if complete:
            self._complete.set()
        else:
            self._complete.clear()

    def all_due(self) -> None:
        """Every job is due: what all of them depend on has changed."""
        for key in self._cache.job_keys():
            self._queue.add(key)

    async def run(self) -> None:
        """Reconciles for ever.

        Raises:
            LeaseLostError: a write came too late.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._resync())
            for _ in range(SIDE_BY_SIDE):
                group.create_task(self._work())

    async def _resync(self) -> None:
        """Every job is due once per period, spread over it."""
        half = self._settings.resync_seconds / 2
        while True:
            await asyncio.sleep(half)
            for key in self._cache.job_keys():
                self._queue.add_after(key, random.uniform(0, half))

    async def _work(self) -> None:
        while True:
            await self._complete.wait()
            key = await self._queue.take()
            if not self._told(key.namespace):
                self._queue.done(key)  # due again when the last watch of its namespace has told
                continue
            began = time.monotonic()
            try:
                result = await self._pass(key)
            except LeaseLostError:
                raise
            except Exception as error:
                result = "failed"
                _tell(key, error, self._queue.failed(key))
            self._metrics.reconciled(result, time.monotonic() - began)

    async def _pass(self, key: JobKey) -> str:
        """One pass over one job; afterwards the queue knows when the next is due."""
        job = self._cache.job(key)
        if job is None:
            return await self._clear_away(key)
        memory = self._memories.setdefault(key, Memory())
        snapshot = await self._gatherer.snapshot(key, job, memory)
        decision = decide(snapshot, self._settings)
        wait = self._status.wait(job, decision, memory)
        write_now = wait == 0.0
        if write_now and decision.status_first:
            await self._write(key, job, decision, memory)
        outcome = await self._applier.apply(key, decision.actions)
        memory.learn(snapshot.conflicts, outcome)
        if write_now and not decision.status_first:
            await self._write(key, job, decision, memory)
        if outcome.error:
            raise outcome.error
        memory.looked = snapshot.now if decision.again_after else None
        self._queue.done(key)
        if outcome.done or (write_now and decision.urgent):
            self._queue.add(key)  # whatever was done, the next pass sees it
        for seconds in (wait, decision.again_after):
            if seconds:
                self._queue.add_after(key, seconds)
        return "done"

    async def _write(self, key: JobKey, job: Object, decision: Decision, memory: Memory) -> None:
        await self._status.write(key, job, decision.status, memory)
        await self._events.post(key, decision.events)

    async def _clear_away(self, key: JobKey) -> str:
        """The job is gone; what is left of it goes by itself, mostly."""
        self._memories.pop(key, None)
        children = self._cache.children(key)
        outcome = await self._applier.apply(key, decide_orphans(children, self._clock()))
        if outcome.error:
            raise outcome.error
        self._queue.done(key)
        self._queue.forget(key)
        if any(cluster["metadata"].get("deletionTimestamp") for cluster in children.dask_clusters):
            self._queue.add_after(key, ORPHAN_SECONDS)
        return "gone"


def _news(obj: Object, before: Object, listed: bool) -> bool:
    """Whether the cache now holds another version than before."""
    given, known = version(obj), version(before)
    return given != known if listed else given > known


def _intent(job: Object) -> tuple[object, object]:
    """What changes when a user changes or deletes a job."""
    return job["metadata"].get("generation"), job["metadata"].get("deletionTimestamp")


def _tell(key: JobKey, error: Exception, delay: float) -> None:
    if isinstance(error, ApiError) and (error.conflict or error.not_found):
        log.info("%s: changed or deleted during the pass, again in %.1f s", key, delay)
    elif isinstance(error, ClusterError):
        log.warning("%s: pass failed, again in %.1f s: %s", key, delay, error)
    else:
        log.error("%s: pass failed, again in %.1f s", key, delay, exc_info=error)
