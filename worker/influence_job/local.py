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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path

import dask
from distributed import Client, LocalCluster

from influence_job.dask_settings import SETTINGS, THREAD_SETTINGS, VISIBLE_GPUS
from influence_job.driver.reporting import ProgressTracker
from influence_job.driver.run import run
from influence_job.driver.stop import stopped_by_signals
from influence_job.identity import JobIdentity
from influence_job.progress import Progress
from influence_job.server import serving
from influence_job.spec import Device, InfluenceJob


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
        local_cluster(count, gpus) as connect,
    ):
        return run(job, identity, connect, tracker, stop)


@contextmanager
def local_cluster(workers: int, gpus: Sequence[str]) -> Iterator[Callable[[], Client]]:
    """A function that connects to a local cluster, which is started when first needed.

    Args:
        workers: processes of one thread.
        gpus: as `CUDA_VISIBLE_DEVICES` names them; each worker sees one of them, in turn.
    """
    started: list[LocalCluster] = []

    def connect() -> Client:
        if not started:
            started.append(_start(workers, gpus))
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
    with dask.config.set({**SETTINGS, "distributed.nanny.pre-spawn-environ": environ}), _ctrl_c_held():
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",  # None means 8787, which another cluster may hold
            env={**THREAD_SETTINGS, "PYTHONPATH": path, **visible},
        )


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
