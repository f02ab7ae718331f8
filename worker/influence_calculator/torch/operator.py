"""Operators under pyDVL's module path: matrices of the training data, what inverts them, a plain matrix."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.torch.data_operators import (
    GaussNewtonOperator,
    HessianOperator,
    InverseHarmonicMeanOperator,
)
from influence_calculator.torch.inverse_operators import (
    DirectSolveOperator,
    InverseOperator,
    LowRankOperator,
)
from influence_calculator.torch.iterative_operators import CgOperator, LissaOperator
from influence_calculator.torch.tensor_operator import RowsOperator

__all__ = [
    "CgOperator",
    "DirectSolveOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "InverseHarmonicMeanOperator",
    "InverseOperator",
    "LissaOperator",
    "LowRankOperator",
    "MatrixOperator",
]


class MatrixOperator(RowsOperator):
    """`A v` of a dense matrix.

    Args:
        matrix: A, `[P, P]`.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @override
    def _rows(self, rows: Tensor) -> Tensor:
        return rows.to(self.matrix.dtype) @ self.matrix.T

    @property
    @override
    def input_size(self) -> int:
        """P."""
        return int(self.matrix.shape[-1])

    @property
    @override
    def device(self) -> torch.device:
        """Of the matrix."""
        return self.matrix.device

    @property
    @override
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.matrix.dtype

    @override
    def to(self, device: torch.device | str) -> Self:
        """Moves the matrix to a device, and returns this operator."""
        self.matrix = self.matrix.to(device)
        return self
