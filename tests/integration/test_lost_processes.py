"""What a run loses with a worker or with the scheduler: the regions in flight, and nothing else.

`influence drive` with scheduler and workers in processes of their own, as in a cluster.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stored
from dask_processes import DaskProcesses, free_port
from drives import Drive, Drives
from influence_job.errors import Reason
from influence_job.exit_codes import ExitCode
from influence_job.storage.claim import inspect
from influence_job.storage.ledger import Ledger, Row
from jobs import Jobs, Run
from resuming import count

PACE = 0.3


@pytest.fixture
def path(dask: DaskProcesses, tmp_path: Path) -> Path:
    """Where results go; the workers take their time, and are the installed command: they are what is lost."""
    dask.installed = True
    dask.environment["BARRIER_PACE"] = str(PACE)
    return tmp_path / "result.zarr"


def start(drives: Drives, path: Path, **environment: str) -> Drive:
    return drives.start(drives.document({"output": {"url": str(path)}}), **environment)


def regions(path: Path) -> int:
    return count(stored.held(stored.open_store(path)))["region"] if (path / "ledger").exists() else 0


def held_regions(path: Path) -> set[str]:
    """Objects of the regions that the ledger holds."""
    rows = stored.held(stored.open_store(path))
    return {f"influences/c/0/{index}" for kind, index in rows if kind == "region"}


def twice(dask: DaskProcesses, path: Path, among: set[str] | None = None) -> dict[str, int]:
    """Regions that were written more than once, and how often."""
    written = region_writes(dask, path)
    return {n: times for n, times in written.items() if times > 1 and (among is None or n in among)}


def region_writes(dask: DaskProcesses, path: Path) -> Counter[str]:
    """How often each region was written, by whichever process."""
    written = dask.times_written(path)
    return Counter({name: n for name, n in written.items() if name.startswith("influences/c/")})


def ledger_rows(path: Path) -> list[Row]:
    """All that the ledger holds."""
    store = stored.open_store(path)
    epoch = inspect(store).latest()
    assert epoch is not None
    ledger = Ledger(store, epoch)
    ledger.load()
    return [row for kind in ledger.kinds() for row in ledger.rows(kind)]


def kill(*processes: Any) -> None:
    for process in processes:
        process.kill()
        process.wait()


def finished(run: Run, path: Path, undisturbed: Any) -> None:
    run.wait()
    assert run.code == 0, run.stderr
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []


def test_a_worker_on_another_processor_is_refused(drives: Drives, dask: DaskProcesses, path: Path) -> None:
    """At once: what it computes would keep every later attempt from resuming."""
    dask.scheduler()
    dask.worker()
    dask.environment["ATEN_CPU_CAPABILITY"] = "default"
    dask.worker()
    refused = start(drives, path)
    refused.wait()
    assert refused.code == 64, refused.stderr
    for word in ("StoreMismatch", "cpu DEFAULT", "output.allowMixedHardware: true"):
        assert word in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr
    assert len({row.environment for row in ledger_rows(path)}) == 1


def test_a_killed_worker_costs_the_regions_it_had_in_flight(
    drives: Drives, dask: DaskProcesses, path: Path, undisturbed: object
) -> None:
    dask.scheduler()
    victim, _ = dask.worker(), dask.worker()
    run = start(drives, path)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    kill(victim)
    held = held_regions(path)
    finished(run, path, undisturbed)
    assert not twice(dask, path, held), "Dask ran the victim's task again as it was submitted"


def test_a_worker_comes_back_under_its_name_and_port(
    drives: Drives, dask: DaskProcesses, path: Path, undisturbed: object
) -> None:
    """As a container that is started again in its pod."""
    port = free_port()
    dask.scheduler()
    victim = dask.worker("--name", "job-worker-a", "--worker-port", str(port))
    run = start(drives, path)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    kill(victim)
    dask.worker("--name", "job-worker-a", "--worker-port", str(port))
    finished(run, path, undisturbed)


def test_a_worker_that_is_told_to_stop_goes_at_once_and_costs_no_more_than_a_killed_one(
    drives: Drives, dask: DaskProcesses, path: Path, undisturbed: object
) -> None:
    dask.scheduler()
    victim, _ = dask.worker(), dask.worker()
    run = start(drives, path)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    held = held_regions(path)
    victim.terminate()
    victim.wait(10)
    finished(run, path, undisturbed)
    assert not twice(dask, path, held)
    assert run.last_words.regions.failed == 0


def test_a_worker_that_leaves_by_request_takes_nothing_with_it(
    drives: Drives, dask: DaskProcesses, path: Path, undisturbed: object
) -> None:
    """As at scaling down: the scheduler gives its task to another, and nobody counts a death."""
    port = free_port()
    dask.scheduler()
    leaving, _ = dask.worker("--worker-port", str(port)), dask.worker()
    run = start(drives, path)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    # Before it leaves: what it is at then it may finish while another begins it.
    held = held_regions(path)
    dask.retire(port)
    leaving.wait(30)
    finished(run, path, undisturbed)
    assert not twice(dask, path, held)


def test_a_scheduler_that_comes_back_costs_the_regions_in_flight(
    drives: Drives, dask: DaskProcesses, path: Path, undisturbed: object
) -> None:
    scheduler = dask.scheduler()
    workers = [dask.worker(), dask.worker()]
    run = start(drives, path)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    kill(scheduler, *workers)
    held = held_regions(path)
    assert 2 <= len(held) < 20
    dask.scheduler()
    dask.worker()
    finished(run, path, undisturbed)
    assert not twice(dask, path, held)
    assert sum(twice(dask, path).values()) <= 20 - len(held)


def test_a_scheduler_that_hangs_and_is_replaced_costs_no_region_of_the_ledger(
    drives: Drives, dask: DaskProcesses, path: Path, undisturbed: object
) -> None:
    """No future says that it was cancelled: of a task that is submitted again, some regions are held."""
    scheduler, worker = dask.scheduler(), dask.worker()
    run = start(drives, path, INFLUENCE_SCHEDULER_GRACE_SECONDS="8")
    run.wait_until(lambda: regions(path) >= 1, "a region in the ledger")
    scheduler.send_signal(signal.SIGSTOP)
    run.wait_until(lambda: "the scheduler was lost" in run.stderr, "the driver gives it up")
    kill(scheduler, worker)
    held = held_regions(path)
    assert 1 <= len(held) < 5, "that was a whole task of five"
    dask.scheduler()
    dask.worker()
    finished(run, path, undisturbed)
    assert not twice(dask, path, held)


def test_rows_come_before_their_tasks_end_also_from_the_second_scheduler(
    drives: Drives, dask: DaskProcesses, path: Path
) -> None:
    """The subscription to them goes with the first; without one, a task counts when all of it is done."""
    dask.environment["BARRIER_PACE"] = "2"
    scheduler, worker = dask.scheduler(), dask.worker()
    run = start(drives, path)
    run.wait_until(lambda: regions(path) >= 1, "a region in the ledger")
    kill(scheduler, worker)
    held = regions(path)
    dask.scheduler()
    dask.worker()
    run.wait_until(lambda: regions(path) > held, "another region in the ledger")
    assert sum(region_writes(dask, path).values()) < held + 5, "that was a whole task of five"


def test_a_scheduler_that_stays_away_ends_the_attempt_and_the_next_one_resumes(
    drives: Drives, dask: DaskProcesses, path: Path, resume: Callable[..., Run]
) -> None:
    scheduler = dask.scheduler()
    workers = [dask.worker(), dask.worker()]
    run = start(drives, path, INFLUENCE_SCHEDULER_GRACE_SECONDS="3")
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    kill(scheduler, *workers)
    run.wait()
    assert run.code == ExitCode.RETRY, run.stderr
    last = run.last_words.last_error
    assert last is not None
    assert last.reason == Reason.WORKERS_LOST
    assert "no scheduler for 3 s" in last.message
    assert run.last_words.recorded
    resume(path, workers=2)


def test_a_scheduler_that_hangs_keeps_no_driver_from_stopping(
    drives: Drives, dask: DaskProcesses, path: Path
) -> None:
    """Its connections stand, and nothing that is asked of it is ever answered."""
    scheduler = dask.scheduler()
    dask.worker()
    run = start(drives, path)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    scheduler.send_signal(signal.SIGSTOP)
    time.sleep(3)
    os.kill(run.process.pid, signal.SIGTERM)
    run.wait(30)
    assert run.code == ExitCode.RETRY, run.stderr
    assert run.last_words.last_error is not None
    assert run.last_words.last_error.reason == Reason.TERMINATED


def test_a_scheduler_that_hangs_for_good_is_one_that_stays_away(
    drives: Drives, dask: DaskProcesses, path: Path
) -> None:
    scheduler = dask.scheduler()
    dask.worker()
    run = start(drives, path, INFLUENCE_SCHEDULER_GRACE_SECONDS="3")
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    scheduler.send_signal(signal.SIGSTOP)
    run.wait(60)
    assert run.code == ExitCode.RETRY, run.stderr
    assert run.last_words.last_error is not None
    assert run.last_words.last_error.reason == Reason.WORKERS_LOST


def test_all_workers_may_go_and_others_come(
    drives: Drives, dask: DaskProcesses, path: Path, undisturbed: object
) -> None:
    dask.scheduler()
    workers = [dask.worker(), dask.worker()]
    run = start(drives, path)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    kill(*workers)
    time.sleep(1)
    assert run.code is None, run.stderr
    dask.worker()
    finished(run, path, undisturbed)


def test_all_workers_may_go_between_factors_and_none_that_the_ledger_holds_is_solved_again(
    drives: Drives, dask: DaskProcesses, path: Path, undisturbed: object
) -> None:
    """What has ended is nobody's to run again, the last that ended included."""
    dask.environment |= {"BARRIER": r"put before 1 ^factors/\d+/c/2/", "BARRIER_FOLDER": str(dask.folder)}
    dask.scheduler()
    workers = [dask.worker(), dask.worker()]
    run = start(drives, path)
    run.wait_until((dask.folder / "reached").exists, "a worker stands before the last factors")
    run.wait_until(lambda: count(stored.held(stored.open_store(path)))["factors"] == 2, "two in the ledger")
    kill(*workers)
    (dask.folder / "go").touch()
    held = dask.times_written(path)
    dask.worker()
    finished(run, path, undisturbed)
    pattern = re.compile(r"(factors/\d+|solver_\w+)/c/[01](/\d+)?$")
    solved = {name: times for name, times in held.items() if pattern.match(name)}
    assert solved
    assert {name: dask.times_written(path)[name] for name in solved} == solved


def test_a_local_worker_that_is_killed_is_replaced(jobs: Jobs, tmp_path: Path, undisturbed: object) -> None:
    """`influence run` starts another process in its place."""
    path = tmp_path / "result.zarr"
    run = jobs.start(jobs.manifest(), output=path, pace=PACE, installed=True)
    run.wait_until(lambda: regions(path) >= 2, "two regions in the ledger")
    run.workers[0].send_signal(signal.SIGKILL)
    finished(run, path, undisturbed)
