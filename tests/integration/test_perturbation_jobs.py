"""Jobs in mode Perturbation, with every method that a job may name: the library's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from torch.nn import functional as F

import influence_calculator as library
import queries_task
from influence_calculator import InfluenceMode, Relative, SecondOrderMode
from influence_job.task import InfluenceTask
from jobs import Jobs
from manifests import METHOD_NAMES

TEST, LAMBDA = 4, 0.05
BY_GAUSS_NEWTON = {"regularization": LAMBDA, "secondOrder": "GeneralizedGaussNewton"}
GAUSS_NEWTON: dict[str, Any] = {"second_order_mode": SecondOrderMode.GENERALIZED_GAUSS_NEWTON}
Model = Callable[[InfluenceTask], Any]
METHODS: dict[str, tuple[dict[str, Any], Model]] = {
    "Direct": (
        {**BY_GAUSS_NEWTON, "blocks": "LayerWise"},
        lambda t: library.DirectInfluence(
            t.model, F.cross_entropy, LAMBDA, library.BlockMode.LAYER_WISE, **GAUSS_NEWTON
        ),
    ),
    "Cg": (
        {**BY_GAUSS_NEWTON, "rtol": 1e-11},
        lambda t: library.CgInfluence(t.model, F.cross_entropy, LAMBDA, 1e-11, 0.0, **GAUSS_NEWTON),
    ),
    "Lissa": (
        {**BY_GAUSS_NEWTON, "maxiter": 30, "scale": 3},
        lambda t: library.LissaInfluence(
            t.model, F.cross_entropy, LAMBDA, 30, scale=3, warn_on_max_iteration=False, **GAUSS_NEWTON
        ),
    ),
    "InverseHarmonicMean": (
        {"regularization": LAMBDA},
        lambda t: library.InverseHarmonicMeanInfluence(t.model, F.cross_entropy, LAMBDA),
    ),
    "Arnoldi": (
        {**BY_GAUSS_NEWTON, "rank": 4, "tol": 1e-10, "complement": False},
        lambda t: library.ArnoldiInfluence(t.model, F.cross_entropy, LAMBDA, 4, tol=1e-10, **GAUSS_NEWTON),
    ),
    "NystroemSketch": (
        {**BY_GAUSS_NEWTON, "rank": 6, "seed": 2},
        lambda t: library.NystroemSketchInfluence(
            t.model, F.cross_entropy, LAMBDA, 6, seed=2, **GAUSS_NEWTON
        ),
    ),
    "Ekfac": (
        {"regularization": LAMBDA, "seed": 2},
        lambda t: library.EkfacInfluence(t.model, True, LAMBDA, seed=2),
    ),
    "GradDot": ({}, lambda t: library.GradDotInfluence(t.model, F.cross_entropy)),
    "TracIn": ({}, lambda t: library.TracInInfluence(t.model, F.cross_entropy, t.checkpoints)),
    "Trak": (
        {"regularization": LAMBDA, "rank": 20, "seed": 2},
        lambda t: library.TrakInfluence(t.model, F.cross_entropy, LAMBDA, 20, 2),
    ),
    "Logra": (
        {"regularization": LAMBDA, "relative": True, "rank": 3, "seed": 2},
        lambda t: library.LograInfluence(t.model, F.cross_entropy, Relative(LAMBDA), 3, 2),
    ),
}


def test_every_method_that_a_job_may_name_is_here() -> None:
    assert set(METHODS) == METHOD_NAMES


@pytest.mark.parametrize("name", METHODS)
def test_a_job_gives_the_librarys_perturbations(name: str, jobs: Jobs, tmp_path: Path) -> None:
    """Whatever chunks test and training examples come in, also such as are not full."""
    fields, model = METHODS[name]
    path, arguments = tmp_path / "result.zarr", {"test": TEST, "double": True}
    changes = {
        "task": {"entrypoint": "queries_task:task", "arguments": arguments},
        "mode": "Perturbation",
        "method": {"name": name, "regularization": None, **fields},
        "chunks": {"test": 3, "train": 40},
    }
    jobs.finish(jobs.manifest(changes), output=path, workers=1)
    task = queries_task.task(**arguments)
    train, test = task.train.read(0, queries_task.TRAIN), task.test.read(0, TEST)
    expected = model(task).fit([train]).influences(*test, *train, InfluenceMode.Perturbation).numpy()
    found = xarray.open_zarr(path, consolidated=False)["influences"]
    assert found.dims == ("test", "train", "feature_0")
    np.testing.assert_allclose(found.values, expected, rtol=1e-7, atol=1e-8 * np.abs(expected).max())
