"""Every method that a job may name: its fields in a job, and the library's model for the same task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F

import influence_calculator as library
from influence_calculator import Relative, SecondOrderMode
from influence_job.task import InfluenceTask

LAMBDA = 0.05
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
