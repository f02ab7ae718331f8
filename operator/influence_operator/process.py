"""Puts the operator's parts together and runs them until it is told to stop or loses the lease.

The order: probes are served at once; the lease is awaited (a standby is ready and does nothing); then the
watches start, and once they have told everything that exists, the passes. Called by `influence_operator.cli`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from kubernetes.aio.client import Configuration

from influence_operator import handlers
from influence_operator.cluster.api import Api, credentials
from influence_operator.cluster.apply import Applier
from influence_operator.cluster.audiences import own_audiences
from influence_operator.cluster.cache import Cache, JobKey
from influence_operator.cluster.driver import DriverClient
from influence_operator.cluster.errors import ClusterError, LeaseLostError
from influence_operator.cluster.events import Events
from influence_operator.cluster.gather import Gatherer
from influence_operator.cluster.kinds import DASK_KINDS, INFLUENCE_JOB, WATCHED_KINDS, Kind
from influence_operator.cluster.lease import Lease
from influence_operator.cluster.scheduler import SchedulerClient
from influence_operator.cluster.status import Rate, StatusWriter
from influence_operator.cluster.watching import Watches
from influence_operator.health import serving
from influence_operator.metrics import Metrics
from influence_operator.reconciler import Reconciler
from influence_operator.settings import Settings
from influence_operator.work_queue import WorkQueue

SILENCE = 300.0
"""Seconds without a sign of life from a watch after which `/healthz` fails: several of kopf's timeouts of
70 s, after each of which it connects anew by itself."""
LOOK_SECONDS = 5.0
"""Until kinds that the API server does not serve are looked for again."""
STOP_SECONDS = 2.0
"""For passes to end when the process is told to stop."""
CORE_KINDS = tuple(kind for kind in WATCHED_KINDS if kind not in DASK_KINDS)

log = logging.getLogger(__name__)


async def run(settings: Settings) -> int:
    """Runs one replica; returns its exit code: 0 when told to stop, 1 when it must start anew."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    configuration = await credentials()
    settings = await with_own_audiences(settings, configuration)
    async with AsyncExitStack() as stack:
        replica = Replica(settings, configuration)
        stack.push_async_callback(replica.close)
        await stack.enter_async_context(
            serving(
                settings.health_port, settings.metrics_port, replica.sick, replica.unready, replica.scrape
            )
        )
        return await _until(stop, replica)


async def with_own_audiences(settings: Settings, configuration: Configuration) -> Settings:
    """The settings with the audiences of the operator's own token beside those that were given."""
    audiences = (*settings.api_audiences, *await own_audiences(configuration))
    return replace(settings, api_audiences=tuple(dict.fromkeys(audiences)))


async def _until(stop: asyncio.Event, replica: Replica) -> int:
    stopping = asyncio.create_task(stop.wait(), name="stop")
    working = asyncio.create_task(replica.run(), name="work")
    await asyncio.wait((stopping, working), return_when=asyncio.FIRST_COMPLETED)
    code = 0 if stop.is_set() else 1
    stopping.cancel()
    if not working.done():
        log.info("told to stop")
        working.cancel()
        await asyncio.wait((working,), timeout=STOP_SECONDS)
    elif error := working.exception():
        lost = _lost(error)
        log.error("ends: %s", lost or "a defect", exc_info=None if lost else error)
    await replica.release()
    return code


def _lost(error: BaseException) -> LeaseLostError | None:
    """The loss of the lease in an error or in a group of errors."""
    if isinstance(error, BaseExceptionGroup):
        return next((lost for inner in error.exceptions if (lost := _lost(inner))), None)
    return error if isinstance(error, LeaseLostError) else None


