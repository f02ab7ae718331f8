"""What the methods share that score projected gradients `φ = Sᵀg`: `left = (F + λI)^-1 φ`, `right = φ`.

They differ in S, block by block: what it is, and how gradients come into it. F is the mean of `φ φᵀ`.

Shapes: t test examples, n training examples, P_b parameters of block b, k_b columns of its projection.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import Regularization, block_regularization, checked_regularization
from influence_calculator.maths.direct import DenseSolver
from influence_calculator.maths.gradient_methods import BlockSolver, fitted_tensor, solve_by_block
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import FitPass, FitState, Fitted, Part, Solved, SolverReport, Sums
from influence_calculator.maths.objective import Batch, IndexedBatch, Objective

Coordinates = Callable[[Objective, Batch], Iterator[Part]]
"""φ of each example of a batch, `[n, k_b]`: one part per block."""


class RowProjection(Protocol):
    """S of one block, `[P_b, k_b]`."""

    def project(self, rows: Tensor) -> Tensor:
        """`rows · S`, `[t, k_b]`, of rows by parameter."""

    def back(self, coordinates: Tensor) -> Tensor:
        """`a Sᵀ`, `[t, P_b]`."""

    def coordinates_of(self, factors: Tensor) -> Tensor:
        """`a` of factors `a Sᵀ`: the inverse of `back`."""


@dataclass(frozen=True)
class Unprojected:
    """Solves rows by parameter: into coordinates, there, and back."""

    projection: RowProjection
    solver: BlockSolver

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        solved, report = self.solver.solve(self.projection.project(right_hand_sides))
        return self.projection.back(solved).to(right_hand_sides.dtype), report


class FisherPass(FitPass):
    """The mean over examples of `φ_b φ_bᵀ`: `matrix`, `[k_b, k_b]`, of each block."""

    @abstractmethod
    def coordinates(self, objective: Objective) -> tuple[Mapping[str, int], Coordinates]:
        """k_b of every block, and φ."""

    @override
    def accumulate(self, objective: Objective, batches: Iterable[IndexedBatch], state: FitState) -> Sums:
        widths, coordinates = self.coordinates(objective)
        like = coordinates_like(objective)
        totals = {block: like.new_zeros(k, k) for block, k in widths.items()}
        for _, batch in batches:
            for part in coordinates(objective, batch):
                totals[part.block].addmm_(part.values.T, part.values)
        return {block: {"matrix": total} for block, total in totals.items()}

    @override
    def finish(
        self, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        return {"matrix": sums["matrix"].div_(length)}

    def solver(
        self, objective: Objective, state: FitState, block: str, k: int, regularization: Regularization | None
    ) -> DenseSolver:
        """Of `F_b + λI` as this pass left it."""
        matrix = fitted_tensor(state, self.name, block, "matrix", (k, k)).to(objective.device)
        checked = checked_regularization(regularization)
        return DenseSolver(
            block, matrix, block_regularization(checked, block, float(matrix.diagonal().sum()), k)
        )


def coordinates_like(objective: Objective) -> Tensor:
    """Of the dtype in which projected gradients are summed, where the model is."""
    return torch.zeros((), dtype=accumulation_dtype(objective.dtype), device=objective.device)


class ProjectedFitted(Fitted):
    """Both representations by coordinates."""

    def __init__(
        self,
        layout: Layout,
        objective: Objective,
        coordinates: Coordinates,
        projections: Mapping[str, RowProjection],
        solvers: Mapping[str, BlockSolver],
    ) -> None:
        self.layout = layout
        self._objective = objective
        self._coordinates = coordinates
        self._projections = projections
        self._solvers = solvers

    @override
    def gradients(self, objective: Objective, batch: Batch) -> Left:
        found = {part.block: part.values for part in self._coordinates(objective, batch)}
        return {block: found[block] for block in self.layout.blocks}

    @override
    def solve(self, gradients: Left) -> Solved:
        return solve_by_block(self._solvers, gradients)

    @override
    def right(self, batch: Batch) -> Iterator[Part]:
        yield from self._coordinates(self._objective, batch)

    @override
    def factors(self, left: Left) -> Left:
        return {block: self._projections[block].back(rows) for block, rows in left.items()}

    @override
    def left(self, factors: Left) -> Left:
        return {block: self._projections[block].coordinates_of(rows) for block, rows in factors.items()}
