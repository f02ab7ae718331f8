"""What the oracle says about a model case, computed once per suite."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import oracle
from influence_calculator.maths.curvature import SecondOrderMode
from model_cases import ATTENTION, CASES, TRANSFORMER, ModelCase

REGULARIZATIONS = (1e-2, 1e-1, 1.0)
"""Small enough that `(H + λI)^-1` is not `I/λ`: at λ = 1000 a solver that does nothing passes."""

CASES_AND_MODES = [
    (case, SecondOrderMode(mode))
    for case in (*CASES, TRANSFORMER, ATTENTION)
    for mode in oracle.CURVATURES
    if (case, mode) != (ATTENTION, "hessian")
]
"""ATTENTION's Hessian is too indefinite to compare solves with it."""


@dataclass(frozen=True)
class Reference:
    """Curvature and gradients of one case, in float64."""

    curvature: Tensor
    """`[P, P]`."""
    test: Tensor
    """`[T, P]`."""
    train: Tensor
    """`[N, P]`."""

    def factors(self, regularization: float) -> Tensor:
        return oracle.factors(self.curvature, regularization, self.test)

    def influences(self, regularization: float) -> Tensor:
        return oracle.influences(self.curvature, regularization, self.test, self.train)

    def bound(self, regularization: float, dtype: torch.dtype = torch.float64) -> float:
        return oracle.bound(self.curvature, regularization, dtype)


@cache
def reference(case: ModelCase, second_order: str) -> Reference:
    """The oracle's answer for one second-order mode."""
    model = case.model()
    curvature = oracle.CURVATURES[second_order](model, case.loss, *case.train())
    if second_order == "hessian":
        smallest = oracle.smallest_eigenvalue(curvature)
        assert smallest > -min(REGULARIZATIONS) / 2, (
            f"{case}: λ_min(H) = {smallest}, too indefinite to compare"
        )
    gradients = [oracle.example_gradients(model, case.loss, *data) for data in (case.test(), case.train())]
    return Reference(curvature, *gradients)
