"""LiSSA's recursion for many right-hand sides at once: `x ← x + (b − A_j x) / s`, each ending on its own.

With `h = s x` these are the Neumann series' `h ← b + h − A_j h / s`. `A_j` is A, or an unbiased estimate
of it that changes from step to step. With A itself the residual is known at every step; with estimates
it is taken, by one product with A, after 1, 2, 4, ... epochs and at the end.

A residual of steps with A is a sum of powers `(1 − a/s)^k` over the eigenvalues a of A, so that its norm
is log-convex: once it grows it never falls again. That is a proof, and ends a solve long before
numbers overflow.

Shapes: q right-hand sides, P unknowns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_calculator.maths.conjugate_gradients import Rows, Stopping
from influence_calculator.maths.finite import spoil
from influence_calculator.maths.method import SolverReport, SolverStatus

GROWTH = 2.0
"""A residual that grew by this factor does not fall again: from its smallest with A itself, from ‖b‖ with
estimates, whose noise it includes."""
ROUNDING = 100.0
"""Times ε (2s ‖x‖ + ‖b‖): below, a residual is rounding, and its growth says nothing."""
MOST_ROUNDING = 0.1
"""What that takes the place of at most, for products in half precision."""


@dataclass(frozen=True)
class Steps:
    """Products with the estimates of A."""

    products: Iterator[Rows]
    """One per step, without end."""
    per_epoch: int


def recursion(
    product: Rows,
    right_hand_sides: Tensor,
    stopping: Stopping,
    scale: float,
    steps: Steps | None = None,
    computed_in: torch.dtype | None = None,
) -> tuple[Tensor, SolverReport]:
    """`A^-1 b` of every row of `[q, P]`, and how each ended; NaN where the recursion grows.

    `product` is the one with A; without `steps` every step takes it. Products are computed in the dtype
    `computed_in` (default: that of the rows). The row's answer does not depend on other rows.
    """
    ε = torch.finfo(computed_in or right_hand_sides.dtype).eps
    solves = _Solves(right_hand_sides, stopping, scale, min(ROUNDING * ε, MOST_ROUNDING), exact=steps is None)
    check = 1 if steps is None else steps.per_epoch
    while solves.active.numel():
        if steps is None:
            solves.step(solves.r)
        else:
            for _ in range(min(check, stopping.maxiter) - solves.iteration):
                solves.step(solves.b - next(steps.products)(solves.x))
            check *= 2
        solves.check(product)
    return solves.solution, solves.report()


class _Solves:
    """The right-hand sides that still run, compact, and the results of all."""

    def __init__(self, b: Tensor, stopping: Stopping, scale: float, rounding: float, *, exact: bool) -> None:
        q, device = b.shape[0], b.device
        self._stopping, self._scale, self._rounding, self._exact = stopping, scale, rounding, exact
        # Squares of a confident example's gradient underflow in float32: all are solved at one size.
        largest = b.abs().amax(dim=1)
        self._size = torch.where(largest > 0, largest, 1)
        b = b / self._size[:, None]
        self.solution = torch.zeros_like(b)
        self._norm = torch.linalg.vector_norm(b, dim=1)
        self._limit = torch.maximum(stopping.rtol * self._norm, stopping.atol / self._size)
        self._status = torch.full((q,), SolverStatus.CONVERGED, dtype=torch.int8, device=device)
        self._iterations = torch.zeros(q, dtype=torch.int32, device=device)
        self._residual = self._norm.clone()
        self.iteration = 0
        self.active = (self._norm > self._limit).nonzero().squeeze(1)
        # Of the active ones only, row by row:
        self.b = b[self.active]
        self.x = torch.zeros_like(self.b)
        self.r = self.b.clone()
        self._smallest = self._norm[self.active]

    def step(self, residual: Tensor) -> None:
        """`x += (b − A_j x) / s`."""
        self.x.add_(residual, alpha=1 / self._scale)
        self.iteration += 1

    def check(self, product: Rows) -> None:
        """Takes the true residual, and the rows out that ended."""
        self.r = torch.sub(self.b, product(self.x))
        norm = torch.linalg.vector_norm(self.r, dim=1)
        converged = norm <= self._limit[self.active]
        lost = ~torch.isfinite(norm) | self._grows(norm)
        done = converged | lost | (self.iteration >= self._stopping.maxiter)
        status = torch.where(converged, SolverStatus.CONVERGED, SolverStatus.MAX_ITERATIONS)
        status[lost] = SolverStatus.NOT_FINITE
        if self._exact:
            self._smallest = torch.minimum(self._smallest, norm)
        self._end(done, status, norm)

    def _grows(self, norm: Tensor) -> Tensor:
        size = 2 * self._scale * torch.linalg.vector_norm(self.x, dim=1) + self._norm[self.active]
        return (norm > GROWTH * self._smallest) & (norm > self._rounding * size)

    def _end(self, done: Tensor, status: Tensor, norm: Tensor) -> None:
        if not done.any():
            return
        places, answers = self.active[done], self.x[done]
        spoil(answers, status[done] == SolverStatus.NOT_FINITE)
        self.solution[places] = answers * self._size[places][:, None]
        self._status[places] = status[done].to(torch.int8)
        self._iterations[places] = self.iteration
        self._residual[places] = norm[done]
        kept = ~done
        self.active, self._smallest = self.active[kept], self._smallest[kept]
        self.b, self.x, self.r = self.b[kept], self.x[kept], self.r[kept]

    def report(self) -> SolverReport:
        """How all ended."""
        relative = torch.where(self._norm > 0, self._residual.double() / self._norm.double(), 0)
        return SolverReport(self._status.cpu(), self._iterations.cpu(), relative.cpu())
