"""Conjugate gradients for many right-hand sides at once, each converging on its own.

`A x = b` for a symmetric positive A that is known by its products. Every iteration makes ONE product
with all right-hand sides that are not finished. A right-hand side ends on its TRUE residual
`b − A x`, not on the one that the recursion carries along and that drifts away from it by rounding:
when the recursion says done, the next product checks, and the recursion restarts if it was wrong.

Shapes: q right-hand sides, P unknowns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_calculator.maths.method import SolverReport, SolverStatus

Rows = Callable[[Tensor], Tensor]
"""A linear map applied to every row of `[q, P]`."""

_RUNNING = -1
_NEEDED_PROGRESS = 0.5
"""A restart whose true residual fell by less than this factor says that rounding is the limit."""


@dataclass(frozen=True)
class Stopping:
    """When a right-hand side is done."""

    rtol: float
    """`‖r‖ ≤ max(rtol ‖b‖, atol)`."""
    atol: float
    maxiter: int
    """Iterations per right-hand side."""


def conjugate_gradients(
    product: Rows, right_hand_sides: Tensor, stopping: Stopping, precondition: Rows | None = None
) -> tuple[Tensor, SolverReport]:
    """`A^-1 b` of every row of `[q, P]`, and how each ended.

    `MAX_ITERATIONS` also stands for a tolerance below what the dtype reaches: the true residual no
    longer falls from one restart to the next.
    """
    solves = _Solves(right_hand_sides, stopping, precondition or (lambda rows: rows))
    while solves.active.numel():
        solves.advance(product(solves.to_multiply()))
    return solves.solutions(), solves.report()


class _Solves:
    """The right-hand sides that still run, compact, and the results of all."""

    def __init__(self, b: Tensor, stopping: Stopping, precondition: Rows) -> None:
        q, device = b.shape[0], b.device
        self._stopping = stopping
        self._precondition = precondition
        # Squares of a confident example's gradient underflow in float32: all are solved at one scale.
        largest = b.abs().amax(dim=1)
        self._scale = torch.where(largest > 0, largest, 1)
        b = b / self._scale[:, None]
        self.x = torch.zeros_like(b)
        self._status = torch.full((q,), SolverStatus.CONVERGED, dtype=torch.int8, device=device)
        self._iterations = torch.zeros(q, dtype=torch.int32, device=device)
        self._norm = torch.linalg.vector_norm(b, dim=1)
        self._residual = self._norm.clone()
        self._limit = torch.maximum(stopping.rtol * self._norm, stopping.atol / self._scale)
        self.active = (self._norm > self._limit).nonzero().squeeze(1)
        # Of the active ones only, row by row:
        self._b = b[self.active]
        self._r = self._b.clone()
        self._d = precondition(self._r).clone()
        self._rz = torch.linalg.vecdot(self._r, self._d)
        self._checking = torch.zeros(len(self.active), dtype=torch.bool, device=device)
        # What a check that fails ends with; `_RUNNING`: it restarts the recursion.
        self._verdict = torch.full((len(self.active),), _RUNNING, dtype=torch.int8, device=device)
        self._last_check = torch.full((len(self.active),), torch.inf, dtype=b.dtype, device=device)

    def to_multiply(self) -> Tensor:
        """The search direction of each, or the solution where the true residual is being checked."""
        return torch.where(self._checking[:, None], self.x[self.active], self._d)

    def advance(self, multiplied: Tensor) -> None:
        """One iteration of each that runs; the end or a restart of each that was checked."""
        checked = self._checking
        self._step(multiplied, ~checked)
        done = torch.zeros_like(checked)
        if checked.any():
            done = self._check(multiplied, checked)
        if done.any():
            self._keep(~done)

    def _step(self, multiplied: Tensor, running: Tensor) -> None:
        curvature = torch.linalg.vecdot(self._d, multiplied)
        positive = (curvature > 0) & torch.isfinite(curvature)
        moves = running & positive
        α = torch.where(moves, self._rz / curvature, 0)[:, None]
        self.x[self.active] += torch.where(moves[:, None], α * self._d, 0)
        self._r -= torch.where(moves[:, None], α * multiplied, 0)
        z = self._precondition(self._r)
        rz = torch.linalg.vecdot(self._r, z)
        β = torch.where(moves, rz / self._rz, 0)[:, None]
        self._d = torch.where(moves[:, None], z + β * self._d, self._d)
        self._rz = torch.where(moves, rz, self._rz)
        self._iterations[self.active] += moves.to(torch.int32)
        self._schedule_checks(running, positive, torch.isfinite(curvature))

    def _schedule_checks(self, running: Tensor, positive: Tensor, finite: Tensor) -> None:
        """The next product of these is with the solution: they converged or have to stop."""
        verdict = self._verdict
        verdict[running & (self._iterations[self.active] >= self._stopping.maxiter)] = (
            SolverStatus.MAX_ITERATIONS
        )
        verdict[running & finite & ~positive] = SolverStatus.INDEFINITE
        verdict[running & ~finite] = SolverStatus.NOT_FINITE
        small = torch.linalg.vector_norm(self._r, dim=1) <= self._limit[self.active]
        self._checking = running & (small | (verdict != _RUNNING))

    def _check(self, multiplied: Tensor, checked: Tensor) -> Tensor:
        """Whether each of the checked is done; the others restart from their true residual."""
        true = self._b - multiplied
        norm = torch.linalg.vector_norm(true, dim=1)
        converged = norm <= self._limit[self.active]
        verdict = self._verdict
        verdict[checked & (verdict == _RUNNING) & (norm > _NEEDED_PROGRESS * self._last_check)] = (
            SolverStatus.MAX_ITERATIONS
        )
        verdict[checked & ~torch.isfinite(norm)] = SolverStatus.NOT_FINITE
        done = checked & (converged | (verdict != _RUNNING))
        places = self.active[done]
        self._status[places] = torch.where(converged, SolverStatus.CONVERGED, verdict)[done].to(torch.int8)
        self._residual[places] = norm[done]
        self._restart(checked & ~done, true, norm)
        return done

    def _restart(self, again: Tensor, true: Tensor, norm: Tensor) -> None:
        self._r = torch.where(again[:, None], true, self._r)
        z = self._precondition(self._r)
        self._d = torch.where(again[:, None], z, self._d)
        self._rz = torch.where(again, torch.linalg.vecdot(self._r, z), self._rz)
        self._last_check = torch.where(again, norm, self._last_check)

    def _keep(self, rows: Tensor) -> None:
        self.active = self.active[rows]
        self._b, self._r, self._d = self._b[rows], self._r[rows], self._d[rows]
        self._rz, self._last_check = self._rz[rows], self._last_check[rows]
        self._checking, self._verdict = self._checking[rows], self._verdict[rows]

    def solutions(self) -> Tensor:
        """All x `[q, P]`; NaN for those that are not finite."""
        solutions = self.x * self._scale[:, None]
        solutions[self._status == SolverStatus.NOT_FINITE] = torch.nan
        return solutions

    def report(self) -> SolverReport:
        """How all ended."""
        relative = torch.where(self._norm > 0, self._residual.double() / self._norm.double(), 0)
        return SolverReport(self._status.cpu(), self._iterations.cpu(), relative.cpu())
