"""A job on this machine: a Dask cluster of one-thread processes, the same driver as in a cluster.

`run_local` is what `influence run` calls. Global Dask settings stay as they are: what this cluster needs
is set while it starts, and only there.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, Nanny, SchedulerPlugin
from tornado.ioloop import PeriodicCallback

from influence_job.dask_settings import SETTINGS, THREAD_SETTINGS, VISIBLE_GPUS
from influence_job.driver.preflight import rooted
from influence_job.driver.reporting import ProgressTracker
from influence_job.driver.run import run
from influence_job.driver.stop import stopped_by_signals
from influence_job.errors import InfrastructureError, JobError, Reason
from influence_job.identity import JobIdentity
from influence_job.progress import Progress
from influence_job.server import serving
from influence_job.spec import Device, InfluenceJob

LOOK_SECONDS = 1.0
"""Between two looks at the local workers."""
RESTART_SECONDS = 5.0
"""How long a nanny may be without a process, which it starts at once, before another takes its place."""
GRACE_SECONDS = 60.0
"""How long a local cluster may be without any worker."""


def run_local(
    job: InfluenceJob,
    *,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    progress_port: int | None = None,
    metrics_port: int | None = None,
) -> Progress:
    """Runs `job` on this machine and returns its last progress document.

    Args:
        job: the manifest.
        workers: processes; default one per GPU for `device: cuda`, else one per core this process may use.
        on_progress: called with a new document at most ten times a second, from any thread.
        progress_port: serves `/progress` and `/healthz` on 127.0.0.1.
        metrics_port: serves `/metrics` on 127.0.0.1.

    Raises:
        JobError: with the reason and the exit code.
    """
    job = rooted(job)
    sys.path.insert(0, str(Path.cwd()))
    gc.freeze()  # half of the time that the interpreter takes to exit goes into visiting torch
    identity = JobIdentity.local()
    tracker = ProgressTracker(identity, on_progress)
    on_gpus = job.spec.resolved_device is Device.CUDA
    gpus = _gpus() if on_gpus else []
    # Without a GPU to see one worker says so.
    count = workers or (max(1, len(gpus)) if on_gpus else len(os.sched_getaffinity(0)))
    with (
        serving(tracker.snapshot, "127.0.0.1", progress_port, metrics_port),
        stopped_by_signals() as stop,
        local_cluster(count, gpus, stop.ask) as connect,
    ):
        return run(job, identity, connect, tracker, stop)


@contextmanager
def local_cluster(
    workers: int, gpus: Sequence[str], on_lost: Callable[[JobError], None] = lambda _: None
) -> Iterator[Callable[[], Client]]:
    """A function that connects to a local cluster, which is started when first needed.

    Args:
        workers: processes of one thread.
        gpus: as `CUDA_VISIBLE_DEVICES` names them; each worker sees one of them, in turn.
        on_lost: called, from another thread, when no worker has come up for a minute.
    """
    started: list[LocalCluster] = []

    def connect() -> Client:
        if not started:
            started.append(_start(workers, gpus))
            _Watch(started[0], workers, on_lost).begin()
        return Client(started[0], set_as_default=False)

    try:
        yield connect
    finally:
        for cluster in started:
            # A worker that is being started in another's place may take longer to be stopped. The outcome
            # stands by now, and the workers end with this process.
            with suppress(TimeoutError):
                cluster.close(timeout=10)


def _start(workers: int, gpus: Sequence[str]) -> LocalCluster:
    visible = {VISIBLE_GPUS: ",".join(gpus)} if gpus else {}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    # Workers say as much as this process's own Dask does.
    level = logging.getLevelName(logging.getLogger("distributed").getEffectiveLevel()).lower()
    environ = dask.config.get("distributed.nanny.pre-spawn-environ") | {"DASK_LOGGING__DISTRIBUTED": level}
    settings = {**SETTINGS, "distributed.nanny.pre-spawn-environ": environ}
    with dask.config.set(settings), _ctrl_c_held():
        return LocalCluster(
            n_workers=workers,
            worker_class=partial(_nanny, settings),  # those that come later, too
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",  # None means 8787, which another cluster may hold
            env={**THREAD_SETTINGS, "PYTHONPATH": path, **visible},
        )


def _nanny(settings: Mapping[str, Any], *arguments: Any, **options: Any) -> Nanny:
    """A nanny, which takes Dask's settings when it is made."""
    with dask.config.set(settings):
        return Nanny(*arguments, **options)


class _Watch(SchedulerPlugin):
    """Keeps a local cluster at its number of workers.

    A nanny starts its worker again, but not one that dies before the nanny itself is up; and the cluster lets
    go of a nanny whose worker was away for long. Here other nannies come in their place, so that Dask gets to
    count the deaths of one task.
    """

    def __init__(self, cluster: Any, workers: int, on_lost: Callable[[JobError], None]) -> None:
        self._cluster = cluster
        self._workers = workers
        self._on_lost = on_lost
        self._seen = time.monotonic()  # when there was a worker last
        self._idle_since: dict[Nanny, float] = {}  # nannies without a process

    def begin(self) -> None:
        """Looks from now on, until the cluster is closed."""
        looks = PeriodicCallback(self.look, LOOK_SECONDS * 1000)
        self._cluster.periodic_callbacks["lost-workers"] = looks
        self._cluster.loop.add_callback(self._cluster.scheduler.add_plugin, self)
        self._cluster.loop.add_callback(looks.start)

    def remove_worker(self, *_: Any, **__: Any) -> None:
        """One that lived between two looks was a worker, too: the deaths of a task count up."""
        self._seen = time.monotonic()

    def look(self) -> None:
        """Replaces what is lost. On the cluster's loop."""
        now = time.monotonic()
        if self._cluster.scheduler.workers:
            self._seen = now
        elif now - self._seen > GRACE_SECONDS:
            message = f"no worker for {GRACE_SECONDS:.0f} s; run it again with -v to see why none stays"
            self._on_lost(InfrastructureError(Reason.WORKERS_LOST, message))
        idle = {name: nanny for name, nanny in self._cluster.workers.items() if not nanny.is_alive()}
        self._idle_since = {nanny: self._idle_since.get(nanny, now) for nanny in idle.values()}
        for name, nanny in idle.items():
            if now - self._idle_since[nanny] >= RESTART_SECONDS:
                del self._cluster.workers[name]
                self._cluster.loop.add_callback(_close, nanny)
        if len(self._cluster.workers) < self._workers:
            self._cluster.scale(self._workers)


async def _close(nanny: Nanny) -> None:
    with suppress(Exception):
        await nanny.close()


@contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """What starts meanwhile, threads and processes, never gets SIGINT, which a terminal sends to all of them.

    This process gets it when the context ends, and stops its workers itself.
    """
    resource_tracker.ensure_running()  # else the first worker starts it, and with that unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    if (named := os.environ.get(VISIBLE_GPUS)) is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
