"""What the methods share that score in the space of gradients: `left = (H + λI)^-1 g`, `right = g`.

They differ in how they solve one block; blocks are solved one after another.

Shapes: t test examples, n training examples, P_b parameters of block b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.gradients import collected, per_sample_gradients
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import FitState, Fitted, Part, Solved, SolverReport, SolverStatus
from influence_calculator.maths.objective import Batch, Objective


class GradientFitted(Fitted):
    """A fitted method whose right representation is the gradient itself."""

    def __init__(self, layout: Layout, objective: Objective) -> None:
        self.layout = layout
        self.objective = objective

    def gradients(self, objective: Objective, batch: Batch) -> Left:
        return collected(objective, batch, self.layout)

    def right(self, batch: Batch) -> Iterator[Part]:
        yield from per_sample_gradients(self.objective, batch, self.layout)

    def factors(self, left: Left) -> Left:
        return left

    def left(self, factors: Left) -> Left:
        return factors


class BlockSolver(Protocol):
    """Solves one block for rows that are all finite."""

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        """`(H_b + λ_b I)^-1` of every row of `[t, P_b]`, in the columns of the left representation, and how
        each ended.
        """


class BlockwiseFitted(GradientFitted):
    """Solves every block on its own; a row that is not finite stays the only one concerned."""

    def __init__(
        self,
        layout: Layout,
        objective: Objective,
        solvers: Mapping[str, BlockSolver],
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(layout, objective)
        self.solvers = solvers
        self.notes = notes

    def solve(self, gradients: Left) -> Solved:
        return solve_by_block(self.solvers, gradients)


def solve_by_block(solvers: Mapping[str, BlockSolver], gradients: Left) -> Solved:
    """Every block by its own solver, one after another."""
    left, reports = {}, []
    for block, rows in gradients.items():
        left[block], report = solve_finite_rows(solvers[block], rows)
        reports.append(report)
    return Solved(left, worst(reports))


def solve_finite_rows(solver: BlockSolver, rows: Tensor) -> tuple[Tensor, SolverReport]:
    """Solves the rows that are finite; the others answer NaN with status NOT_FINITE."""
    finite = finite_rows(rows)
    if finite.all():
        return solver.solve(rows)
    places = finite.nonzero().squeeze(1)
    solved, own = solver.solve(rows[places])
    left = rows.new_full((rows.shape[0], solved.shape[1]), torch.nan)
    left[places] = solved.to(left.dtype)
    report = replace(not_finite(rows.shape[0]), notes=own.notes)
    on_host = places.cpu()
    for whole, part in zip(
        (report.status, report.iterations, report.residual),
        (own.status, own.iterations, own.residual),
        strict=True,
    ):
        whole[on_host] = part
    return left, report


def direct_report(finite: Tensor) -> SolverReport:
    """Of right-hand sides that are solved exactly, but for those that `finite`, `[t]`, excludes."""
    spoilt = ~finite.cpu()
    report, none = SolverReport.exact(len(spoilt)), not_finite(len(spoilt))
    report.status[spoilt] = none.status[spoilt]
    report.residual[spoilt] = none.residual[spoilt]
    return report


def not_finite(t: int) -> SolverReport:
    """The report of t right-hand sides that are not finite."""
    return SolverReport(
        torch.full((t,), SolverStatus.NOT_FINITE, dtype=torch.int8),
        torch.zeros(t, dtype=torch.int32),
        torch.full((t,), torch.nan, dtype=torch.float64),
    )


def worst(reports: list[SolverReport]) -> SolverReport:
    """Per right-hand side over blocks: the worst status, the most iterations, the largest residual."""
    return SolverReport(
        torch.stack([report.status for report in reports]).amax(0),
        torch.stack([report.iterations for report in reports]).amax(0),
        torch.stack([report.residual for report in reports]).amax(0),
        _all_notes(reports),
    )


def joined_reports(reports: list[SolverReport]) -> SolverReport:
    """The reports of right-hand sides that were solved one after another."""
    return SolverReport(
        torch.cat([report.status for report in reports]),
        torch.cat([report.iterations for report in reports]),
        torch.cat([report.residual for report in reports]),
        _all_notes(reports),
    )


def _all_notes(reports: list[SolverReport]) -> tuple[str, ...]:
    """Every sentence once, in order."""
    return tuple(dict.fromkeys(sentence for report in reports for sentence in report.notes))


def fitted_tensor(state: FitState, step: str, unit: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """One tensor of a fit's state.

    Raises:
        ValueError: it is missing or has another shape; names pass, block and tensor.
    """
    found = state.get(step, {}).get(unit, {}).get(name)
    if found is None or tuple(found.shape) != shape:
        raise ValueError(
            f"fit state: expected {name!r} {list(shape)} of block {unit!r} in pass {step!r}, got "
            f"{'nothing' if found is None else list(found.shape)}; fit the method first, or give the state "
            "of a fit with the same method, model and blocks"
        )
    return found
