"""How each solve ended is a value: in the store per test example, in the progress document as counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray

from jobs import Jobs

CONVERGED, MAX_ITERATIONS, INDEFINITE, NOT_FINITE = range(4)


@pytest.mark.parametrize("products", ["Local", "Distributed"])
def test_every_way_a_solve_can_end_reaches_the_store_and_the_progress_document(
    products: str, jobs: Jobs, tmp_path: Path
) -> None:
    """One iteration of CG on diag(1, 2, 4, -3, ∞) with right-hand sides that are chosen for it; the last two
    are zero.
    """
    path = tmp_path / "factors.zarr"
    changes = {
        "task": {"entrypoint": "solver_task:task", "arguments": {"zeros": 2}},
        "operation": "InfluenceFactors",
        "method": {
            **{"name": "Cg", "regularization": 0.01, "maxiter": 1, "rtol": 1e-4},
            "products": products,
        },
        "chunks": {"test": 2, "train": 3},
    }
    run = jobs.finish(jobs.manifest(changes), "--json", output=path)
    opened = xarray.open_zarr(path)
    expected = [CONVERGED, MAX_ITERATIONS, INDEFINITE, NOT_FINITE, CONVERGED, CONVERGED]
    assert opened["solver_status"].values.tolist() == expected
    assert opened["solver_status"].dims == ("test",)
    assert opened["solver_iterations"].values[:2].tolist() == [1, 1]
    residual = opened["solver_residual"].values
    assert residual[0] <= 1e-4
    assert 1e-4 < residual[1] < np.inf
    factors = xarray.open_zarr(path / "factors", consolidated=False)["0"].values
    assert np.isnan(factors[3]).all()
    assert not factors[4:].any()
    document = json.loads(run.stdout)
    assert document["solver"] == {"converged": 3, "maxIterations": 1, "indefinite": 1, "notFinite": 1}
    assert any("solver_status" in warning for warning in document["warnings"])


def test_every_way_in_which_lissa_ends_reaches_them_too(jobs: Jobs, tmp_path: Path) -> None:
    """Four steps on diag(1, 2, 4, -3, ∞): what grows has no answer."""
    path = tmp_path / "factors.zarr"
    method = {"name": "Lissa", "regularization": 0.01, "maxiter": 4, "rtol": 0.1, "scale": 2.11}
    changes = {
        "task": {"entrypoint": "solver_task:task"},
        "operation": "InfluenceFactors",
        "method": method,
        "chunks": {"test": 2, "train": 3},
    }
    document = json.loads(jobs.finish(jobs.manifest(changes), "--json", output=path).stdout)
    opened = xarray.open_zarr(path)
    assert opened["solver_status"].values.tolist() == [CONVERGED, MAX_ITERATIONS, NOT_FINITE, NOT_FINITE]
    assert opened["solver_iterations"].values[:2].tolist() == [4, 4]
    assert opened["solver_residual"].values[0] <= 0.1 < opened["solver_residual"].values[1]
    assert document["solver"] == {"converged": 1, "maxIterations": 1, "indefinite": 0, "notFinite": 2}


def test_what_lissa_needs_is_told_in_the_progress_document(jobs: Jobs, tmp_path: Path) -> None:
    changes = {
        "task": {"arguments": {"train": 96, "test": 8}},
        "operation": "InfluenceFactors",
        "method": {
            "name": "Lissa",
            "regularization": 0.05,
            "scale": 0.03,
            "secondOrder": "GeneralizedGaussNewton",
        },
    }
    run = jobs.finish(jobs.manifest(changes), "--json", output=tmp_path / "factors.zarr")
    document = json.loads(run.stdout)
    assert document["solver"]["notFinite"] == 8
    assert any("LiSSA needs a scale above half of it" in warning for warning in document["warnings"])


def test_a_job_that_is_run_again_tells_the_status_of_all_solves(jobs: Jobs, tmp_path: Path) -> None:
    """The counts come from the store, so those of earlier attempts are among them."""
    path = tmp_path / "result.zarr"
    changes = {
        "task": {"arguments": {"train": 96, "test": 8}},
        "method": {
            "name": "Cg",
            "regularization": 0.05,
            "maxiter": 1,
            "secondOrder": "GeneralizedGaussNewton",
        },
        "chunks": {"test": 4, "train": 48},
    }
    first = json.loads(jobs.finish(jobs.manifest(changes), "--json", output=path).stdout)
    assert first["solver"]["maxIterations"] == 8
    second = json.loads(jobs.finish(jobs.manifest(changes), "--json", output=path).stdout)
    assert second["solver"] == first["solver"]
