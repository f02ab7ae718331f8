"""The product of two gradients, `g_test · g_train`: no curvature, no regularization, nothing to fit.

Shapes: t test examples, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import BlockMode, BlockStructure, block_layout
from influence_calculator.maths.footprints import block_widths, capture_bytes, gathered_bytes, row_bytes
from influence_calculator.maths.gradient_methods import BlockwiseFitted
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.method import FitPass, FitState, Fitted, Footprint, Method, SolverReport
from influence_calculator.maths.objective import Objective, TrainingData
from influence_calculator.maths.shapes import ModelShapes


@dataclass(frozen=True)
class GradDot(Method):
    """`(H + λI)^-1` taken for the identity: influence factors are the gradients."""

    blocks: BlockStructure = BlockMode.FULL
    """Whose parts may be told apart; no number depends on it, but of parameters that no block names."""

    needs_data = False

    @override
    def layout(self, objective: Objective) -> Layout:
        return block_layout(objective, self.blocks)

    @override
    def passes(self) -> tuple[FitPass, ...]:
        return ()

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None = None) -> Fitted:
        layout = self.layout(objective)
        return BlockwiseFitted(layout, objective, dict.fromkeys(layout.blocks, Scaled(1.0)))

    @override
    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        width = sum(block_widths(shapes, self.blocks))
        row, capture = row_bytes(shapes, width), capture_bytes(shapes, micro_batch)
        return Footprint(
            fit=0,
            # The gradients, and the factors, which with a learning rate are others.
            factors=max(gathered_bytes(shapes, micro_batch, rows, width), 2 * rows * row),
            capture=capture,
            factor_row=row,
            resident=0,
            stored=0,
        )


@dataclass(frozen=True)
class Scaled:
    """Solves one block by a factor, `η g`."""

    factor: float

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        solved = right_hand_sides if self.factor == 1 else right_hand_sides * self.factor
        return solved, SolverReport.exact(len(right_hand_sides))
