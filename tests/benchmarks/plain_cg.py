"""Simultaneous conjugate gradients as one would write them in memory: the reference for speed and numbers.

Uses nothing of the library. Curvature: the generalized Gauss-Newton matrix of cross-entropy, which is
positive semi-definite wherever training stopped, so that conjugate gradients converge.

Shapes: n examples, R right-hand sides, P parameters, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

Data = tuple[Tensor, Tensor]
SIDES = 16
"""Right-hand sides per vmapped product: the fastest of 4, 8, 16, 32, 64, 256 tried."""


class Solution(NamedTuple):
    """`[T, N]` influences and the iterations of the slowest right-hand side."""

    influences: Tensor
    iterations: int


def plain_cg(model: nn.Module, train: Data, test: Data, regularization: float, rtol: float) -> Solution:
    """Influences of every training example on every test example by conjugate gradients."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    product = gauss_newton(model, parameters, train[0])
    right_hand_sides = per_example_gradients(model, parameters, test)
    solutions, iterations = conjugate_gradients(
        lambda v: product(v).add_(v, alpha=regularization), right_hand_sides, rtol
    )
    return Solution(solutions @ per_example_gradients(model, parameters, train).T, iterations)


def per_example_gradients(model: nn.Module, parameters: Mapping[str, Tensor], data: Data) -> Tensor:
    """Gradients of each example's loss, `[n, P]`."""

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (x[None],)), y[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0))(dict(parameters), data[0], data[1])
    return torch.cat([row.flatten(1) for row in rows.values()], dim=1)


def gauss_newton(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """`V [R, P] -> V H` with `H = (1/n) Σ Jᵀ (diag(p) − p pᵀ) J`, one vmapped product for `SIDES` rows."""
    values = dict(parameters)
    shapes = {name: value.shape for name, value in values.items()}
    sizes = [value.numel() for value in values.values()]

    def outputs(at: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, at, (x,))
        return found

    logits, pull_back = vjp(outputs, values)[:2]
    p = logits.softmax(1)

    def product(v: Tensor) -> Tensor:
        pieces = v.split(sizes)
        tangent = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        pushed = jvp(outputs, (values,), (tangent,))[1]
        curved = p * pushed - p * (p * pushed).sum(1, keepdim=True)
        pulled = pull_back(curved / len(x))[0]
        return torch.cat([pulled[name].flatten() for name in shapes])

    return vmap(product, chunk_size=SIDES)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], B: Tensor, rtol: float, maxiter: int = 1000
) -> tuple[Tensor, int]:
    """Rows X with `product(X) = B`, each to `‖r‖ ≤ rtol ‖b‖`; rows that have converged drop out."""
    X = torch.zeros_like(B)
    rows = torch.arange(len(B))
    bound = (rtol * B.norm(dim=1)) ** 2
    x, r, p = X.clone(), B.clone(), B.clone()
    rr = (r * r).sum(1)
    for iteration in range(1, maxiter + 1):
        Hp = product(p)
        step = (rr / (p * Hp).sum(1))[:, None]
        x += step * p
        r -= step * Hp
        previous, rr = rr, (r * r).sum(1)
        p = r + (rr / previous)[:, None] * p
        active = rr > bound
        if not bool(active.all()):
            X[rows[~active]] = x[~active]
            rows, bound = rows[active], bound[active]
            x, r, p, rr = x[active], r[active], p[active], rr[active]
        if not len(rows):
            return X, iteration
    raise RuntimeError(f"the reference did not converge in {maxiter} iterations; raise CG_REGULARIZATION")
