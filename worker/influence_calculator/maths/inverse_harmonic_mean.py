"""DataInf: the mean over the training examples of each one's inverse, in place of the inverse of the mean.

`(1/N) Σ_i (g_i g_iᵀ + λI)^-1 v = (1/λ) (v − (1/N) Σ_i g_i (g_iᵀ v) / (λ + ‖g_i‖²))`, block by block. No
matrix is formed and nothing iterates: solving is one pass over the training set for all test rows.

The sum depends on λ and on v, so that no sum over the training set alone would do in its place, and the
gradients are N·P numbers: a job that kept them would store more than its result. So a solve
differentiates the training set again, except what `KEPT_BYTES` hold of its gradients.

Shapes: t test rows, N training examples, n of a piece, P_b parameters of block b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import (
    BlockMode,
    BlockStructure,
    Regularization,
    needs_trace,
    regularized_layout,
    require_positive,
)
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.curvature_passes import TracePass, fitted_regularization
from influence_calculator.maths.directional import GRAPH_COPIES, activation_elements
from influence_calculator.maths.errors import SingularCurvatureError
from influence_calculator.maths.finite import finite_rows, spoil
from influence_calculator.maths.footprints import (
    block_widths,
    capture_bytes,
    collect_bytes,
    gathered_bytes,
    row_bytes,
)
from influence_calculator.maths.gradient_methods import GradientFitted, not_finite
from influence_calculator.maths.gradients import accumulation_dtype, collected
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import (
    FitPass,
    FitState,
    Fitted,
    Footprint,
    Method,
    Solved,
    SolverReport,
)
from influence_calculator.maths.objective import (
    Batch,
    IndexedBatch,
    Objective,
    TrainingData,
    batch_size,
    micro_batches,
)
from influence_calculator.maths.shapes import ModelShapes
from influence_calculator.maths.training_batches import KEPT_BYTES, TrainingBatches

PIECE_BYTES = 32 << 20
"""Of the graph and the gradients of the training examples that are differentiated at once."""


@dataclass(frozen=True)
class InverseHarmonicMean(Method):
    """`(1/N) Σ_i (g_i g_iᵀ + λI)^-1 v`, of every block on its own."""

    regularization: Regularization
    """λ > 0: a number, one per block, or `Relative(c)`, in proportion to the mean of `‖g_i‖² / P_b`."""
    blocks: BlockStructure = BlockMode.FULL

    needs_data = True

    def __post_init__(self) -> None:
        require_positive(self.regularization, "the inverse of one example's g gᵀ exists with λ only")

    @override
    def layout(self, objective: Objective) -> Layout:
        return regularized_layout(objective, self.blocks, self.regularization)

    @override
    def passes(self) -> tuple[FitPass, ...]:
        if needs_trace(self.regularization):
            return (TracePass(self.blocks, SecondOrderMode.EMPIRICAL_FISHER),)
        return ()

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None) -> Fitted:
        if data is None:
            raise ValueError(
                "data: InverseHarmonicMean differentiates the training set while solving, got None; "
                "give the training data that the method was fitted on"
            )
        layout = self.layout(objective)
        λ = {
            block: fitted_regularization(self.regularization, state, block, width)
            for block, width in layout.widths.items()
        }
        for block, value in λ.items():
            if not value > 0:
                raise SingularCurvatureError(
                    f"block {block!r}: a relative regularization gives λ = {value:g}, for all its gradients "
                    "are zero; give a number, or leave the block out"
                )
        return _HarmonicFitted(layout, objective, λ, TrainingBatches(objective, data))

    @override
    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        width = sum(block_widths(shapes, self.blocks))
        row = row_bytes(shapes, width)
        at_once = max(1, PIECE_BYTES // (row + GRAPH_COPIES * shapes.activation_bytes))
        return Footprint(
            fit=collect_bytes(shapes, micro_batch, width) if self.passes() else 0,
            # The test gradients as they are gathered; then one piece's beside them and the sums that become
            # the factors.
            factors=KEPT_BYTES
            + max(
                gathered_bytes(shapes, micro_batch, rows, width),
                collect_bytes(shapes, at_once, width) + 2 * rows * row,
            ),
            capture=capture_bytes(shapes, micro_batch),
            factor_row=row,
            resident=KEPT_BYTES,
            stored=0,
        )


class _HarmonicFitted(GradientFitted):
    """All blocks in one pass over the training set."""

    def __init__(
        self, layout: Layout, objective: Objective, λ: Mapping[str, float], batches: TrainingBatches
    ) -> None:
        super().__init__(layout, objective)
        self._λ = λ
        self._batches = batches
        self._training = _TrainingGradients(objective, layout, batches)

    def solve(self, gradients: Left) -> Solved:
        """Exact but for rounding; a row that is not finite stays the only one concerned."""
        left = {block: torch.zeros_like(rows) for block, rows in gradients.items()}
        for piece in self._training.pieces():
            for block, own in piece.items():
                add_rank_one_parts(left[block], gradients[block], own, self._λ[block])
        rows = next(iter(gradients.values()))
        finite = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for block, total in left.items():
            mean_of_inverses(total, gradients[block], self._batches.length, self._λ[block])
            sound = finite_rows(total)
            spoil(total, ~sound)
            finite &= sound
        return Solved(left, _report(finite))


def add_rank_one_parts(total: Tensor, rows: Tensor, gradients: Tensor, λ: float) -> None:
    """`total += Σ_i (v · g_i) g_i / (λ + ‖g_i‖²)` for every row v, over gradients `[n, P_b]`."""
    squares = torch.linalg.vector_norm(gradients, dim=1).square_()
    weights = (rows @ gradients.T).div_(squares.add_(λ))
    total.addmm_(weights, gradients)


def mean_of_inverses(total: Tensor, rows: Tensor, n: int, λ: float) -> None:
    """`total = (1/n) Σ_i (g_i g_iᵀ + λI)^-1 v` in place, by the Sherman-Morrison formula.

    `total` is what `add_rank_one_parts` summed over n examples.
    """
    total.div_(-n).add_(rows).div_(λ)


def _report(finite: Tensor) -> SolverReport:
    on_host = finite.cpu()
    exact, lost = SolverReport.exact(len(on_host)), not_finite(len(on_host))
    return replace(
        exact,
        status=torch.where(on_host, exact.status, lost.status),
        residual=torch.where(on_host, exact.residual, lost.residual),
    )


class _TrainingGradients:
    """The training set's gradients by block, `[n, P_b]` a piece; kept as long as `KEPT_BYTES` last."""

    def __init__(self, objective: Objective, layout: Layout, batches: TrainingBatches) -> None:
        self._objective = objective
        self._layout = layout
        self._batches = batches
        self._kept: dict[tuple[int, int], Left] = {}
        self._budget: int | None = None
        self._at_once = 0

    def pieces(self) -> Iterator[Left]:
        """One pass over all examples, in order."""
        if self._budget is None:
            self._budget = KEPT_BYTES - self._batches.kept_bytes
        for batch in self._batches.batches():
            for piece in micro_batches(batch, self._examples_at_once(batch.batch)):
                yield self._gradients(piece)

    def _examples_at_once(self, batch: Batch) -> int:
        if not self._at_once:
            dtype = self._objective.dtype
            graph = GRAPH_COPIES * dtype.itemsize * activation_elements(self._objective, batch)
            gradient = self._layout.width * accumulation_dtype(dtype).itemsize
            self._at_once = max(1, PIECE_BYTES // (graph + gradient))
        return self._at_once

    def _gradients(self, piece: IndexedBatch) -> Left:
        key = (piece.start, batch_size(piece.batch))
        found = self._kept.get(key)
        if found is None:
            found = collected(self._objective, piece.batch, self._layout)
            size = sum(rows.nbytes for rows in found.values())
            if self._budget is not None and size <= self._budget:
                self._budget -= size
                self._kept[key] = found
        return found
