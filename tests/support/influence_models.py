"""Models of influence of every method, on small models and data, to compare several ways to one answer."""

from __future__ import annotations

from typing import Any

import dask.array as da
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from influence_calculator import (
    ArnoldiInfluence,
    CgInfluence,
    Checkpoint,
    DirectInfluence,
    EkfacInfluence,
    GradDotInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    LograInfluence,
    NystroemSketchInfluence,
    SecondOrderMode,
    TracInInfluence,
    TrakInfluence,
)
from model_cases import CONV2D, MLP, ModelCase

FISHER = {"regularization": 0.1, "second_order_mode": SecondOrderMode.GENERALIZED_GAUSS_NEWTON}
MODELS: dict[str, Any] = {
    "direct": lambda case: DirectInfluence(case.model(), case.loss, **FISHER),
    "cg": lambda case: CgInfluence(
        case.model(), case.loss, **FISHER, rtol=1e-12, atol=0.0, solve_simultaneously=True
    ),
    "arnoldi": lambda case: ArnoldiInfluence(case.model(), case.loss, **FISHER, rank=6, max_iter=200),
    "nystroem": lambda case: NystroemSketchInfluence(case.model(), case.loss, **FISHER, rank=6),
    "ekfac": lambda case: EkfacInfluence(case.model(), True, 0.1, loss=case.loss, seed=3),
    "lissa in parts": lambda case: LissaInfluence(
        case.model(), case.loss, **FISHER, maxiter=60, batch_size=5, warn_on_max_iteration=False
    ),
    "inverse harmonic mean": lambda case: InverseHarmonicMeanInfluence(case.model(), case.loss, 0.1),
    "logra": lambda case: LograInfluence(case.model(), case.loss, 0.1, 2),
    "trak": lambda case: TrakInfluence(case.model(), case.loss, 0.1, 20),
    "grad-dot": lambda case: GradDotInfluence(case.model(), case.loss),
    "tracin": lambda case: TracInInfluence(
        case.model(), case.loss, [Checkpoint(case.build().double().state_dict(), rate) for rate in (2, 0.5)]
    ),
}
TRANSPOSED = ModelCase(
    "hugging face's linear layers",
    lambda: nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5)),
    F.cross_entropy,
    (4,),
    3,
)
WORDS = ModelCase(
    "words",
    lambda: nn.Sequential(nn.Embedding(9, 2, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)),
    F.cross_entropy,
    (3,),
    3,
    vocabulary=7,
)
CASES = [
    *((method, case) for method in MODELS for case in (MLP, CONV2D)),
    *((method, TRANSPOSED) for method in ("ekfac", "logra")),
]


def arrays(x: Tensor, y: Tensor, chunk: int) -> tuple[da.Array, da.Array]:
    return tuple(da.from_array(part.numpy(), chunks=(chunk, *part.shape[1:])) for part in (x, y))  # type: ignore[return-value]


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))
