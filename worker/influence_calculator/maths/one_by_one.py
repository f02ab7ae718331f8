"""Autograd's gradients of batches of one example: what everything that is faster is compared with.

Shapes: n examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from influence_calculator.maths.errors import UnsupportedModelError
from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.gradients import accumulation_dtype, per_sample_gradients
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.objective import Batch, Objective, batch_size, slice_batch
from influence_calculator.maths.seeded_rows import generator, sign_rows

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Allowed relative difference of two gradients of one parameter; mistakes are of order 1.

float32 leaves room for TF32 convolutions, which a GPU uses by default."""

HALF_TOLERANCE = 0.1
"""The same for half precision."""

PIECE = 4096
"""Entries of a gradient whose signs are drawn; those that follow have the same, or all of them turned."""

PROBED = 4
"""Examples tried at most."""

PROJECTIONS = 8
"""Of each gradient: two entries that changed places are missed by one in two, so by none of those of four
examples in one case of four thousand millions."""

NOISE = 1e-3
"""A parameter whose gradient is this small beside the whole gradient is compared absolutely: rounding."""


def tolerance(dtype: torch.dtype) -> float:
    """Allowed relative difference of two gradients of one parameter."""
    return TOLERANCE.get(dtype, HALF_TOLERANCE)


@dataclass(frozen=True)
class Sketched:
    """Gradients of examples, told apart by a few numbers of each, on the host: whole they would take n times
    the model.
    """

    projections: dict[str, Tensor]
    """Parameter -> projections of its gradients, `[n, PROJECTIONS]`, in float64."""
    norms: dict[str, Tensor]
    """Parameter -> its gradients' norms, `[n]`, in float64."""
    finite: Tensor
    """Examples whose gradients are finite, `[n]`."""


def gradients_one_by_one(objective: Objective, batch: Batch) -> Sketched:
    """The gradients of each example alone, by the model's own parameters; it holds those of one.

    Raises:
        UnsupportedModelError: the loss depends on no tracked parameter.
    """
    with tracked_alone(objective) as own:
        return _one_by_one(batch, own, objective.loss_as_written)


def used_otherwise(objective: Objective, batch: Batch, expected: Sketched) -> list[str]:
    """Parameters that an example's loss depends on otherwise than as attributes of modules: with others in
    their place its gradients are not the expected ones.
    """
    leaves = {name: value.requires_grad_() for name, value in objective.parameters().items()}

    def loss(alone: Batch) -> Tensor:
        return objective.losses_at(leaves, alone).sum()

    found = _one_by_one(batch, leaves, loss)
    agree = _agreement(objective, expected)
    return [name for name, projections in found.projections.items() if not agree(name, projections)]


@contextmanager
def tracked_alone(objective: Objective) -> Iterator[dict[str, Tensor]]:
    """The tracked parameters themselves; inside they take gradients, without hooks, and no others of the
    model do.
    """
    own = dict(objective.model.named_parameters())
    tracked = frozenset(objective.names)
    before = [(p, p.requires_grad, p._backward_hooks) for p in own.values()]
    try:
        for name, p in own.items():
            if p.requires_grad != (name in tracked):
                p.requires_grad_(name in tracked)
            if p._backward_hooks:
                p._backward_hooks = None
        yield {name: own[name] for name in objective.names}
    finally:
        for p, requires_grad, hooks in before:
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if hooks:
                p._backward_hooks = hooks


def _one_by_one(batch: Batch, leaves: Mapping[str, Tensor], loss: Callable[[Batch], Tensor]) -> Sketched:
    alone = [_sketched(slice_batch(batch, i, i + 1), i, leaves, loss) for i in range(batch_size(batch))]
    return Sketched(
        {name: torch.cat([one.projections[name] for one in alone]) for name in leaves},
        {name: torch.cat([one.norms[name] for one in alone]) for name in leaves},
        torch.cat([one.finite for one in alone]),
    )


def _sketched(
    alone: Batch, i: int, leaves: Mapping[str, Tensor], loss: Callable[[Batch], Tensor]
) -> Sketched:
    """Of the one example alone, the i-th."""
    with torch.enable_grad():
        value = loss(alone)
        if not value.requires_grad:
            raise UnsupportedModelError(
                "loss: expected one that depends on the tracked parameters, got one that depends on none "
                "of them; is a part of the model detached, or an adapter merged or disabled?"
            )
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    rows = {name: gradient.reshape(1, -1) for name, gradient in zip(leaves, found, strict=True)}
    return Sketched(
        {name: _projected(row, i) for name, row in rows.items()},
        {name: _norms(row) for name, row in rows.items()},
        torch.stack([finite_rows(row) for row in rows.values()]).all(0).cpu(),
    )


def mismatched(objective: Objective, batch: Batch, expected: Sketched) -> list[str]:
    """Parameters of which the gradients of a whole batch differ from the expected ones; examples with some
    that are not finite do not count.
    """
    parameters = objective.parameters()
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    layout = Layout.of(shapes, {name: (name,) for name in shapes})
    agree = _agreement(objective, expected)
    return [
        part.block
        for part in per_sample_gradients(objective, batch, layout)
        if not agree(part.block, _projected(part.values))
    ]


def _agreement(objective: Objective, expected: Sketched) -> Callable[[str, Tensor], bool]:
    """Tells whether a parameter's gradients, projected, are the expected ones."""
    norms = {name: float(own[expected.finite].norm()) for name, own in expected.norms.items()}
    whole = max(norms.values())
    dtypes = {name: value.dtype for name, value in objective.parameters().items()}

    def agree(name: str, projections: Tensor) -> bool:
        differences = (projections.detach() - expected.projections[name])[expected.finite]
        # A projection's square is the squared norm on average.
        difference = float(differences.square().mean(1).sum().sqrt())
        return difference <= tolerance(dtypes[name]) * max(norms[name], NOISE * whole)

    return agree


def _norms(rows: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=accumulation_dtype(rows.dtype))
    return found.cpu().double()


def _projected(rows: Tensor, start: int = 0) -> Tensor:
    """`Σ_ab q_a V_ab r_b` of `[n, numel]` with random signs q and r, V being a row cut into pieces that stand
    one below the other; several of them, of the examples from `start` on.

    An entry's sign is that of its piece times that of its place in it: to draw and to apply them takes next
    to no memory.
    """
    wide = accumulation_dtype(rows.dtype)
    if rows.dtype != wide:
        return torch.cat([_projected(row[None].to(wide), i) for i, row in enumerate(rows, start)])
    n, size = rows.shape
    width = max(1, min(size, PIECE))
    whole = size // width
    those = [i % PROBED for i in range(start, start + n)]
    r = _signs(0, PIECE, rows.dtype, rows.device)[those]
    q = _signs(1, max(PIECE, whole + 1), torch.float64, torch.device("cpu"))[those]
    pieces = torch.bmm(r[:, :, :width], rows[:, : whole * width].unflatten(1, (whole, width)).mT)
    rest = torch.bmm(r[:, :, : size - whole * width], rows[:, whole * width :, None])
    return (q[:, :, : whole + 1] * torch.cat([pieces, rest], dim=2).cpu().double()).sum(2)


@lru_cache(maxsize=8)
def _signs(use: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[PROBED, PROJECTIONS, count]`, others for each use; further examples have the first ones' again."""
    like = torch.zeros((), dtype=dtype, device=device)
    drawn = sign_rows(PROBED * PROJECTIONS, count, generator(0, "compared", use), like)
    return drawn.unflatten(0, (PROBED, PROJECTIONS))
