"""LiSSA: solves each test gradient by the Neumann series of the curvature, over random parts of the data.

Needs `H + λI` positive and `scale` above half of its largest eigenvalue; otherwise the recursion grows, and
ends without an answer. Takes more passes than conjugate gradients where each step is one; its steps can
be made of a few examples instead, for an answer with noise.

Shapes: t test examples, N training examples, m examples of a step, P_b parameters of block b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
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
from influence_calculator.maths.conjugate_gradients import Rows, Stopping
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.curvature_methods import CurvatureMethod
from influence_calculator.maths.curvature_passes import TracePass, fitted_regularization
from influence_calculator.maths.extreme_eigenvalues import Extremes, extreme_eigenvalues
from influence_calculator.maths.footprints import (
    block_widths,
    capture_bytes,
    collect_bytes,
    gathered_bytes,
    row_bytes,
    workspace,
)
from influence_calculator.maths.gradient_methods import BlockSolver, BlockwiseFitted
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.method import (
    FitPass,
    FitState,
    Fitted,
    Footprint,
    SolverReport,
    SolverStatus,
)
from influence_calculator.maths.mini_batches import BUFFER_BYTES, MiniBatches, Part
from influence_calculator.maths.objective import Objective, TrainingData
from influence_calculator.maths.shapes import ModelShapes
from influence_calculator.maths.stochastic_recursion import Steps, recursion
from influence_calculator.maths.training_batches import KEPT_BYTES, TrainingBatches
from influence_calculator.maths.training_products import TrainingProducts


@dataclass(frozen=True)
class Lissa(CurvatureMethod):
    """`(H + (λ + d·s) I)^-1 g` by `h ← g + (1 − d) h − (H_j + λI) h / s`, answering `h / s`."""

    regularization: Regularization | None = 0.0
    """λ ≥ 0: a number, one per block, or `Relative(c)`. None is 0."""
    maxiter: int = 1000
    """Steps per row."""
    dampen: float = 0.0
    """d, at least 0: what it adds to the curvature's diagonal is `d·s`."""
    scale: float = 10.0
    """s: above half of the largest eigenvalue of `H + λI`; the smaller, the faster."""
    rtol: float = 1e-4
    """A row is solved when `‖r‖ ≤ max(rtol ‖b‖, atol)`."""
    atol: float = 0.0
    batch_size: int | None = None
    """m; None: all N, which makes the steps exact. With fewer the noise of the steps is the answer's."""
    seed: int = 0
    """Of the order of the parts, the same for every row."""
    blocks: BlockStructure = BlockMode.FULL
    second_order: SecondOrderMode = SecondOrderMode.HESSIAN

    needs_data = True

    def __post_init__(self) -> None:
        checked_regularization(self.regularization)
        for name, value in (("dampen", self.dampen), ("rtol", self.rtol), ("atol", self.atol)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number that is not negative, got {value}")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale: expected a number above 0, got {self.scale}; 10 is a usual start")
        for name, count in (("maxiter", self.maxiter), ("batch_size", self.batch_size)):
            if count is not None and count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")

    @override
    def layout(self, objective: Objective) -> Layout:
        return regularized_layout(objective, self.blocks, self.regularization)

    @override
    def passes(self) -> tuple[FitPass, ...]:
        if needs_trace(checked_regularization(self.regularization)):
            return (TracePass(self.blocks, self.second_order),)
        return ()

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None) -> Fitted:
        if data is None:
            raise ValueError(
                "data: LiSSA goes over the training set again while solving, got None; "
                "give the training data that the method was fitted on"
            )
        layout = self.layout(objective)
        batches = TrainingBatches(objective, data)
        solvers: dict[str, BlockSolver] = {}
        for block, width in layout.widths.items():
            λ = fitted_regularization(self.regularization, state, block, width)
            shift = λ + self.dampen * self.scale
            solvers[block] = LissaSolver(
                self,
                block,
                shift,
                partial(self._products, objective, layout.only(block), batches, shift),
                may_be_indefinite=self.second_order is SecondOrderMode.HESSIAN,
                computed_in=objective.dtype,
            )
        return BlockwiseFitted(layout, objective, solvers)

    def _products(
        self, objective: Objective, layout: Layout, batches: TrainingBatches, shift: float
    ) -> tuple[Rows, Steps | None]:
        """With the curvature, and the shifted ones of the steps, if these take parts of the training set."""
        products = TrainingProducts(self.second_order, objective, layout, batches)
        if self.batch_size is None or self.batch_size >= batches.length:
            return products.mean, None
        parts = MiniBatches(batches, self.batch_size, self.seed)
        weight = parts.weight

        def product(part: Part) -> Rows:
            return lambda rows: products.sum_over(part, rows).mul_(weight).add_(rows, alpha=shift)

        return products.mean, Steps(map(product, parts.endless()), parts.count)

    @override
    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        widths = block_widths(shapes, self.blocks)
        row = row_bytes(shapes, sum(widths))
        block = rows * row_bytes(shapes, max(widths))
        product = workspace(shapes, micro_batch)
        if self.second_order is SecondOrderMode.EMPIRICAL_FISHER:
            product = max(product, collect_bytes(shapes, micro_batch, sum(widths)))
        kept = KEPT_BYTES + (BUFFER_BYTES if self.batch_size is not None else 0)
        return Footprint(
            fit=product + 3 * row if self.passes() else 0,
            # The answers, b, x, r and the sum of products are alive beside a batch's product. Gradients and
            # factors of all rows are outside.
            factors=kept
            + max(
                gathered_bytes(shapes, micro_batch, rows, sum(widths)), product + 5 * block + 2 * rows * row
            ),
            capture=capture_bytes(shapes, micro_batch),
            factor_row=row,
            resident=kept,
            stored=0,
        )


