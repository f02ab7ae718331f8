"""Operators that solve, and those of a matrix that is known: dense, or by some of its eigenpairs.

Each wraps the solver that the influence model of the same name uses. `solver_report` tells how each row of
the last `apply` ended; a `SolverWarning` counts what did not converge.

Shapes: q rows, P input size, r directions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import checked_regularization, require_positive
from influence_calculator.maths.direct import DenseSolver
from influence_calculator.maths.gradient_methods import BlockSolver, solve_finite_rows
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.spectral import (
    InverseEverywhere,
    InverseInEigenspace,
    InverseOnEigenspace,
    Spectrum,
)
from influence_calculator.torch.low_rank import LowRankProductRepresentation
from influence_calculator.torch.solver_warnings import warn_of_report
from influence_calculator.torch.tensor_operator import LowRankBilinearForm, RowsOperator


class InverseOperator(RowsOperator, ABC):
    """`(A + λI)^-1` with a λ that may be changed.

    Raises:
        ValueError: a negative λ.
    """

    def __init__(self, regularization: float | None, warn_on_max_iteration: bool = True) -> None:
        self.warn_on_max_iteration = warn_on_max_iteration
        self._solver: BlockSolver | None = None
        self.regularization = regularization

    @property
    def regularization(self) -> float | None:
        """λ; None means 0."""
        return self._regularization

    @regularization.setter
    def regularization(self, value: float | None) -> None:
        self._check(value)
        self._regularization = value
        self._solver = None

    def _check(self, value: float | None) -> None:
        checked_regularization(value)

    @property
    def _λ(self) -> float:
        return self._regularization or 0.0

    @abstractmethod
    def _new_solver(self) -> BlockSolver:
        """What solves with the present λ."""

    @override
    def _rows(self, rows: Tensor) -> Tensor:
        if self._solver is None:
            self._solver = self._new_solver()
        wide = rows.to(accumulation_dtype(self.dtype))
        solved, self.solver_report = solve_finite_rows(self._solver, wide)
        warn_of_report(self.solver_report, only_not_finite=not self.warn_on_max_iteration)
        return solved

    def __getstate__(self) -> dict[str, Any]:
        # A worker builds solvers and their caches itself.
        return {**self.__dict__, "_solver": None}


class DirectSolveOperator(InverseOperator):
    """`(A + λI)^-1` of a dense matrix, factorized once per λ.

    Args:
        matrix: A, `[P, P]`; need not be symmetric.
        regularization: λ; None means 0. May be changed.
        in_place_regularization: λ is added to the diagonal of `matrix` itself, in place of a copy.

    Raises:
        ValueError: a negative λ, or a matrix that is not square.
        SingularCurvatureError: at `apply`: nothing to invert.
    """

    def __init__(
        self, matrix: Tensor, regularization: float | None = None, in_place_regularization: bool = False
    ) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"matrix: expected a square matrix, got shape {list(matrix.shape)}; give one with a row and "
                "a column per parameter"
            )
        self._matrix = matrix.detach()
        self._diagonal = self._matrix.diagonal().clone()
        self._in_place = in_place_regularization
        self._symmetric = _is_symmetric(self._matrix)
        super().__init__(regularization)

    @property
    def matrix(self) -> Tensor:
        """`A + λI`, a copy unless λ is added in place."""
        if self._in_place:
            return self._with_its_diagonal()
        return self._matrix + self._λ * torch.eye(self.input_size, device=self.device, dtype=self.dtype)

    @override
    def _new_solver(self) -> BlockSolver:
        if self._in_place:
            return DenseSolver("", self._with_its_diagonal(), 0.0, symmetric=self._symmetric)
        return DenseSolver("", self._matrix, self._λ, symmetric=self._symmetric)

    def _with_its_diagonal(self) -> Tensor:
        """The matrix given, whatever λ stood in its diagonal before."""
        self._matrix.diagonal().copy_(self._diagonal + self._λ)
        return self._matrix

    @property
    @override
    def input_size(self) -> int:
        """P."""
        return int(self._matrix.shape[0])

    @property
    @override
    def device(self) -> torch.device:
        """Of the matrix."""
        return self._matrix.device

    @property
    @override
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self._matrix.dtype

    @override
    def to(self, device: torch.device | str) -> Self:
        """Moves the matrix to a device, and returns this operator."""
        self._matrix, self._diagonal = self._matrix.to(device), self._diagonal.to(device)
        self._solver = None
        return self


def _is_symmetric(matrix: Tensor) -> bool:
    """But for rounding; a sum over examples is no more symmetric than that."""
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    allowed = 100 * torch.finfo(matrix.dtype).eps * largest
    return bool((matrix - matrix.T).abs().max() <= allowed) if matrix.numel() else True


class LowRankOperator(InverseOperator):
    """`(V D Vᵀ + λI)^-1`, or with `exact=False` only its part inside of V, `V (D + λ)^-1 Vᵀ`.

    Args:
        low_rank_representation: V and D.
        regularization: λ, above 0 if exact: outside of V the inverse is 1/λ. May be changed.
        exact: with the part outside of V.

    Raises:
        ValueError: a negative λ, or none above 0 where it must be.
        SingularCurvatureError: at `apply`: an eigenvalue and λ sum to 0.
    """

    def __init__(
        self,
        low_rank_representation: LowRankProductRepresentation,
        regularization: float | None = None,
        exact: bool = True,
    ) -> None:
        self._exact = exact
        self._low_rank_representation = low_rank_representation
        super().__init__(regularization)

    @override
    def _check(self, value: float | None) -> None:
        checked_regularization(value)
        if self._exact:
            require_positive(value, "outside of the eigenvectors the inverse is 1/λ")

    @property
    def exact(self) -> bool:
        """Whether the part outside of V counts."""
        return self._exact

    @property
    def low_rank_representation(self) -> LowRankProductRepresentation:
        """V and D."""
        return self._low_rank_representation

    def solve_coordinates(self, rows: Tensor) -> Tensor:
        """`(D + λ)^-1` of coordinates by the eigenvectors, `[q, r]`."""
        solved, self.solver_report = InverseInEigenspace(self._spectrum()).solve(rows)
        return solved

    def _spectrum(self) -> Spectrum:
        known = self._low_rank_representation
        return Spectrum("", known.eigen_vals.double(), known.projections.T, self._λ)

    @override
    def _new_solver(self) -> BlockSolver:
        spectrum = self._spectrum()
        return InverseEverywhere(spectrum) if self._exact else InverseOnEigenspace(spectrum)

    @property
    @override
    def input_size(self) -> int:
        """P."""
        return int(self._low_rank_representation.projections.shape[0])

    @property
    @override
    def device(self) -> torch.device:
        """Of the representation."""
        return self._low_rank_representation.device

    @property
    @override
    def dtype(self) -> torch.dtype:
        """Of the representation."""
        return self._low_rank_representation.dtype

    @override
    def to(self, device: torch.device | str) -> Self:
        """Moves the representation to a device, and returns this operator."""
        self._low_rank_representation = self._low_rank_representation.to(device)
        self._solver = None
        return self

    @override
    def as_bilinear_form(self) -> LowRankBilinearForm:
        """`⟨Op(left), right⟩`, in r dimensions where the part outside of V does not count."""
        return LowRankBilinearForm(self)
