"""Pseudo-gradients v of the loss by the model's outputs f, with `Σ v vᵀ` or `E[v vᵀ]` equal to `∇²_f ℓ`.

Backpropagated in place of the loss's gradient they make sums of gradient products estimate the
generalized Gauss-Newton matrix, the true Fisher for cross-entropy and squared error.

Shapes: n examples, d floating-point output elements of one example, k a draw or an output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from influence_calculator.maths.capture import float_leaves
from influence_calculator.maths.draws import signs
from influence_calculator.maths.objective import (
    IndexedBatch,
    Objective,
    batch_size,
    only_tensors,
    unsqueezed,
)
from influence_calculator.maths.output_curvature import output_eigenpairs
from influence_calculator.maths.recognised_losses import pseudo_loss


class Expectation(StrEnum):
    """Over which outputs the curvature is taken."""

    SAMPLED = "sampled"
    """Random signs times a root of `∇²_f ℓ`: the same in every pass, whatever the batching."""
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

    def pseudo_gradients(self, objective: Objective, outputs: Any, indexed: IndexedBatch) -> PseudoGradients:
        """Those of a batch whose outputs are given."""
        outputs = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach(), outputs)
        match self.kind:
            case Expectation.EMPIRICAL:
                return PseudoGradients(1, lambda _: _label_gradients(objective, outputs, indexed))
            case Expectation.EXACT:
                root = _curvature_root(objective, outputs, indexed)
                return PseudoGradients(root.shape[1], lambda k: _split(root[:, :, k], outputs))
            case Expectation.SAMPLED:
                return self._sampled(objective, outputs, indexed)

    def _sampled(self, objective: Objective, outputs: Any, indexed: IndexedBatch) -> PseudoGradients:
        leaves = float_leaves(outputs)
        indices = torch.arange(batch_size(indexed.batch), device=leaves[0].device) + indexed.start
        first = self._closed_form(objective, outputs, indexed, indices, 0)
        if first is not None:

            def closed_form(k: int) -> list[Tensor]:
                found = first if k == 0 else self._closed_form(objective, outputs, indexed, indices, k)
                assert found is not None
                return found

            return PseudoGradients(self.samples, closed_form)
        root = _curvature_root(objective, outputs, indexed) / self.samples**0.5

        def drawn(k: int) -> list[Tensor]:
            ε = signs(self.seed, indices, root.shape[1], k).to(root.dtype)
            return _split((root @ ε.unsqueeze(-1)).squeeze(-1), outputs)

        return PseudoGradients(self.samples, drawn)

    def _closed_form(
        self, objective: Objective, outputs: Any, indexed: IndexedBatch, indices: Tensor, k: int
    ) -> list[Tensor] | None:
        leaves, rebuilt = only_tensors(outputs)
        leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]

        def one(own: list[Tensor], example: Any, index: Tensor) -> Tensor:
            own = [leaf.unsqueeze(0) for leaf in own]
            found = pseudo_loss(
                lambda: objective.loss(rebuilt(own), unsqueezed(example)),
                [leaf for leaf in own if leaf.is_floating_point()],
                lambda count: signs(self.seed, index, count, k),
            )
            if found is None:
                raise _NoClosedFormError
            return found

        floats = [leaf for leaf in leaves if leaf.is_floating_point()]
        try:
            with torch.enable_grad():
                total = vmap(one)(leaves, indexed.batch, indices).sum()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):
            return None
        gradients = torch.autograd.grad(total, floats, allow_unused=True, materialize_grads=True)
        return [gradient / self.samples**0.5 for gradient in gradients]


class _NoClosedFormError(ValueError):
    """The loss is none of those with a closed form."""


def _label_gradients(objective: Objective, outputs: Any, indexed: IndexedBatch) -> list[Tensor]:
    leaves = [leaf.requires_grad_() for leaf in float_leaves(outputs)]
    with torch.enable_grad():
        total = objective.losses(outputs, indexed.batch).sum()
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
