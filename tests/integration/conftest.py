"""Runs of the traced job that several tests look at, made once; a folder of jobs per test; Dask workers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

import stored
from dask_processes import DaskProcesses
from drives import Drives
from jobs import Barrier, Jobs, Run

PACE = 0.15
"""Seconds per region: with two workers the ledger is flushed before all regions are there."""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Jobs in a folder of the test's own; what still runs at its end is killed."""
    made = Jobs(tmp_path)
    yield made
    made.close()


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[DaskProcesses]:
    """Dask's processes, none of which runs yet; those of a test end with it."""
    folder = tmp_path / "dask"
    folder.mkdir()
    made = DaskProcesses(folder)
    yield made
    made.kill()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two worker processes with one thread each."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as connected,
    ):
        yield connected


@pytest.fixture
def drives(jobs: Jobs, dask: DaskProcesses) -> Drives:
    """Drivers that look for that scheduler, with its attempt's certificate."""
    return Drives(jobs, dask.tls, dask.address)


@dataclass(frozen=True)
class Reference:
    """A store that nobody may change, and the run that made it."""

    path: Path
    run: Run

    @property
    def result(self) -> dict[str, bytes]:
        """What every other run of the job must give, byte by byte."""
        return stored.result(stored.open_store(self.path))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The traced job, run once by two workers of the installed command without disturbance."""
    made = Jobs(tmp_path_factory.mktemp("undisturbed"))
    path = made.folder / "result.zarr"
    return Reference(path, made.finish(made.manifest(), "--json", output=path, installed=True))


@pytest.fixture(scope="session")
def _half_done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    made = Jobs(tmp_path_factory.mktemp("half-done"))
    path = made.folder / "result.zarr"
    run = made.start(
        made.manifest(),
        output=path,
        pace=PACE,
        barrier=Barrier("put", "before", "^influences/c/", 7),
        installed=True,
    )
    run.wait_for_barrier()
    run.wait_until(
        lambda: any(kind == "region" for kind, _ in stored.held(stored.open_store(path))), "a flush"
    )
    run.kill()
    yield Reference(path, run)
    made.close()


@pytest.fixture
def half_done(_half_done: Reference, tmp_path: Path) -> Reference:
    """A copy of the traced job's store whose run was killed when the ledger held some regions, not all."""
    path = tmp_path / "half-done.zarr"
    shutil.copytree(_half_done.path, path)
    return Reference(path, _half_done.run)


@pytest.fixture
def finished_copy(undisturbed: Reference, tmp_path: Path) -> Path:
    """A copy of the finished store, for tests that could do it harm."""
    path = tmp_path / "finished.zarr"
    shutil.copytree(undisturbed.path, path)
    return path


@pytest.fixture
def resume(undisturbed: Reference, jobs: Jobs) -> Callable[..., Run]:
    """Runs a job again on a store and checks all that resuming promises."""

    def check(path: Path, **settings: object) -> Run:
        from resuming import resume_and_check

        return resume_and_check(jobs, path, undisturbed.result, **settings)

    return check