class Replica:
    """One process of the operator, leading or standing by."""

    def __init__(self, settings: Settings, configuration: Configuration) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._api = Api(configuration, self._metrics)
        self._lease = Lease(
            self._api, settings.namespace, settings.lease_name, settings.pod, settings.lease_seconds
        )
        self._cache = Cache()
        self._drivers, self._schedulers = DriverClient(), SchedulerClient()
        self._reconciler = self._make_reconciler()
        self._watches = Watches(self._reconciler.seen, self._listed, configuration, settings.watch_namespaces)
        self._leads = False

    async def run(self) -> None:
        """Waits for the lease and then leads, for ever.

        Raises:
            LeaseLostError: also inside an exception group.
        """
        await self._lease.acquire()
        self._api.fenced(self._lease.left)
        self._leads = True
        self._metrics.leads()
        log.info("leading")
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lease.keep())
            group.create_task(self._watch())
            group.create_task(self._reconciler.run())

    async def release(self) -> None:
        """Lets another replica lead."""
        await self._lease.release()

    async def close(self) -> None:
        """Ends all connections."""
        for client in (self._drivers, self._schedulers, self._api):
            await client.close()

    def stop_watching(self) -> None:
        """Ends the watches' threads, for whoever outlives them; the operator's process does not."""
        self._watches.stop()

    def sees_dask(self) -> bool:
        """Whether the API server serves the kinds of dask-kubernetes."""
        return all(self._watches.serves(kind) for kind in DASK_KINDS)

    def told(self, namespace: str) -> bool:
        """Whether the watches have told everything of a namespace."""
        return self._watches.told(namespace)

    def sick(self) -> str | None:
        """Why the process should be started anew; None while it is well."""
        silence = self._watches.silence()
        return f"no watch event for {silence:.0f} s" if self._leads and silence > SILENCE else None

    def unready(self) -> str | None:
        """Why it cannot lead, or stand by, yet."""
        return "the watches have not told everything yet" if self._leads and not self._ready() else None

    def scrape(self) -> bytes:
        """The answer of `/metrics`."""
        phases = Counter(str((job.get("status") or {}).get("phase", "Pending")) for job in self._cache.jobs())
        return self._metrics.text(phases)

    def _make_reconciler(self) -> Reconciler:
        settings, api, cache = self._settings, self._api, self._cache
        queue: WorkQueue[JobKey] = WorkQueue(asyncio.get_running_loop().time)
        events = Events(api, settings.pod)
        self._metrics.observe_queue(queue.depth, queue.oldest)
        return Reconciler(
            settings,
            cache,
            queue,
            Gatherer(api, cache, events, self._drivers, self.sees_dask, clock=_now),
            Applier(api, cache, self._schedulers, _now),
            StatusWriter(api, cache, Rate(settings.status_writes_per_second)),
            events,
            self._metrics,
            _now,
            self.told,
        )

    async def _watch(self) -> None:
        """Watches every kind as soon as the API server serves it.

        Raises:
            RuntimeError: kopf ended.
        """
        self._metrics.observe_watches(self._watches.silence)
        await self._served((INFLUENCE_JOB,))
        with_dask = all([await self._look(kind) for kind in DASK_KINDS])
        self._start(WATCHED_KINDS if with_dask else CORE_KINDS)
        if not with_dask:
            later = asyncio.create_task(self._watch_dask_later(), name="look for dask")
            later.add_done_callback(partial(_pass_on, self._watches.failed))
        await self._watches.failed

    async def _watch_dask_later(self) -> None:
        await self._served(DASK_KINDS)
        self._reconciler.open(False)
        self._start(DASK_KINDS)

    async def _served(self, kinds: tuple[Kind, ...]) -> None:
        told = False
        while not all([await self._look(kind) for kind in kinds]):
            if not told:
                log.warning("waiting for the CRDs of %s", ", ".join(kind.plural for kind in kinds))
            told = True
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self, kind: Kind) -> bool:
        try:
            return await self._api.serves(kind)
        except ClusterError as error:
            log.warning("cannot look for %s: %s", kind.plural, error)
            return False

    def _start(self, kinds: tuple[Kind, ...]) -> None:
        self._watches.start(kinds, handlers.registry(kinds, self._watches.tell))

    def _listed(self) -> None:
        if self._ready():
            self._reconciler.open(True)
            self._reconciler.all_due()

    def _ready(self) -> bool:
        return self._watches.serves(INFLUENCE_JOB) and self._watches.complete()


def _pass_on(failed: asyncio.Future[None], task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) and not failed.done():
        failed.set_exception(error)


def _now() -> datetime:
    return datetime.now(UTC)
