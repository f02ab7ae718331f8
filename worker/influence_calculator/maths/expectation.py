"""Pseudo-gradients v of the loss by the model's outputs f, with `Σ v vᵀ` or `E[v vᵀ]` equal to `∇²_f ℓ`.

Backpropagated in place of the loss's gradient they make sums of gradient products estimate the
generalized Gauss-Newton matrix, the true Fisher for cross-entropy and squared error.

Shapes: n examples, d floating-point output elements of one example, k a draw or an output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_calculator.maths.capture import float_leaves
from influence_calculator.maths.draws import signs
from influence_calculator.maths.objective import IndexedBatch, Objective, batch_size
from influence_calculator.maths.output_curvature import output_eigenpairs, require_real
from influence_calculator.maths.recognised_losses import recognised_vectors


class Expectation(StrEnum):
    """Over which outputs the curvature is taken."""

    SAMPLED = "sampled"
    """Random signs times a root of `∇²_f ℓ`: the same whatever the batching."""
    EXACT = "exact"
    """One backward pass per output element: small heads and tests."""
    EMPIRICAL = "empirical"
    """The gradient at the true labels."""


@dataclass(frozen=True)
class PseudoGradients:
    """`count` pseudo-gradients of one batch, made one at a time."""

    count: int
    at: Callable[[int], list[Tensor]]
    """k -> one tensor per floating-point output, `Σ_k v_k v_kᵀ` being the curvature's estimate."""


@dataclass(frozen=True)
class OutputExpectation:
    """How pseudo-gradients are made."""

    kind: Expectation = Expectation.SAMPLED
    samples: int = 1
    """Draws per example; sampled only."""
    seed: int = 0
    """Sampled only."""
    first: int = 0
    """Number of the first draw; sampled only."""

    def of_other_draws(self) -> OutputExpectation:
        """The same with draws that are independent of these; equal to this one where nothing is drawn."""
        is_drawn = self.kind is Expectation.SAMPLED
        return replace(self, first=self.first + self.samples) if is_drawn else self

    def pseudo_gradients(self, objective: Objective, outputs: Any, indexed: IndexedBatch) -> PseudoGradients:
        """Those of a batch whose outputs are given.

        Raises:
            UnsupportedLossError: they are complex, or the loss has no second derivative that can be formed.
        """
        require_real(outputs)
        outputs = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach(), outputs)
        match self.kind:
            case Expectation.EMPIRICAL:
                return PseudoGradients(1, lambda _: _label_gradients(objective, outputs, indexed))
            case Expectation.EXACT:
                return _of_root(objective, outputs, indexed, lambda m: m, _unit)
            case Expectation.SAMPLED:
                return _of_root(
                    objective, outputs, indexed, lambda _: self.samples, self._drawn, self.samples**-0.5
                )

    def _drawn(self, index: Tensor, m: int, k: int) -> Tensor:
        return signs(self.seed, index, m, self.first + k)


def _unit(index: Tensor, m: int, k: int) -> Tensor:
    return torch.arange(m, device=index.device) == k


def _of_root(
    objective: Objective,
    outputs: Any,
    indexed: IndexedBatch,
    count: Callable[[int], int],
    vector: Callable[[Tensor, int, int], Tensor],
    scale: float = 1.0,
) -> PseudoGradients:
    """`scale B ε_k` for k below `count(m)`: `B Bᵀ = ∇²_f ℓ`, and `vector(index, m, k)` is ε_k, `[..., m]`."""
    n = batch_size(indexed.batch)
    indices = torch.arange(n, device=float_leaves(outputs)[0].device) + indexed.start
    widths = []

    def recognised(k: int) -> list[Tensor] | None:
        def own(index: Tensor, m: int) -> Tensor:
            widths.append(m)
            return vector(index, m, k)

        return recognised_vectors(objective, outputs, indexed.batch, indices, own)

    first = recognised(0)
    if first is not None:

        def closed_form(k: int) -> list[Tensor]:
            found = first if k == 0 else recognised(k)
            assert found is not None
            return [v * scale for v in found]

        # An example that has fewer elements than another has no vector for the rest: 0.
        return PseudoGradients(count(max(widths)), closed_form)
    root = _curvature_root(objective, outputs, indexed) * scale

    def by_matrix(k: int) -> list[Tensor]:
        ε = vector(indices, root.shape[1], k).to(root.dtype)
        return _split((root @ ε.unsqueeze(-1)).squeeze(-1), outputs)

    return PseudoGradients(count(root.shape[1]), by_matrix)


def _label_gradients(objective: Objective, outputs: Any, indexed: IndexedBatch) -> list[Tensor]:
    leaves = [leaf.requires_grad_() for leaf in float_leaves(outputs)]
    with torch.enable_grad():
        # Copies, which a loss may change in place.
        own = pytree.tree_map_only(Tensor, torch.clone, outputs)
        total = objective.losses(own, indexed.batch).sum()
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def _curvature_root(objective: Objective, outputs: Any, indexed: IndexedBatch) -> Tensor:
    """The symmetric root of `clip(∇²_f ℓ_i)`, `[n, d, d]`: unique, so the same in every pass."""
    eigenvalues, vectors, _ = output_eigenpairs(objective, outputs, indexed.batch)
    return (vectors * eigenvalues.sqrt()[:, None, :]) @ vectors.mT


def _split(flat: Tensor, outputs: Any) -> list[Tensor]:
    """`[n, d]` as one tensor per floating-point output."""
    leaves = float_leaves(outputs)
    pieces = flat.split([leaf[0].numel() for leaf in leaves], dim=1)
    return [piece.reshape(leaf.shape).to(leaf.dtype) for piece, leaf in zip(pieces, leaves, strict=True)]
