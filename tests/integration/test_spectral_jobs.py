"""Jobs with the methods that know the curvature by a few directions, whose fits take many passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
import xarray
from torch import Tensor

import stored
import traced_task
from influence_calculator import ArnoldiInfluence, NystroemSketchInfluence, SecondOrderMode
from influence_calculator.torch.blockwise import TorchBlockwiseInfluence
from jobs import Jobs

TEST = 8
SMALL: dict[str, Any] = {
    "task": {"arguments": {"train": 96, "test": TEST}},
    "chunks": {"test": 4, "train": 48},
}
CURVATURE = {"regularization": 0.05, "secondOrder": "GeneralizedGaussNewton"}
METHODS: dict[str, dict[str, Any]] = {
    "Arnoldi": {"name": "Arnoldi", "rank": 4, "krylovDimension": 12, **CURVATURE},
    "Arnoldi without complement": {
        **{"name": "Arnoldi", "rank": 4, "krylovDimension": 12, "complement": False},
        **CURVATURE,
    },
    "Nyström": {"name": "NystroemSketch", "rank": 6, **CURVATURE},
}


def changed(method: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**SMALL, "method": method, **more}


def in_memory(method: dict[str, Any]) -> TorchBlockwiseInfluence:
    """The library's model with the same values, fitted to the same examples."""
    task = traced_task.task(train=96, test=TEST)
    mode = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
    data = [task.train.read(0, 96)]

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y)

    if method["name"] == "NystroemSketch":
        sketch = NystroemSketchInfluence(task.model, loss, 0.05, method["rank"], second_order_mode=mode)
        return sketch.fit(data)
    model = ArnoldiInfluence(
        task.model,
        loss,
        0.05,
        method["rank"],
        method["krylovDimension"],
        second_order_mode=mode,
        use_woodbury=method.get("complement", True),
    )
    return model.fit(data)


def assert_close(found: np.ndarray, expected: Tensor) -> None:
    values = expected.numpy()
    assert found.shape == values.shape
    assert np.linalg.norm(found - values) <= 1e-3 * np.linalg.norm(values)


@pytest.mark.parametrize("name", METHODS)
def test_a_job_gives_the_librarys_influences(name: str, jobs: Jobs, tmp_path: Path) -> None:
    path, method = tmp_path / "result.zarr", METHODS[name]
    run = jobs.finish(jobs.manifest(changed(method)), "--json", output=path)
    task = traced_task.task(train=96, test=TEST)
    test, train = task.test.read(0, TEST), task.train.read(0, 96)
    assert_close(xarray.open_zarr(path)["influences"].values, in_memory(method).influences(*test, *train))
    document = json.loads(run.stdout)
    assert document["solver"]["converged"] == TEST
    assert document["warnings"] == []
    width = 4 if method.get("complement") is False else 53
    assert xarray.open_zarr(path / "factors")["0"].shape == (TEST, width)
    left = {name.split("/")[1] for name in stored.open_store(path).list("fit/") if name.count("/") == 2}
    assert len(left) == 1, left  # each pass of a series takes over from the one before
    ran = {kind for kind, _ in stored.held(stored.open_store(path)) if kind.endswith("/unit")}
    assert len(ran) < 25, "the series ends when all is found"


def test_factors_without_complement_are_stored_by_parameter_and_scored_by_another_job(
    jobs: Jobs, tmp_path: Path
) -> None:
    """Only where nobody sees them are they as narrow as the rank."""
    method = METHODS["Arnoldi without complement"]
    factors, scores, narrow = (tmp_path / name for name in ("factors.zarr", "scores.zarr", "narrow.zarr"))
    jobs.finish(jobs.manifest(changed(method, operation="InfluenceFactors")), output=factors)
    task = traced_task.task(train=96, test=TEST)
    found = xarray.open_zarr(factors / "factors")["0"].values
    assert_close(found, in_memory(method).influence_factors(*task.test.read(0, TEST)))
    more = {"operation": "InfluencesFromFactors", "factors": {"url": str(factors)}}
    jobs.finish(jobs.manifest(changed(method, **more)), output=scores)
    jobs.finish(jobs.manifest(changed(method)), output=narrow)
    one, other = (xarray.open_zarr(path)["influences"].values for path in (scores, narrow))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize(
    ("method", "counted", "told"),
    [
        ({**METHODS["Arnoldi"], "krylovDimension": 6, "maxIter": 0}, "maxIterations", "have not converged"),
        (
            {"name": "NystroemSketch", "rank": 6, "regularization": 1e-4},
            "indefinite",
            "the sketch takes negative curvature for 0",
        ),
    ],
    ids=["Arnoldi", "Nyström"],
)
def test_what_a_fit_cannot_promise_reaches_the_store_and_the_progress_document(
    method: dict[str, Any], counted: str, told: str, jobs: Jobs, tmp_path: Path
) -> None:
    path = tmp_path / "result.zarr"
    document = json.loads(jobs.finish(jobs.manifest(changed(method)), "--json", output=path).stdout)
    assert document["solver"][counted] == TEST
    assert any(told in warning for warning in document["warnings"])
    assert set(xarray.open_zarr(path)["solver_status"].values) == {1 if counted == "maxIterations" else 2}
