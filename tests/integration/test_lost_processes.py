"""What a run loses with a worker or with the scheduler: the regions in flight, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import stored
from influence_job.dask_settings import THREAD_SETTINGS
from influence_job.exit_codes import ExitCode
from jobs import SUPPORT, Jobs, Run, times_written
from resuming import count

PACE = 0.3


class DaskProcesses:
    """A scheduler and workers, each a process that a test may kill and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def scheduler(self) -> subprocess.Popen[bytes]:
        return self._start(
            "dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--dashboard-address", ":0"
        )

    def worker(self) -> subprocess.Popen[bytes]:
        return self._start("dask_worker", self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(SUPPORT),
            **THREAD_SETTINGS,
            "BARRIER_PACE": str(PACE),
            "WRITES_LOG": str(self.folder / "writes"),
        }
        with (self.folder / f"{module}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", *arguments],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[DaskProcesses]:
    made = DaskProcesses(tmp_path)
    yield made
    made.close()


def start_driver(jobs: Jobs, dask: DaskProcesses, path: Path, **environment: str) -> Run:
    manifest = jobs.manifest({"output": {"url": str(path)}})
    with (jobs.folder / "stdout").open("wb") as out, (jobs.folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "remote_driver.py"), str(manifest), dask.address],
            cwd=jobs.folder,
            env={**os.environ, "PYTHONPATH": str(SUPPORT), **environment},
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    run = Run(process, jobs.folder)
    jobs.runs.append(run)
    return run


def regions(path: Path) -> int:
    return count(stored.held(stored.open_store(path)))["region"] if (path / "ledger").exists() else 0


def region_writes(run: Run, path: Path) -> Counter[str]:
    """How often each region was written, by whichever process."""
    written = times_written(run, path)
    return Counter({name: n for name, n in written.items() if name.startswith("influences/c/")})


def finished(run: Run, path: Path, undisturbed: object) -> None:
    run.wait()
    assert run.code == 0, run.stderr
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []


def test_a_killed_worker_costs_the_regions_it_had_in_flight(
    jobs: Jobs, dask: DaskProcesses, tmp_path: Path, undisturbed: object
) -> None:
    path = tmp_path / "result.zarr"
    dask.scheduler()
    victim, _ = dask.worker(), dask.worker()
    run = start_driver(jobs, dask, path)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    victim.kill()
    finished(run, path, undisturbed)
    twice = {name for name, times in region_writes(run, path).items() if times > 1}
    assert len(twice) <= 2, "more than the victim's regions in flight were computed again"


def test_a_scheduler_that_comes_back_costs_the_regions_in_flight(
    jobs: Jobs, dask: DaskProcesses, tmp_path: Path, undisturbed: object
) -> None:
    path = tmp_path / "result.zarr"
    scheduler = dask.scheduler()
    workers = [dask.worker(), dask.worker()]
    run = start_driver(jobs, dask, path)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    for process in (scheduler, *workers):
        process.kill()
        process.wait()
    held = regions(path)
    assert 2 <= held < 20
    dask.scheduler()
    dask.worker()
    finished(run, path, undisturbed)
    twice = {name for name, times in region_writes(run, path).items() if times > 1}
    assert len(twice) <= 20 - held, "regions that the ledger held were computed again"


def test_a_scheduler_that_stays_away_ends_the_attempt_and_the_next_one_resumes(
    jobs: Jobs, dask: DaskProcesses, tmp_path: Path, resume: Callable[..., Run]
) -> None:
    path = tmp_path / "result.zarr"
    scheduler = dask.scheduler()
    workers = [dask.worker(), dask.worker()]
    shorter = {"REMOTE_GRACE_SECONDS": "3", "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "2s"}
    run = start_driver(jobs, dask, path, **shorter)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    for process in (scheduler, *workers):
        process.kill()
        process.wait()
    run.wait()
    assert run.code == ExitCode.RETRY, run.stderr
    assert "no scheduler for 3 s" in run.stderr
    assert '"reason":"WorkersLost"' in run.stdout
    resume(path, workers=2)


def test_all_workers_may_go_and_others_come(
    jobs: Jobs, dask: DaskProcesses, tmp_path: Path, undisturbed: object
) -> None:
    path = tmp_path / "result.zarr"
    dask.scheduler()
    workers = [dask.worker(), dask.worker()]
    run = start_driver(jobs, dask, path)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    for process in workers:
        process.kill()
        process.wait()
    time.sleep(1)
    assert run.code is None, run.stderr
    dask.worker()
    finished(run, path, undisturbed)


def test_a_local_worker_that_is_killed_is_replaced(jobs: Jobs, tmp_path: Path, undisturbed: object) -> None:
    """`influence run` starts another process in its place."""
    path = tmp_path / "result.zarr"
    run = jobs.start(jobs.manifest(), output=path, pace=PACE)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    children = psutil.Process(run.process.pid).children(recursive=True)
    largest = max(children, key=lambda child: child.memory_info().rss)
    largest.send_signal(signal.SIGKILL)
    finished(run, path, undisturbed)
