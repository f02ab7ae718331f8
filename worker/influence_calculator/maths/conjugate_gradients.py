"""Conjugate gradients for many right-hand sides at once, each converging on its own.

`A x = b` for a symmetric positive A that is known by its products. Every iteration makes ONE product
with all right-hand sides that are not finished. A right-hand side ends on its TRUE residual
`b − A x`, not on the one that the recursion carries along and that drifts away from it by rounding:
when the recursion says done, the next product checks, and the recursion restarts if it was wrong.
All that one product leaves for the next are tensors, so that whoever makes the products may store them.

Shapes: q right-hand sides, a of them not finished, P unknowns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from influence_calculator.maths.finite import spoil
from influence_calculator.maths.method import SETTLED, SolverReport, SolverStatus

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
    recursion = Recursion(stopping, precondition)
    solves = recursion.begun(right_hand_sides)
    while not solves.are_done:
        recursion.advance(solves, product(solves.next))
    return solves.solutions(), solves.report()


@dataclass
class Solves:
    """Right-hand sides between two products: the results of all, and compact those that still run."""

    x: Tensor
    """`[q, P]`, of right-hand sides divided by `scale`."""
    scale: Tensor
    """`[q]`. Squares of a confident example's gradient underflow in float32: all are solved at one scale."""
    status: Tensor
    iterations: Tensor
    norm: Tensor
    """`[q]`, `‖b‖`."""
    residual: Tensor
    """`[q]`, the true one, of those that are done."""
    limit: Tensor
    """`[q]`: a right-hand side is done at this residual."""
    active: Tensor
    """`[a]`, the places of those that run. What follows is of these only."""
    b: Tensor
    r: Tensor
    """`[a, P]`, the recursion's residual."""
    next: Tensor
    """`[a, P]`, what is multiplied next: the search direction, or x where the true residual is checked."""
    rz: Tensor
    checking: Tensor
    verdict: Tensor
    """`[a]`, what a check that fails ends with; `_RUNNING`: it restarts the recursion."""
    last_check: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Solves:
        """The inverse of `tensors`; `advance` changes what is given."""
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})

    def tensors(self) -> dict[str, Tensor]:
        """All that goes on from here, and SETTLED."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, SETTLED: torch.tensor(self.are_done)}

    @property
    def are_done(self) -> bool:
        """Whether nothing is left to multiply."""
        return not self.active.numel()

    def solutions(self) -> Tensor:
        """All x `[q, P]`; NaN for those that are not finite."""
        solutions = self.x * self.scale[:, None]
        spoil(solutions, self.status == SolverStatus.NOT_FINITE)
        return solutions

    def report(self) -> SolverReport:
        """How all ended."""
        relative = torch.where(self.norm > 0, self.residual.double() / self.norm.double(), 0)
        return SolverReport(self.status.cpu(), self.iterations.cpu(), relative.cpu())

    def keep(self, rows: Tensor) -> None:
        """Drops the others of those that run."""
        self.active = self.active[rows]
        self.b, self.r, self.next = self.b[rows], self.r[rows], self.next[rows]
        self.rz, self.last_check = self.rz[rows], self.last_check[rows]
        self.checking, self.verdict = self.checking[rows], self.verdict[rows]


@dataclass(frozen=True)
class Recursion:
    """What becomes of right-hand sides with every product."""

    stopping: Stopping
    precondition: Rows | None = None

    def begun(self, right_hand_sides: Tensor) -> Solves:
        """Before the first product, of finite right-hand sides `[q, P]`."""
        q, device = right_hand_sides.shape[0], right_hand_sides.device
        largest = right_hand_sides.abs().amax(dim=1)
        scale = torch.where(largest > 0, largest, 1)
        b = right_hand_sides / scale[:, None]
        norm = torch.linalg.vector_norm(b, dim=1)
        limit = torch.maximum(self.stopping.rtol * norm, self.stopping.atol / scale)
        active = (norm > limit).nonzero().squeeze(1)
        x, b = torch.zeros_like(b), b[active]
        direction = self._preconditioned(b).clone()
        return Solves(
            x=x,
            scale=scale,
            status=torch.full((q,), SolverStatus.CONVERGED, dtype=torch.int8, device=device),
            iterations=torch.zeros(q, dtype=torch.int32, device=device),
            norm=norm,
            residual=norm.clone(),
            limit=limit,
            active=active,
            b=b,
            r=b.clone(),
            next=direction,
            rz=torch.linalg.vecdot(b, direction),
            checking=torch.zeros(len(active), dtype=torch.bool, device=device),
            verdict=torch.full((len(active),), _RUNNING, dtype=torch.int8, device=device),
            last_check=torch.full((len(active),), torch.inf, dtype=b.dtype, device=device),
        )

    def advance(self, solves: Solves, multiplied: Tensor) -> None:
        """One iteration of each that runs; the end or a restart of each that was checked.

        `multiplied` is A times the rows of `solves.next`.
        """
        checked = solves.checking
        self._step(solves, multiplied, ~checked)
        done = torch.zeros_like(checked)
        if checked.any():
            done = self._check(solves, multiplied, checked)
        if done.any():
            solves.keep(~done)
        solves.next = torch.where(solves.checking[:, None], solves.x[solves.active], solves.next)

    def _preconditioned(self, rows: Tensor) -> Tensor:
        return rows if self.precondition is None else self.precondition(rows)

    def _step(self, solves: Solves, multiplied: Tensor, running: Tensor) -> None:
        curvature = torch.linalg.vecdot(solves.next, multiplied)
        positive = (curvature > 0) & torch.isfinite(curvature)
        moves = running & positive
        α = torch.where(moves, solves.rz / curvature, 0)[:, None]
        solves.x[solves.active] += torch.where(moves[:, None], α * solves.next, 0)
        solves.r -= torch.where(moves[:, None], α * multiplied, 0)
        z = self._preconditioned(solves.r)
        rz = torch.linalg.vecdot(solves.r, z)
        β = torch.where(moves, rz / solves.rz, 0)[:, None]
        solves.next = torch.where(moves[:, None], z + β * solves.next, solves.next)
        solves.rz = torch.where(moves, rz, solves.rz)
        solves.iterations[solves.active] += moves.to(torch.int32)
        self._schedule_checks(solves, running, positive, torch.isfinite(curvature))

    def _schedule_checks(self, solves: Solves, running: Tensor, positive: Tensor, finite: Tensor) -> None:
        """The next product of these is with the solution: they converged or have to stop."""
        verdict = solves.verdict
        at_end = solves.iterations[solves.active] >= self.stopping.maxiter
        verdict[running & at_end] = SolverStatus.MAX_ITERATIONS
        verdict[running & finite & ~positive] = SolverStatus.INDEFINITE
        verdict[running & ~finite] = SolverStatus.NOT_FINITE
        small = torch.linalg.vector_norm(solves.r, dim=1) <= solves.limit[solves.active]
        solves.checking = running & (small | (verdict != _RUNNING))

    def _check(self, solves: Solves, multiplied: Tensor, checked: Tensor) -> Tensor:
        """Whether each of the checked is done; the others restart from their true residual."""
        true = solves.b - multiplied
        norm = torch.linalg.vector_norm(true, dim=1)
        converged = norm <= solves.limit[solves.active]
        verdict = solves.verdict
        verdict[checked & (verdict == _RUNNING) & (norm > _NEEDED_PROGRESS * solves.last_check)] = (
            SolverStatus.MAX_ITERATIONS
        )
        verdict[checked & ~torch.isfinite(norm)] = SolverStatus.NOT_FINITE
        done = checked & (converged | (verdict != _RUNNING))
        places = solves.active[done]
        solves.status[places] = torch.where(converged, SolverStatus.CONVERGED, verdict)[done].to(torch.int8)
        solves.residual[places] = norm[done]
        self._restart(solves, checked & ~done, true, norm)
        return done

    def _restart(self, solves: Solves, again: Tensor, true: Tensor, norm: Tensor) -> None:
        solves.r = torch.where(again[:, None], true, solves.r)
        z = self._preconditioned(solves.r)
        solves.next = torch.where(again[:, None], z, solves.next)
        solves.rz = torch.where(again, torch.linalg.vecdot(solves.r, z), solves.rz)
        solves.last_check = torch.where(again, norm, solves.last_check)
