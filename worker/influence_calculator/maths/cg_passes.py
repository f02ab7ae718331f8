"""Conjugate gradients as a fitted method: solved in one process, or by passes over the training data.

Both make the same recursion. By passes, an iteration is one pass: the sums of products over each range,
and then for every block what its right-hand sides go on from.

Shapes: q right-hand sides, P_b parameters of block b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.conjugate_gradients import (
    Recursion,
    Rows,
    Solves,
    Stopping,
    conjugate_gradients,
)
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.gradient_methods import (
    BlockwiseFitted,
    joined_reports,
    worst,
)
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import (
    SETTLED,
    FitPass,
    FitState,
    PassesFitted,
    Solved,
    SolverReport,
    Sums,
)
from influence_calculator.maths.objective import IndexedBatch, Objective
from influence_calculator.maths.training_products import PRODUCTS, summed_products

STATE_ROWS = 4
"""Numbers per parameter and right-hand side that stand between two passes: x, b, r and what is multiplied."""


@dataclass(frozen=True)
class CgSolver:
    """Solves `(A + λI) x = b` for an A that is known by its products."""

    products: Callable[[], Rows]
    """Makes the product with A; what that keeps lives for one solve."""
    regularization: float
    stopping: Stopping
    precondition: Rows | None
    simultaneous: bool

    @property
    def recursion(self) -> Recursion:
        """What becomes of right-hand sides with every product by `A + λI`."""
        return Recursion(self.stopping, self.precondition)

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        """The answers `[q, P]`, and how each right-hand side ended."""
        multiplied = self.products()

        def product(rows: Tensor) -> Tensor:
            return multiplied(rows).add_(rows, alpha=self.regularization)

        if self.simultaneous or len(right_hand_sides) <= 1:
            return conjugate_gradients(product, right_hand_sides, self.stopping, self.precondition)
        single = [
            conjugate_gradients(product, row[None], self.stopping, self.precondition)
            for row in right_hand_sides
        ]
        return torch.cat([solution for solution, _ in single]), joined_reports(
            [report for _, report in single]
        )


class CgFitted(BlockwiseFitted, PassesFitted):
    """A solver per block."""

    solvers: Mapping[str, CgSolver]

    def __init__(
        self,
        layout: Layout,
        objective: Objective,
        solvers: Mapping[str, CgSolver],
        second_order: SecondOrderMode,
    ) -> None:
        super().__init__(layout, objective, solvers)
        self._second_order = second_order

    @override
    def begun(self, gradients: Left) -> dict[str, dict[str, Tensor]]:
        return {
            block: self.solvers[block].recursion.begun(rows).tensors() for block, rows in gradients.items()
        }

    @override
    def solving_pass(self, name: str, follows: str) -> FitPass:
        return CgPass(name, self.layout, self._second_order, self.solvers, follows)

    @override
    def solved(self, ended: Mapping[str, Mapping[str, Tensor]]) -> Solved:
        solves = {block: Solves.of(ended[block]) for block in self.layout.blocks}
        left = {block: own.solutions() for block, own in solves.items()}
        return Solved(left, worst([own.report() for own in solves.values()]))


@dataclass(frozen=True)
class CgPass(FitPass):
    """One iteration of every block whose right-hand sides are not all done."""

    name: str
    layout: Layout
    second_order: SecondOrderMode
    solvers: Mapping[str, CgSolver]
    follows: str

    takes_any_sums = True

    @override
    def units(self, objective: Objective) -> tuple[str, ...]:
        return self.layout.blocks

    @override
    def accumulate(self, objective: Objective, batches: Iterable[IndexedBatch], state: FitState) -> Sums:
        before = state[self.follows]
        rows = {block: before[block]["next"] for block in self.layout.blocks if not before[block][SETTLED]}
        return summed_products(self.second_order, objective, self.layout, batches, rows)

    @override
    def finish(
        self, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        before = state[self.follows][unit]
        if PRODUCTS not in sums:
            return dict(before)
        solver = self.solvers[unit]
        # What was before stays: a pass that is broken off is made again.
        solves = Solves.of({name: value.clone() for name, value in before.items()})
        multiplied = sums[PRODUCTS].div_(length).add_(solves.next, alpha=solver.regularization)
        solver.recursion.advance(solves, multiplied)
        return solves.tensors()
