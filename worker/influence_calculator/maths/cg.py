"""The conjugate gradient method: solves each test gradient by products with the curvature alone.

Never forms a matrix; every iteration goes over the training data once for all test rows together: in one
process, or as a pass whose ranges several may share.
Needs `H + λI` positive: an indefinite Hessian shows in the status of each row.

Shapes: t test examples, N training examples, P_b parameters of block b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import (
    BlockMode,
    BlockStructure,
    Regularization,
    checked_regularization,
    needs_trace,
    regularized_layout,
)
from influence_calculator.maths.cg_passes import STATE_ROWS, CgFitted, CgSolver
from influence_calculator.maths.conjugate_gradients import Rows, Stopping
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.curvature_methods import CurvatureMethod
from influence_calculator.maths.curvature_passes import TracePass, fitted_regularization
from influence_calculator.maths.footprints import (
    block_widths,
    capture_bytes,
    collect_bytes,
    gathered_bytes,
    row_bytes,
    workspace,
)
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.method import FitPass, FitState, Fitted, Footprint
from influence_calculator.maths.objective import Objective, TrainingData
from influence_calculator.maths.preconditioners import Preconditioner
from influence_calculator.maths.shapes import ModelShapes
from influence_calculator.maths.training_batches import KEPT_BYTES, TrainingBatches
from influence_calculator.maths.training_products import training_product

MOST_ITERATIONS = 5000
"""The default's upper limit: what a condition number of about 10^6 takes. Below, 10 P_b."""


@dataclass(frozen=True)
class Cg(CurvatureMethod):
    """`(H + λI)^-1 g` by preconditioned conjugate gradients."""

    regularization: Regularization | None = 0.0
    """λ ≥ 0: a number, one per block, or `Relative(c)`. None is 0."""
    rtol: float = 1e-4
    """A row is solved when `‖r‖ ≤ max(rtol ‖b‖, atol)`."""
    atol: float = 0.0
    maxiter: int | None = None
    """Iterations per row; None: 10 P_b, at most `MOST_ITERATIONS`."""
    simultaneous: bool = True
    """All rows in one product per iteration; False: one row after another, less memory, same numbers."""
    preconditioner: Preconditioner | None = None
    blocks: BlockStructure = BlockMode.FULL
    second_order: SecondOrderMode = SecondOrderMode.HESSIAN
    solves_by_passes: bool = False
    """All rows together, by passes that others run."""

    needs_data = True

    def __post_init__(self) -> None:
        checked_regularization(self.regularization)
        if self.solves_by_passes and not self.simultaneous:
            raise ValueError("simultaneous: expected True with solves_by_passes, got False; take fewer rows")
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number that is not negative, got {value}")
        if self.maxiter is not None and self.maxiter < 1:
            raise ValueError(f"maxiter: expected at least 1 or None, got {self.maxiter}")

    @override
    def layout(self, objective: Objective) -> Layout:
        return regularized_layout(objective, self.blocks, self.regularization)

    @override
    def passes(self) -> tuple[FitPass, ...]:
        passes: list[FitPass] = []
        if needs_trace(checked_regularization(self.regularization)):
            passes.append(TracePass(self.blocks, self.second_order))
        if self.preconditioner is not None:
            passes.append(self.preconditioner.fit_pass(self.blocks, self.second_order))
        return tuple(passes)

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None) -> Fitted:
        if data is None:
            raise ValueError(
                "data: conjugate gradients go over the training set again while solving, got None; "
                "give the training data that the method was fitted on"
            )
        layout = self.layout(objective)
        batches = TrainingBatches(objective, data)
        solvers: dict[str, CgSolver] = {}
        for block, width in layout.widths.items():
            λ = fitted_regularization(self.regularization, state, block, width)
            solvers[block] = CgSolver(
                partial(training_product, self.second_order, objective, layout.only(block), batches),
                λ,
                self.stopping(width),
                self._precondition(objective, state, block, λ),
                self.simultaneous,
            )
        return CgFitted(layout, objective, solvers, self.second_order)

    def stopping(self, width: int) -> Stopping:
        """When a row of that width is done."""
        return Stopping(self.rtol, self.atol, self.maxiter or min(10 * width, MOST_ITERATIONS))

    def _precondition(self, objective: Objective, state: FitState, block: str, λ: float) -> Rows | None:
        if self.preconditioner is None:
            return None
        step = self.preconditioner.fit_pass(self.blocks, self.second_order)
        values: Mapping[str, Tensor] = state.get(step.name, {}).get(block, {})
        missing = [name for name in self.preconditioner.tensors if name not in values]
        if missing:
            raise ValueError(
                f"fit state: expected {', '.join(missing)} of block {block!r} in pass {step.name!r}, got "
                f"{sorted(values) or 'nothing'}; fit the method with its preconditioner first"
            )
        return self.preconditioner.rows({k: v.to(objective.device) for k, v in values.items()}, λ)

    @override
    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        widths = block_widths(shapes, self.blocks)
        row = row_bytes(shapes, sum(widths))
        largest = row_bytes(shapes, max(widths))
        product = workspace(shapes, micro_batch)
        if self.second_order is SecondOrderMode.EMPIRICAL_FISHER:
            product = max(product, collect_bytes(shapes, micro_batch, sum(widths)))
        block = (rows if self.simultaneous else 1) * largest
        kept = fit = 0
        if self.preconditioner is not None:
            kept = self.preconditioner.rows_kept * row
            fit = self.preconditioner.fit_bytes(shapes, widths, product)
        # b, x, r, d, what is multiplied and the sum of products are alive beside a batch's product;
        # afterwards z and two temporaries of the updates. Gradients and factors of all rows are outside.
        gathered = gathered_bytes(shapes, micro_batch, rows, sum(widths))
        factors = KEPT_BYTES + kept + max(gathered, max(product + 6 * block, 9 * block) + 2 * rows * row)
        state = 0
        if self.solves_by_passes:
            # What the pass before left of all blocks; beside it the sums of a range and a batch's product, or
            # of one block the sums over all ranges, what this pass leaves and temporaries of the updates.
            state = STATE_ROWS * rows * row
            finishing = (2 + STATE_ROWS + 4) * block
            factors = kept + state + max(gathered, rows * row + product + block, finishing)
        return Footprint(
            fit=max(product + 3 * row, fit) if self.passes() else 0,
            factors=factors,
            capture=capture_bytes(shapes, micro_batch),
            factor_row=row,
            resident=kept if self.solves_by_passes else KEPT_BYTES + kept,
            stored=kept,
            solving_sums=rows * row if self.solves_by_passes else 0,
            solving_state=state,
        )
