"""A fit that is killed goes on with what the ledger holds of it, and gives the bits of an undisturbed one.

EK-FAC's passes are in `test_kills`, those of a solve in `test_solving_by_passes`.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import stored
from jobs import Barrier, Jobs, Run, times_written
from resuming import count, resume_and_check

RANGES = 5
GAUSS_NEWTON = {"regularization": 0.05, "secondOrder": "GeneralizedGaussNewton"}
METHODS: dict[str, dict[str, Any]] = {
    "Arnoldi": {"name": "Arnoldi", "rank": 4, "krylovDimension": 12, "complement": False, **GAUSS_NEWTON},
    "NystroemSketch": {"name": "NystroemSketch", "rank": 6, "regularization": 0.05, "relative": True},
    "Trak": {"name": "Trak", "rank": 20, "regularization": 0.05},
    "Direct": {"name": "Direct", **GAUSS_NEWTON},
}
"""The sketch is one of the Hessian: a pass before it takes the trace, those after it a search."""


@dataclass(frozen=True)
class Kill:
    """Where a fit of this method is killed, once its ledger holds rows of a kind."""

    method: str
    barrier: Barrier
    kind: str
    least: int = 1


def in_range(method: str, step: str) -> Kill:
    """Another worker goes on meanwhile."""
    return Kill(method, Barrier("put", "before", f"^fit/{step}/partial/3/"), f"fit/{step}/range")


def leaving(method: str, step: str) -> Kill:
    return Kill(method, Barrier("put", "before", f"^fit/{step}/0"), f"fit/{step}/range", RANGES)


KILLS = {
    "Arnoldi, in a range of a later pass": in_range("Arnoldi", "krylov-2"),
    "Arnoldi, before what a pass leaves": leaving("Arnoldi", "krylov-3"),
    "Arnoldi, while the pass before it is deleted": Kill(
        "Arnoldi", Barrier("delete", "before", "^fit/krylov-2/"), "fit/krylov-2/unit"
    ),
    "Nyström, in a range of the sketch": in_range("NystroemSketch", "nystroem"),
    "Nyström, in a range of the search after it": in_range("NystroemSketch", "probe-1"),
    "Trak, in a range": in_range("Trak", "projected"),
    "Direct, in a range": in_range("Direct", "curvature"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, bytes]]]:
    """What a method's job gives, which is run once."""
    jobs, found = Jobs(tmp_path_factory.mktemp("undisturbed")), {}

    def result(method: str) -> dict[str, bytes]:
        if method not in found:
            path = jobs.folder / f"{method}.zarr"
            jobs.finish(jobs.manifest({"method": METHODS[method]}), output=path)
            found[method] = stored.result(stored.open_store(path))
        return found[method]

    yield result
    jobs.close()


def rows(path: Path) -> Counter[str]:
    return count(stored.held(stored.open_store(path)))


def stopped(jobs: Jobs, kill: Kill, path: Path) -> Run:
    """A run that stands at the barrier, with the rows in its ledger."""
    run = jobs.start(jobs.manifest({"method": METHODS[kill.method]}), output=path, barrier=kill.barrier)
    run.wait_for_barrier()
    run.wait_until(lambda: rows(path)[kill.kind] >= kill.least, f"{kill.least} rows {kill.kind}")
    return run


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_goes_on_with_the_same_bits(
    name: str, jobs: Jobs, tmp_path: Path, undisturbed: Callable[[str], dict[str, bytes]]
) -> None:
    kill, path = KILLS[name], tmp_path / "killed.zarr"
    expected = undisturbed(kill.method)
    stopped(jobs, kill, path).kill()
    held = rows(path)
    assert held["factors"] == 0
    rerun = resume_and_check(jobs, path, expected, {"method": METHODS[kill.method]}, workers=1)
    if kill.method == "Arnoldi":
        assert held["fit/krylov-1/unit"] == 1
    finished = {kind.split("/")[1] for kind in held if kind.endswith("/unit")}
    again = [name for name in times_written(rerun, path) if name.startswith("fit/") and "partial" in name]
    assert not [name for name in again if name.split("/")[1] in finished]


@pytest.mark.parametrize("name", ["Nyström, in a range of the sketch", "Trak, in a range"])
def test_a_killed_worker_costs_its_range_alone(
    name: str, jobs: Jobs, tmp_path: Path, undisturbed: Callable[[str], dict[str, bytes]]
) -> None:
    kill, path = KILLS[name], tmp_path / "killed.zarr"
    expected = undisturbed(kill.method)
    run = stopped(jobs, kill, path)
    os.kill(int((run.folder / "ticket-1").read_text()), signal.SIGKILL)
    assert run.wait().code == 0, run.stderr
    partial = kill.kind.replace("/range", "/partial/")
    written = {name: n for name, n in times_written(run, path).items() if name.startswith(partial)}
    assert len({name.split("/")[3] for name in written}) == RANGES
    assert set(written.values()) == {1}
    assert stored.differing(stored.result(stored.open_store(path)), expected) == []
