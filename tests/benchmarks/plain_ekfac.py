"""EK-FAC as one would write it for one network in memory: the reference for speed and for numbers.

Uses nothing of the library. Linear layers with bias, cross-entropy, one token per example.

Shapes: n examples, i inputs with the bias's 1, o outputs, K output directions, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]


class Captured(NamedTuple):
    """One layer's activations and output gradients."""

    a: Tensor
    """`[n, i]`"""
    g: Tensor
    """`[K, n, o]`"""


def plain_ekfac(model: nn.Sequential, train: Data, test: Data, regularization: float, exact: bool) -> Tensor:
    """Influences `[T, N]` of every training example on every test example.

    With `exact` the curvature sums over all outputs, else it draws one label per example.
    """
    layers = capture(model, train[0], lambda logits: curvature_directions(logits, exact))
    left = capture(model, test[0], lambda logits: loss_directions(logits, test[1]))
    right = capture(model, train[0], lambda logits: loss_directions(logits, train[1]))
    scores = torch.zeros(len(test[0]), len(train[0]))
    for curvature, tested, trained in zip(layers, left, right, strict=True):
        factors = solve(curvature, gradients(tested), regularization)
        scores += factors.flatten(1) @ gradients(trained).flatten(1).T
    return scores


def capture(model: nn.Sequential, x: Tensor, directions: object) -> list[Captured]:
    """Activations and output gradients of each Linear for `directions(logits) -> [K, n, C]`."""
    activations: list[Tensor] = []
    outputs: list[Tensor] = []
    hidden = x
    model.requires_grad_(False)
    for module in model:
        if isinstance(module, nn.Linear):
            activations.append(F.pad(hidden.detach(), (0, 1), value=1.0))
            hidden = module(hidden)
            outputs.append(hidden if hidden.requires_grad else hidden.requires_grad_())
        else:
            hidden = module(hidden)
    assert callable(directions)
    rows = [
        torch.autograd.grad(hidden, outputs, direction, retain_graph=True)
        for direction in directions(hidden.detach())
    ]
    return [Captured(a, torch.stack(g)) for a, g in zip(activations, zip(*rows, strict=True), strict=True)]


def loss_directions(logits: Tensor, y: Tensor) -> Tensor:
    """`p − e_y`, `[1, n, C]`: the loss's gradient in the outputs."""
    return (logits.softmax(1) - F.one_hot(y, logits.shape[1]))[None]


def curvature_directions(logits: Tensor, exact: bool) -> Tensor:
    """V with `E[v vᵀ] = diag(p) − p pᵀ`: `√p_k (p − e_k)` for every k, or `p − e_k` of one k drawn from p."""
    p = logits.softmax(1)
    if not exact:
        drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0))[:, 0]
        return loss_directions(logits, drawn)
    every = p[None] - torch.eye(p.shape[1])[:, None, :]
    return every * p.T.sqrt()[:, :, None]


def gradients(captured: Captured) -> Tensor:
    """Per-example gradients `[n, o, i]` of the one direction captured."""
    return captured.g[0][:, :, None] * captured.a[:, None, :]


def solve(curvature: Captured, gradient: Tensor, regularization: float) -> Tensor:
    """`Q_G ((Q_Gᵀ g Q_A) / (Λ + λ)) Q_Aᵀ`, with `Λ = E[(Q_Gᵀ g ãᵀ Q_A)²]`, a product for one token."""
    a, g = curvature
    n = len(a)
    Q_A = torch.linalg.eigh((a.T @ a / n).double())[1].float()
    flat = g.flatten(0, 1)
    Q_G = torch.linalg.eigh((flat.T @ flat / n).double())[1].float()
    turned = ((g @ Q_G) ** 2).sum(0)
    diagonal = turned.T @ (a @ Q_A) ** 2 / n
    solved: Tensor = Q_G @ ((Q_G.T @ gradient @ Q_A) / (diagonal + regularization)) @ Q_A.T
    return solved
