"""A run that is killed at any moment costs what was in flight, and the rerun gives the same bits.

At random moments what is killed is the installed command with all its processes; at named points such as are
forked (`preloaded`), which differ in who imported.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import stored
from jobs import Barrier, Jobs, Run, times_written
from resuming import count

PACE = 0.15
FIT_RANGES, TEST_CHUNKS, REGIONS = 5, 3, 20


@dataclass(frozen=True)
class Kill:
    """Where a run is killed, and what its ledger then holds: kind -> least and most rows."""

    barrier: Barrier
    holds: dict[str, tuple[int, int]]
    flushed: str = ""
    """A kind of which the ledger must hold a row before the kill."""


FITTED = {"factors": (TEST_CHUNKS, TEST_CHUNKS)}
KILLS = {
    "before a region's PUT": Kill(
        Barrier("put", "before", "^influences/c/", 7), {**FITTED, "region": (1, REGIONS - 1)}, "region"
    ),
    "after a region's PUT": Kill(
        Barrier("put", "after", "^influences/c/", 7), {**FITTED, "region": (1, REGIONS - 1)}, "region"
    ),
    "before a flush of regions": Kill(Barrier("flush", "before", "region"), {**FITTED, "region": (0, 0)}),
    "after a flush of regions": Kill(
        Barrier("flush", "after", "region"), {**FITTED, "region": (1, REGIONS - 1)}
    ),
    "before a fit range": Kill(
        Barrier("read", "before", "", FIT_RANGES + 3),
        {"ranges": (FIT_RANGES, 2 * FIT_RANGES - 1), "factors": (0, 0)},
    ),
    "after a fit range": Kill(
        Barrier("report", "after", "^fit/.*/range", FIT_RANGES + 3),
        {"ranges": (FIT_RANGES, 2 * FIT_RANGES), "factors": (0, 0)},
    ),
    "on entering Loading": Kill(Barrier("enter", "before", "Loading"), {"ranges": (0, 0)}),
    "while the arrays are made": Kill(Barrier("put", "before", "zarr.json$", 8), {"ranges": (0, 0)}),
    "on entering Fitting": Kill(Barrier("enter", "before", "Fitting"), {"ranges": (0, 0)}),
    "while a fit's partial sums are deleted": Kill(
        Barrier("delete", "before", "^fit/.*/partial/", 3),
        {"ranges": (FIT_RANGES, FIT_RANGES), "factors": (0, 0)},
    ),
    "on entering Factors": Kill(
        Barrier("enter", "before", "Factors"), {"ranges": (2 * FIT_RANGES, 2 * FIT_RANGES), "factors": (0, 0)}
    ),
    "on entering Scores": Kill(Barrier("enter", "before", "Scores"), {**FITTED, "region": (0, 0)}),
    "after entering Scores": Kill(Barrier("enter", "after", "Scores"), {**FITTED, "region": (0, 0)}),
    "on entering Verifying": Kill(Barrier("enter", "before", "Verifying"), {"region": (REGIONS, REGIONS)}),
    "while the ledger is compacted": Kill(
        Barrier("delete", "before", r"^ledger/\d+-\d+$", 2), {"region": (REGIONS, REGIONS)}
    ),
}


@pytest.mark.parametrize("name", KILLS)
def test_a_run_killed_at_a_named_point_resumes_with_the_same_bits(
    name: str, jobs: Jobs, tmp_path: Path, resume: Callable[..., Run]
) -> None:
    """Two workers are killed; one or three workers finish what the ledger lacks, and only that."""
    kill, path = KILLS[name], tmp_path / "result.zarr"
    run = jobs.start(jobs.manifest(), output=path, pace=PACE, barrier=kill.barrier)
    run.wait_for_barrier()
    if kill.flushed:
        run.wait_until(lambda: _rows(path)[kill.flushed] > 0, f"a flush of a {kill.flushed}")
    run.kill()
    rows = _rows(path)
    for kind, (least, most) in kill.holds.items():
        assert least <= rows[kind] <= most, f"{kind}: expected {least} to {most} rows, got {rows}"
    resume(path, workers=1 if list(KILLS).index(name) % 2 else 3)


def test_a_run_without_a_matrix_killed_while_it_finishes_is_finished(jobs: Jobs, tmp_path: Path) -> None:
    """Of its regions nothing is left to be read back then but what is being deleted."""
    manifest = jobs.manifest({"output": {"dense": False}})
    whole, path = tmp_path / "whole.zarr", tmp_path / "result.zarr"
    jobs.finish(manifest, output=whole)
    run = jobs.start(manifest, output=path, barrier=Barrier("delete", "before", "^partials/", 3))
    run.wait_for_barrier()
    run.kill()
    assert len(list((path / "partials").rglob("*"))) > 1
    jobs.finish(manifest, output=path)
    assert stored.differing(*(stored.result(stored.open_store(url)) for url in (whole, path))) == []
    assert {file.name for file in (path / "partials").rglob("*") if file.is_file()} <= {"zarr.json"}


@pytest.mark.parametrize("number", range(5))
def test_a_run_killed_at_a_random_moment_resumes_with_the_same_bits(
    number: int, jobs: Jobs, tmp_path: Path, undisturbed: object, resume: Callable[..., Run]
) -> None:
    """The moment is counted in files written, so that it lies in the work and not in the imports."""
    seed = int(os.environ.get("KILL_SEED", secrets.randbits(32)))
    print(f"KILL_SEED={seed}")
    draw, path = random.Random(seed), tmp_path / "result.zarr"
    moment = draw.randrange(1, len(undisturbed.run.writes))
    run = jobs.start(jobs.manifest(), output=path, pace=draw.uniform(0, PACE), installed=True)
    while run.code is None and len(run.writes) < moment:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05))
    run.kill()
    print(f"killed after {len(run.writes)} writes; the ledger held {dict(_rows(path))}")
    resume(path, workers=draw.choice([1, 2, 3]))


def test_a_run_that_is_killed_again_and_again_still_ends_with_the_same_bits(
    jobs: Jobs, tmp_path: Path, resume: Callable[..., Run]
) -> None:
    """Every attempt adds to what the ones before have done."""
    path, done = tmp_path / "result.zarr", 0
    for hit in (4, 3):
        barrier = Barrier("put", "before", "^influences/c/", hit)
        run = jobs.start(jobs.manifest(), output=path, pace=PACE, barrier=barrier, installed=True)
        run.wait_for_barrier()
        run.wait_until(lambda: _rows(path)["region"] > done, "a flush of a region")  # noqa: B023
        run.kill()
        done = _rows(path)["region"]
    assert 2 <= done < REGIONS
    resume(path, workers=2)


def test_a_finished_job_run_again_computes_nothing(
    jobs: Jobs, finished_copy: Path, resume: Callable[..., Run]
) -> None:
    """It compares model and data, and leaves the result alone."""
    before = stored.result(stored.open_store(finished_copy))
    run = resume(finished_copy)
    written = times_written(run, finished_copy)
    assert not [name for name in written if name in before], written


def test_an_undisturbed_run_writes_every_region_once(undisturbed: object) -> None:
    """One region is one PUT, so a kill loses a region or nothing."""
    written = times_written(undisturbed.run, undisturbed.path)
    regions = Counter({name: n for name, n in written.items() if name.startswith("influences/c/")})
    assert regions == Counter({f"influences/c/0/{chunk}": 1 for chunk in range(REGIONS)})


def test_the_number_of_workers_does_not_change_a_bit(jobs: Jobs, tmp_path: Path, undisturbed: object) -> None:
    """Grid, ranges and micro-batches are the stored plan's, whoever computes them."""
    path = tmp_path / "result.zarr"
    jobs.finish(jobs.manifest(), output=path, workers=3)
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []


def _rows(path: Path) -> Counter[str]:
    """Ledger rows by kind, with all fit ranges as `ranges`."""
    rows = count(stored.held(stored.open_store(path)))
    rows["ranges"] = sum(n for kind, n in rows.items() if kind.startswith("fit/") and kind.endswith("/range"))
    return rows


def test_a_run_killed_while_it_overwrites_leaves_no_mixture(
    jobs: Jobs, tmp_path: Path, half_done: object, undisturbed: object
) -> None:
    """The old store is deleted to the end before anything new is written, by whichever attempt comes next."""
    path = tmp_path / "other.zarr"
    shutil.copytree(half_done.path, path)
    barrier = Barrier("delete", "before", "^(?!.influence)", 6)
    run = jobs.start(
        jobs.manifest(), "--on-existing", "Overwrite", output=path, barrier=barrier, installed=True
    )
    run.wait_for_barrier()
    run.kill()
    assert (
        0
        < len(stored.contents(stored.open_store(path)))
        < len(stored.contents(stored.open_store(half_done.path)))
    )
    rerun = jobs.finish(jobs.manifest(), output=path)
    written = times_written(rerun, path)
    assert sum(name.startswith("influences/c/") for name in written) == REGIONS
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []
