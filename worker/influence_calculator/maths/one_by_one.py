"""Autograd's gradients of batches of one example: what everything that is faster is compared with.

Shapes: n examples.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from influence_calculator.maths.errors import UnsupportedModelError
from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.gradients import per_sample_gradients
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.objective import Batch, Objective, batch_size, slice_batch

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Allowed relative difference of two gradients of one parameter; mistakes are of order 1.

float32 leaves room for TF32 convolutions, which a GPU uses by default."""

HALF_TOLERANCE = 0.1
"""The same for half precision."""

NOISE = 1e-3
"""A parameter whose gradient is this small beside the whole gradient is compared absolutely: rounding."""


def tolerance(dtype: torch.dtype) -> float:
    """Allowed relative difference of two gradients of one parameter."""
    return TOLERANCE.get(dtype, HALF_TOLERANCE)


def gradients_one_by_one(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """Parameter -> gradients, `[n, numel]`.

    Raises:
        UnsupportedModelError: the loss depends on no tracked parameter.
    """
    n = batch_size(batch)
    rows = {name: value.new_zeros(n, value.numel()) for name, value in objective.parameters().items()}
    for i in range(n):
        leaves = {name: value.requires_grad_() for name, value in objective.parameters().items()}
        with torch.enable_grad():
            alone = slice_batch(batch, i, i + 1)
            loss = objective.loss(objective.outputs(alone, leaves), alone).sum()
            if not loss.requires_grad:
                raise UnsupportedModelError(
                    "loss: expected one that depends on the tracked parameters, got one that depends on none "
                    "of them; is a part of the model detached, or an adapter merged or disabled?"
                )
            found = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        for name, gradient in zip(leaves, found, strict=True):
            rows[name][i] = gradient.flatten()
    return rows


def mismatched(objective: Objective, batch: Batch, expected: Mapping[str, Tensor]) -> list[str]:
    """Parameters of which the gradients of a whole batch differ from the expected ones; examples with some
    that are not finite do not count.
    """
    finite = torch.stack([finite_rows(rows) for rows in expected.values()]).all(0)
    shapes = {name: tuple(value.shape) for name, value in objective.parameters().items()}
    layout = Layout.of(shapes, {name: (name,) for name in shapes})
    is_finite = bool(finite.all())
    whole = max(float((rows if is_finite else rows[finite]).norm()) for rows in expected.values())
    wrong = []
    for part in per_sample_gradients(objective, batch, layout):
        rows, found = expected[part.block], part.values.to(expected[part.block].dtype)
        if not is_finite:
            rows, found = rows[finite], found[finite]
        allowed = tolerance(rows.dtype) * max(float(rows.norm()), NOISE * whole)
        # Of one example at a time: all differences would take as much memory again.
        differences = torch.stack([(one - own).norm() for one, own in zip(found, rows, strict=True)])
        if not float(differences.norm()) <= allowed:
            wrong.append(part.block)
    return wrong
