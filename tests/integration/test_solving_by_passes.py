"""Jobs whose workers share every iteration of conjugate gradients: the numbers, the bits, kills."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

import stored
from jobs import Barrier, Jobs, times_written
from resuming import count, resume_and_check

TEST, CHUNKS, RANGES = 6, 2, 5
CURVATURE = {"regularization": 0.1, "secondOrder": "GeneralizedGaussNewton"}
METHOD: dict[str, Any] = {"name": "Cg", "rtol": 1e-2, "products": "Distributed", **CURVATURE}
JOB: dict[str, Any] = {
    "task": {"arguments": {"test": TEST, "double": True}},
    "method": METHOD,
    "chunks": {"test": 4, "train": 128},
}
"""Two chunks of test examples, each solved over five ranges of the training data."""


def local(job: dict[str, Any]) -> dict[str, Any]:
    """The same with one worker per chunk of test examples."""
    return {**job, "method": {**job["method"], "products": "Local"}}


def assert_close(found: np.ndarray, expected: np.ndarray, bound: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound * np.abs(expected).max())


def rows(path: Path) -> Counter[str]:
    """Ledger rows by kind."""
    return count(stored.held(stored.open_store(path)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The job, run once by two workers: where its store is, and the run."""
    jobs = Jobs(tmp_path_factory.mktemp("undisturbed"))
    path = jobs.folder / "result.zarr"
    run = jobs.finish(jobs.manifest(JOB), "--json", output=path)
    yield path, run
    jobs.close()


def test_shared_products_give_what_one_worker_gives(undisturbed: Any, jobs: Jobs, tmp_path: Path) -> None:
    """In float64, as many iterations with the same numbers; both store how each solve ended."""
    path, run = undisturbed
    alone = tmp_path / "alone.zarr"
    jobs.finish(jobs.manifest(local(JOB)), output=alone)
    one, other = xarray.open_zarr(path), xarray.open_zarr(alone)
    expected = other["influences"].values
    assert_close(one["influences"].values, expected, 1e-9)
    assert one["solver_iterations"].values.tolist() == other["solver_iterations"].values.tolist()
    np.testing.assert_allclose(one["solver_residual"].values, other["solver_residual"].values, rtol=1e-6)
    np.testing.assert_array_equal(one["test_label"].values, other["test_label"].values)
    assert json.loads(run.stdout)["solver"]["converged"] == TEST
    assert stored.plan_of(stored.open_store(path)).solves_by_passes
    assert not stored.plan_of(stored.open_store(alone)).solves_by_passes


def test_every_pass_is_one_over_all_ranges_and_nothing_of_it_stays(undisturbed: Any) -> None:
    path, run = undisturbed
    held, written = rows(path), times_written(run, path)
    iterations = xarray.open_zarr(path)["solver_iterations"].values
    for chunk, most in enumerate((iterations[:4].max(), iterations[4:].max())):
        passes = held[f"fit/solve/{chunk}/unit"] - 1  # the first unit is what they start from
        assert most < passes <= most + 3, "an iteration each, and products that check what is done"
        assert held[f"fit/solve/{chunk}/range"] == passes * RANGES
        partial = re.compile(rf"fit/solve/{chunk}/\d+/partial/\d+/0")
        assert sum(n for name, n in written.items() if partial.fullmatch(name)) == passes * RANGES
    assert stored.open_store(path).list("fit/solve/") == []


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_bits(
    workers: int, undisturbed: Any, jobs: Jobs, tmp_path: Path
) -> None:
    path, _ = undisturbed
    jobs.finish(jobs.manifest(JOB), output=tmp_path / "result.zarr", workers=workers)
    found = stored.result(stored.open_store(tmp_path / "result.zarr"))
    assert stored.differing(found, stored.result(stored.open_store(path))) == []