class LissaSolver:
    """Solves `(A + shift I) x = b` of one block, for an A that is known by its products."""

    def __init__(
        self,
        method: Lissa,
        block: str,
        shift: float,
        products: Callable[[], tuple[Rows, Steps | None]],
        *,
        may_be_indefinite: bool,
        computed_in: torch.dtype,
    ) -> None:
        """`products` makes the product with A, and those of steps over parts of the data, for one solve; they
        are computed in `computed_in`.
        """
        self._method = method
        self._block = block
        self._shift = shift
        self._products = products
        self._may_be_indefinite = may_be_indefinite
        self._computed_in = computed_in
        self._extremes: Extremes | None = None

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        """Also looks for what the recursion cannot do: with a Hessian at once, else when a row was lost."""
        method = self._method
        mean, steps = self._products()
        solution, report = recursion(
            lambda rows: mean(rows).add_(rows, alpha=self._shift),
            right_hand_sides,
            Stopping(method.rtol, method.atol, method.maxiter),
            method.scale,
            steps,
            self._computed_in,
        )
        may_be_indefinite = self._may_be_indefinite and len(right_hand_sides) > 0
        if may_be_indefinite or bool((report.status == SolverStatus.NOT_FINITE).any()):
            self._extremes = self._extremes or extreme_eigenvalues(mean, right_hand_sides[0])
        return solution, replace(report, notes=self._notes())

    def _notes(self) -> tuple[str, ...]:
        if self._extremes is None:
            return ()
        return tuple(self._found(self._extremes))

    def _found(self, extremes: Extremes) -> Iterator[str]:
        where = f"block {self._block!r}: " if self._block else ""
        smallest = extremes.smallest + self._shift
        if smallest <= 0:
            missing = 1.1 * (extremes.smallest_error - extremes.smallest)
            enough = missing - self._method.dampen * self._method.scale
            yield (
                f"{where}H + λI has an eigenvalue of {smallest:.3g}, and LiSSA needs a positive curvature: a "
                f"regularization of {enough:.3g} would do, or another second_order_mode"
            )
        largest = extremes.largest + self._shift
        if largest >= 2 * self._method.scale:
            yield (
                f"{where}H + λI has an eigenvalue of {largest:.3g}, and LiSSA needs a scale above half of "
                f"it: a scale of {largest + extremes.largest_error:.3g} would do"
            )
