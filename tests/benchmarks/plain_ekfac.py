"""EK-FAC as one would write it in memory, with hooks: the reference for speed and for numbers.

Uses nothing of the library. Linear and Conv2d, each called once; cross-entropy summed over an example.

Shapes: n examples, S tokens, i inputs (with the bias's 1), o outputs, K output directions, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]
Directions = Callable[[Tensor], Tensor]
"""From logits `[n, C, ...]` to `[K, n, C, ...]`, what is propagated back."""


class Captured(NamedTuple):
    """One layer's activations and output gradients."""

    a: Tensor
    """`[n, S, i]`"""
    g: Tensor
    """`[K, n, S, o]`"""


class Curvature(NamedTuple):
    """Eigenbasis and eigenvalues of one layer."""

    Q_A: Tensor
    Q_G: Tensor
    diagonal: Tensor
    """`Λ [o, i]`"""


def plain_ekfac(
    model: nn.Module, train: Data, test: Data, regularization: float, draws: int | None, chunk: int | None
) -> Tensor:
    """Influences `[T, N]` of every training example on every test example.

    The curvature takes `draws` per position, or sums over all outputs where it is None. `chunk` examples are
    differentiated at once, all of them where it is None.
    """
    curvatures = fit(model, train, draws, chunk)
    factors = [
        solve(curvature, gradients(tested), regularization)
        for curvature, tested in zip(curvatures, capture(model, test[0], by_labels(test[1])), strict=True)
    ]
    columns = []
    for x, y in batches(train, chunk):
        layers = capture(model, x, by_labels(y))
        scores = torch.zeros(len(test[0]), len(x))
        for z, layer in zip(factors, layers, strict=True):
            scores += z.flatten(1) @ gradients(layer).flatten(1).T
        columns.append(scores)
    return torch.cat(columns, dim=1)


def fit(model: nn.Module, train: Data, draws: int | None, chunk: int | None) -> list[Curvature]:
    """Every layer's curvature, in two passes over the training set, each with draws of its own."""
    generator = torch.Generator().manual_seed(0)

    def captures() -> Iterable[list[Captured]]:
        return (capture(model, x, by_curvature(draws, generator)) for x, _ in batches(train, chunk))

    covariances: list[tuple[Tensor, Tensor]] = []
    for layers in captures():
        found = [(gram(layer.a), gram(layer.g)) for layer in layers]
        covariances = [
            (A + more_A, G + more_G)
            for (A, G), (more_A, more_G) in zip(covariances or [(0, 0)] * len(found), found, strict=True)
        ]
    bases = [(eigenvectors(A), eigenvectors(G)) for A, G in covariances]
    diagonals = [torch.zeros(len(Q_G), len(Q_A)) for Q_A, Q_G in bases]
    for layers in captures():
        for diagonal, layer, basis in zip(diagonals, layers, bases, strict=True):
            diagonal += squares(layer, *basis) / len(train[0])
    return [Curvature(*basis, diagonal) for basis, diagonal in zip(bases, diagonals, strict=True)]


def capture(model: nn.Module, x: Tensor, directions: Directions) -> list[Captured]:
    """Activations and output gradients of each layer, in the order of the calls."""
    activations: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        activations.append(patches(module, inputs[0].detach()))
        outputs.append(output if output.requires_grad else output.requires_grad_())

    model.requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(record) for layer in layers]
    logits = model(x)
    for handle in handles:
        handle.remove()
    rows = [
        torch.autograd.grad(logits, outputs, direction, retain_graph=True)
        for direction in directions(logits.detach())
    ]
    return [
        Captured(a, torch.stack([tokens(each) for each in g]))
        for a, g in zip(activations, zip(*rows, strict=True), strict=True)
    ]


def patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """What the weight is multiplied with, `[n, S, i]`."""
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        inputs = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride).mT
    rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    return rows if module.bias is None else F.pad(rows, (0, 1), value=1.0)


def tokens(gradient: Tensor) -> Tensor:
    """`[n, S, o]` of a gradient by `[n, o, height, width]` or by `[n, ..., o]`."""
    if gradient.dim() == 4:
        return gradient.flatten(2).mT
    return gradient.reshape(len(gradient), -1, gradient.shape[-1])


def by_labels(y: Tensor) -> Directions:
    """`p − e_y`, the loss's gradient in the outputs."""

    def directions(logits: Tensor) -> Tensor:
        hot = F.one_hot(y, logits.shape[1]).movedim(-1, 1)
        return (logits.softmax(1) - hot)[None]

    return directions


def by_curvature(draws: int | None, generator: torch.Generator) -> Directions:
    """B's columns, or B ε of random signs ε: `B Bᵀ = diag(p) − p pᵀ` with `B = diag(√p) − p √pᵀ`."""

    def directions(logits: Tensor) -> Tensor:
        p = logits.softmax(1)
        if draws is None:
            assert logits.dim() == 2, "summing over the outputs of all tokens takes too long: ask for draws"
            every = torch.eye(p.shape[1])[:, None, :].expand(-1, *p.shape)
            return root(p, every)
        shape = draws, *p.shape
        return root(p, torch.randint(0, 2, shape, generator=generator) * 2.0 - 1) / draws**0.5

    return directions


def root(p: Tensor, ε: Tensor) -> Tensor:
    """`B ε` for each of `[K, n, C, ...]`."""
    scaled = p.sqrt() * ε
    return scaled - p * scaled.sum(2, keepdim=True)


def gram(rows: Tensor) -> Tensor:
    """`Σ r rᵀ` over all rows."""
    flat = rows.flatten(0, -2)
    return flat.T @ flat


def eigenvectors(matrix: Tensor) -> Tensor:
    found: Tensor = torch.linalg.eigh(matrix.double())[1].to(matrix.dtype)
    return found


def squares(layer: Captured, Q_A: Tensor, Q_G: Tensor) -> Tensor:
    """`Σ (Q_Gᵀ (Σ_s g ãᵀ) Q_A)²` over examples and directions, `[o, i]`; a product for one token."""
    a, g = layer.a @ Q_A, layer.g @ Q_G
    if a.shape[1] == 1:
        found: Tensor = (g[:, :, 0] ** 2).sum(0).T @ a[:, 0] ** 2
        return found
    return torch.stack([((each.mT @ a) ** 2).sum(0) for each in g]).sum(0)


def gradients(layer: Captured) -> Tensor:
    """Per-example gradients `[n, o, i]` of the one direction captured."""
    if layer.a.shape[1] == 1:
        return layer.g[0].mT * layer.a
    return layer.g[0].mT @ layer.a


def solve(curvature: Curvature, gradient: Tensor, regularization: float) -> Tensor:
    """`Q_G ((Q_Gᵀ g Q_A) / (Λ + λ)) Q_Aᵀ`."""
    Q_A, Q_G, diagonal = curvature
    solved: Tensor = Q_G @ ((Q_G.T @ gradient @ Q_A) / (diagonal + regularization)) @ Q_A.T
    return solved


def batches(data: Data, chunk: int | None) -> Iterable[Data]:
    """Examples `chunk` at a time."""
    x, y = data
    size = chunk or len(x)
    return zip(x.split(size), y.split(size), strict=True)