KILLS = {
    "in a range of a later iteration": Barrier("put", "before", "^fit/solve/0/3/partial/3/"),
    "before what an iteration leaves": Barrier("put", "before", "^fit/solve/1/3/0$"),
    "while the iteration before it is deleted": Barrier("delete", "before", "^fit/solve/1/2/0$"),
    "before the factors": Barrier("put", "before", "^factors/0/c/1/"),
    "while the last iteration is deleted": Barrier("delete", "before", "^fit/solve/0/{last}/0$"),
}


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_solve_goes_on_with_the_last_iteration_and_the_same_bits(
    name: str, undisturbed: Any, jobs: Jobs, tmp_path: Path
) -> None:
    """Nothing that the ledger holds is computed again: finished iterations least of all."""
    reference, _ = undisturbed
    last = rows(reference)["fit/solve/0/unit"] - 1
    kill, path = KILLS[name], tmp_path / "killed.zarr"
    barrier = Barrier(kill.function, kill.when, kill.pattern.replace("{last}", str(last)))
    run = jobs.start(jobs.manifest(JOB), output=path, barrier=barrier)
    run.wait_for_barrier()
    run.kill()
    held = rows(path)
    there = {path.split("/")[3] for path in stored.open_store(path).list("fit/solve/")}
    assert len(there) <= 2, "a state, and the sums or the state of the pass that follows"
    assert held["region"] == 0
    assert held["factors"] == (1 if re.search("solve/1|c/1|last", kill.pattern) else 0)
    expected = stored.result(stored.open_store(reference))
    rerun = resume_and_check(jobs, path, expected, JOB, workers=1 if list(KILLS).index(name) % 2 else 3)
    begun = [n for n in times_written(rerun, path) if re.match(r"fit/solve/\d+/0/", n)]
    assert len(begun) == CHUNKS - (held["fit/solve/0/unit"] > 0) - (held["fit/solve/1/unit"] > 0)


PERTURBATION = {
    "task": {"arguments": {"test": 3, "double": True}},
    "mode": "Perturbation",
    "method": {
        **{"name": "Cg", "regularization": 0.05, "secondOrder": "EmpiricalFisher", "rtol": 1e-2},
        **{"blocks": "LayerWise", "preconditioner": {"name": "Nystroem", "rank": 8}},
        "products": "Distributed",
    },
    "chunks": {"test": 3, "train": 160},
}
ITSELF = {
    "task": {"arguments": {"test": 2, "train": 200, "double": True}},
    "operation": "SelfInfluence",
    "method": {
        **METHOD,
        **{"regularization": 5, "relative": True, "rtol": 1e-10, "preconditioner": {"name": "Jacobi"}},
    },
    "chunks": {"train": 100, "test": None},
}


@pytest.mark.parametrize(
    ("job", "array"),
    [(PERTURBATION, "influences"), (ITSELF, "self_influences")],
    ids=["perturbation, block by block, after a Nyström pass", "self-influence, after a trace and Jacobi's"],
)
def test_other_modes_and_operations_after_passes_of_a_fit(
    job: dict[str, Any], array: str, jobs: Jobs, tmp_path: Path
) -> None:
    found = []
    for number, each in enumerate((job, local(job))):
        path = tmp_path / f"{number}.zarr"
        jobs.finish(jobs.manifest(each), output=path)
        found.append(xarray.open_zarr(path, consolidated=False))
    expected = found[1][array].values
    assert_close(found[0][array].values, expected, 1e-8)
    assert found[0]["solver_status"].values.tolist() == found[1]["solver_status"].values.tolist()


def test_the_plan_tells_of_the_shared_passes_and_of_their_bytes_in_the_store(jobs: Jobs) -> None:
    text = " ".join(jobs.plan(jobs.manifest(JOB)).stdout.split())
    assert "and 2 for each iteration of the solver, shared by the workers in 5 ranges" in text
    planned, alone = (json.loads(jobs.plan(jobs.manifest(j), "--json").stdout) for j in (JOB, local(JOB)))
    assert planned["solvesByPasses"] is True
    assert alone["solvesByPasses"] is False
    # Of four rows: their sums over five ranges, and two states of x, b, r and what is multiplied.
    more = planned["memory"]["Factors"]["scratch"] - alone["memory"]["Factors"]["scratch"]
    assert more == 4 * 53 * 8 * (5 + 2 * 4)
