"""Every method that a job may name: its fields in a job, and the library's model for the same task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray
from torch.nn import functional as F

import influence_calculator as library
import queries_task
from influence_calculator import InfluenceMode, Relative, SecondOrderMode
from influence_job.task import InfluenceTask
from jobs import Jobs

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


def job_and_library(
    name: str, mode: InfluenceMode, jobs: Jobs, path: Path, device: str, workers: int
) -> tuple[xarray.DataArray, np.ndarray]:
    """Influences in float64: those of a job, and those of the library on a processor.

    Test and training examples of the job come in chunks of which the last are not full.
    """
    fields, model = METHODS[name]
    arguments = {"test": TEST, "double": True}
    changes = {
        "task": {"entrypoint": "queries_task:task", "arguments": arguments},
        "mode": mode.name,
        "method": {"name": name, "regularization": None, **fields},
        "chunks": {"test": 3, "train": 40},
        "device": device,
    }
    jobs.finish(jobs.manifest(changes), output=path, workers=workers)
    task = queries_task.task(**arguments)
    train, test = task.train.read(0, queries_task.TRAIN), task.test.read(0, TEST)
    expected: np.ndarray = model(task).fit([train]).influences(*test, *train, mode).numpy()
    return xarray.open_zarr(path, consolidated=False)["influences"], expected
