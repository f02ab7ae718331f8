"""An influence model that is arithmetic one can do by hand, and counts what it is asked for.

The gradient of an example is `x · y` (y one number), the curvature the identity: factors are gradients,
influences `x_test · x · y_test · y`, perturbations `y · y_test · x_test`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_calculator import InfluenceFunctionModel, InfluenceMode

FEATURES = 3


class CountingModel(InfluenceFunctionModel[Tensor, Iterable[Any]]):
    """Counts by name: `factors`, `scores`, and the rows of each."""

    def __init__(self, is_thread_safe: bool = False, is_fitted: bool = True, ballast: int = 0) -> None:
        self.calls: Counter[str] = Counter()
        self.rows_per_score: list[int] = []
        self.scale = 1.0
        self.ballast = np.random.default_rng(0).random(ballast)
        self._is_thread_safe = is_thread_safe
        self._is_fitted = is_fitted

    @property
    def n_parameters(self) -> int:
        return FEATURES

    @property
    def is_thread_safe(self) -> bool:
        return self._is_thread_safe

    @property
    def is_fitted(self) -> bool:
        return self._is_fitted

    @property
    def factor_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def fit(self, data: Iterable[Any]) -> CountingModel:
        self._is_fitted = True
        self.revision += 1
        return self

    def _influence_factors(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls["factors"] += 1
        return self.scale * x.float() * y.float().reshape(-1, 1)

    def _influences(
        self,
        x_test: Tensor,
        y_test: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> Tensor:
        x, y = (x_test, y_test) if x is None or y is None else (x, y)
        return self.influences_from_factors(self._influence_factors(x_test, y_test), x, y, mode)

    def influences_from_factors(
        self, z_test_factors: Tensor, x: Tensor, y: Tensor, mode: InfluenceMode = InfluenceMode.Up
    ) -> Tensor:
        self.calls["scores"] += 1
        self.rows_per_score.append(len(z_test_factors))
        if mode is InfluenceMode.Up:
            return z_test_factors @ (x.float() * y.float().reshape(-1, 1)).T
        return torch.einsum("tp,n->tnp", z_test_factors, y.float().reshape(-1))


class NarrowModel(CountingModel):
    """Sends its factors without the last column where that holds nothing but zeros."""

    def left(self, x: Tensor, y: Tensor) -> Tensor:
        factors = self._influence_factors(x, y)
        return factors if factors[:, -1].any() else factors[:, :-1]

    def expanded(self, left: Tensor) -> Tensor:
        self.calls["expanded"] += 1
        return torch.nn.functional.pad(left, (0, FEATURES - left.shape[1]))


class TurnedModel(CountingModel):
    """Scores in coordinates of its own, factors times -2, and counts what it turns as `turned`."""

    def left(self, x: Tensor, y: Tensor) -> Tensor:
        return -2 * self._influence_factors(x, y)

    def left_of_factors(self, z_test_factors: Tensor) -> Tensor:
        self.calls["turned"] += 1
        return -2 * z_test_factors

    def influences_from_left(self, left: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return super().influences_from_factors(left / -2, x, y)

    def influences_from_factors(
        self, z_test_factors: Tensor, x: Tensor, y: Tensor, mode: InfluenceMode = InfluenceMode.Up
    ) -> Tensor:
        if mode is InfluenceMode.Up:
            raise AssertionError("a calculator turns a group once, and then scores what it turned")
        return super().influences_from_factors(z_test_factors, x, y, mode)
