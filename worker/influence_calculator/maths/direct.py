"""The direct method: the curvature of each block as a dense matrix, factorized once.

Costs P_b² memory per block and P_b products with the curvature per training example; exact up to
rounding. The matrix is kept without λ, so another λ needs no new pass over the data.

Shapes: t test examples, N training examples, P_b parameters of block b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import (
    BlockMode,
    BlockStructure,
    Regularization,
    block_regularization,
    checked_regularization,
    regularized_layout,
)
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.curvature_methods import CurvatureMethod
from influence_calculator.maths.curvature_passes import MatrixPass
from influence_calculator.maths.errors import CalculatorError, NotFiniteError, SingularCurvatureError
from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.flat import clipped_note, flat_note
from influence_calculator.maths.footprints import (
    block_widths,
    capture_bytes,
    collect_bytes,
    gathered_bytes,
    row_bytes,
    workspace,
)
from influence_calculator.maths.gradient_methods import BlockwiseFitted, fitted_tensor
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.method import FitPass, FitState, Fitted, Footprint, SolverReport
from influence_calculator.maths.objective import Objective, TrainingData
from influence_calculator.maths.seeded_rows import generator, normal_rows
from influence_calculator.maths.shapes import ModelShapes
from influence_calculator.maths.singularity import is_singular, rounding_of_sums

SCALED_ELEMENTS = 1 << 20
"""Of a matrix whose columns are measured: 4 MiB in float32."""

INVERSE_ITERATIONS = 3
"""To tell how small the smallest eigenvalue is: each takes what one right-hand side takes."""


@dataclass(frozen=True)
class Direct(CurvatureMethod):
    """`(H + λI)^-1 g` by a dense factorization of each block."""

    regularization: Regularization | None = 0.0
    """λ ≥ 0: a number, one per block, or `Relative(c)`. None is 0."""
    blocks: BlockStructure = BlockMode.FULL
    second_order: SecondOrderMode = SecondOrderMode.HESSIAN

    needs_data = False

    def __post_init__(self) -> None:
        checked_regularization(self.regularization)

    def layout(self, objective: Objective) -> Layout:
        return regularized_layout(objective, self.blocks, self.regularization)

    def passes(self) -> tuple[FitPass, ...]:
        return (MatrixPass(self.blocks, self.second_order),)

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None = None) -> Fitted:
        layout = self.layout(objective)
        regularization = checked_regularization(self.regularization)
        solvers, holds_any, clipped = {}, [], 0
        for block, width in layout.widths.items():
            matrix = fitted_tensor(state, MatrixPass.name, block, "matrix", (width, width)).to(
                objective.device
            )
            holds_any.append(matrix.any())
            # Of the outputs, so each block counts the same ones.
            clipped = int(state[MatrixPass.name][block]["clipped"])
            trace = float(matrix.diagonal().sum())
            λ = block_regularization(regularization, block, trace, width)
            solvers[block] = DenseSolver(block, matrix, λ)
        return BlockwiseFitted(layout, objective, solvers, (*flat_note(holds_any), *clipped_note(clipped)))

    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        widths = block_widths(shapes, self.blocks)
        item = max(4, shapes.itemsize)
        matrices = sum(width * width for width in widths) * item
        largest = max(widths) ** 2 * item
        row = row_bytes(shapes, sum(widths))
        collect = collect_bytes(shapes, micro_batch, sum(widths))
        return Footprint(
            # The sums of all blocks, and either one batch's gradients or the directions at once.
            fit=matrices + max(collect, workspace(shapes, micro_batch)),
            # All matrices and their factors, and of: H + λI once more while it is factorized; gradients;
            # those, factors and the transposed copy that the triangular solve makes.
            factors=2 * matrices
            + max(largest, gathered_bytes(shapes, micro_batch, rows, sum(widths)), 3 * rows * row),
            capture=capture_bytes(shapes, micro_batch),
            factor_row=row,
            resident=2 * matrices,
            stored=matrices,
        )


class DenseSolver:
    """`H_b + λ_b I`, factorized at construction: Cholesky where it is positive, else LU.

    A matrix that is not symmetric must be called so: Cholesky would read one half of it.

    In the dtype of the matrix: float64 would double the memory and costs far more time on most GPUs,
    and what it could win is below the error of a matrix that was summed in float32.
    """

    def __init__(self, block: str, matrix: Tensor, λ: float, *, symmetric: bool = True) -> None:
        shifted = matrix.clone()
        shifted.diagonal().add_(λ)
        # Lengths are of the matrix over its largest entry: squares of the entries may leave the dtype.
        scale = float(torch.linalg.vector_norm(shifted, torch.inf))
        largest = _longest_column(shifted, scale)  # of an eigenvalue, from below
        if not self._factorized(shifted, symmetric):
            raise _no_inverse(block, matrix, λ)
        del shifted  # a solve holds as much
        # Where an eigenvalue is rounding, so are all numbers that come of it.
        if is_singular(self._smallest_eigenvalue(scale), rounding_of_sums(matrix.dtype, λ), largest):
            raise _no_inverse(block, matrix, λ)

    def _factorized(self, shifted: Tensor, symmetric: bool) -> bool:
        """Whether it could be."""
        self._lu: tuple[Tensor, Tensor] | None = None
        if symmetric:
            self._cholesky, failed = torch.linalg.cholesky_ex(shifted)
            if int(failed) == 0:
                return True
            del self._cholesky  # it is as large as the other factor
        self._cholesky, pivots, singular = torch.linalg.lu_factor_ex(shifted)
        self._lu = (self._cholesky, pivots)
        return int(singular) == 0 and bool(finite_rows(self._cholesky).all())

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        solved = self._solved(right_hand_sides.to(self._cholesky.dtype).T)
        return solved.T.to(right_hand_sides.dtype), SolverReport.exact(right_hand_sides.shape[0])

    def _solved(self, columns: Tensor) -> Tensor:
        if self._lu is None:
            return torch.cholesky_solve(columns, self._cholesky)
        return torch.linalg.lu_solve(*self._lu, columns)

    def _smallest_eigenvalue(self, scale: float) -> Tensor:
        """Its modulus over `scale` from above, by inverse iteration; a pivot may be large beside it."""
        u = normal_rows(1, len(self._cholesky), generator(0, "smallest"), self._cholesky).T.double()
        for _ in range(INVERSE_ITERATIONS):
            u = self._solved((u / torch.linalg.vector_norm(u) * scale).to(self._cholesky.dtype)).double()
        return 1 / torch.linalg.vector_norm(u)


def _longest_column(matrix: Tensor, scale: float) -> float:
    """The largest length of a column of `matrix / scale`; no copy of it is made as a whole."""
    pieces = matrix.split(max(1, SCALED_ELEMENTS // len(matrix)), dim=1)
    lengths = [torch.linalg.vector_norm(piece / scale, dim=0).max() for piece in pieces]
    return float(torch.stack(lengths).max())


def _no_inverse(block: str, matrix: Tensor, λ: float) -> CalculatorError:
    if not finite_rows(matrix).all():
        return NotFiniteError(
            f"block {block!r}: expected a finite curvature matrix, got NaN or infinity; "
            "a training example has a loss or gradient that is not finite"
        )
    return SingularCurvatureError(
        f"block {block!r}: H + λI is singular at λ = {λ:g}; give a larger regularization"
    )
