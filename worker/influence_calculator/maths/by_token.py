"""Influences as a sum over the tokens of each training example.

What a layer adds to an example's gradient is a sum over the tokens that it was called with, `Σ_s g_s ã_sᵀ`,
and the influence `z · g` is linear in it. The part of token s is what the layers did at s:

    Σ_layers ⟨Z, g_s ã_sᵀ⟩ = Σ_layers g_sᵀ Z ã_s,

with Z the layer's influence factors as a matrix and `ã = [a, 1]` if it has a bias (Grosse et al. 2023,
"Studying Large Language Model Generalization with Influence Functions", on attribution to layers and
tokens; Kronfluence's per-token scores). It is not the influence of the token's own loss: g_s is the gradient
by the layer's output at s of the example's WHOLE loss, of which later tokens are a part that saw s through
attention. The parts sum to the influence, and a token that the loss does not depend on, padding, has part 0.

Exact for every layer that hooks capture and that is called with one sequence: Linear and the Conv1D of
transformers with inputs `[n, S, i]`, Conv1d with S output positions. Everything else is refused by name.

Shapes: t test rows, n training examples, S tokens, k groups, C calls of a layer, i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_calculator.maths.capture import CapturedLayer, Recording, of_the_losses, record
from influence_calculator.maths.errors import UnsupportedModelError
from influence_calculator.maths.layers import described, uncaptured_parameters
from influence_calculator.maths.layout import Layout, Left, tensors_of
from influence_calculator.maths.method import score_dtype
from influence_calculator.maths.objective import Batch, IndexedBatch, Objective, batch_size, micro_batches
from influence_calculator.maths.shapes import ModelShapes
from influence_calculator.maths.tracin import summed_states

PRODUCT_ELEMENTS = 1 << 22
"""Products `Z ã` of some test rows, at least one, with all tokens of a batch at once: 16 MiB in float32."""


class Laid(Protocol):
    """What knows where parameters lie: a fitted method, for one."""

    @property
    def layout(self) -> Layout:
        """Blocks and slots."""


def influences_by_token(
    fitted: Laid, objective: Objective, factors: Left, batch: Batch, micro_batch: int
) -> Tensor:
    """The part of each training token in `influences`, `[t, n, S]`; over S they sum to it.

    `objective` is the training side's; `factors` are by parameter (`Fitted.factors`). float32 at least. Costs
    `2 S P` operations for each pair, S times those of `influences`.

    Raises:
        UnsupportedModelError: a tracked parameter of a layer without a token dimension, or layers called with
            different numbers of tokens; names them.
        ValueError: no training example, and the model does not tell S of one of zeros.
    """
    if batch_size(batch) == 0:
        rows = factors[fitted.layout.blocks[0]]
        S = _count_of_zeros(objective, fitted.layout, batch)
        return rows.new_zeros(len(rows), 0, S, dtype=score_dtype(rows))
    result: Tensor | None = None
    for piece in micro_batches(IndexedBatch(0, batch), micro_batch):
        parts = _summed(objective, fitted.layout, factors, piece.batch)
        if result is None:
            result = parts.new_empty(parts.shape[0], batch_size(batch), parts.shape[2])
        result[:, piece.start : piece.start + parts.shape[1]] = parts
    assert result is not None, "a batch has at least one example"
    return result


def token_count(objective: Objective, layout: Layout, batch: Batch) -> int:
    """S of a training batch.

    Raises:
        UnsupportedModelError: as `influences_by_token`.
    """
    state, own = next(summed_states(objective, layout))
    return _count(state, _recorded(_treated(state, own), batch))


def _count_of_zeros(objective: Objective, layout: Layout, batch: Batch) -> int:
    """S of examples of the shapes of a batch that has none."""
    one = pytree.tree_map(lambda leaf: leaf.new_zeros(1, *leaf.shape[1:]), batch)
    try:
        return token_count(objective, layout, one)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise ValueError(
            "x: expected at least one training example to tell the number of tokens from, got none, and the "
            f"model refuses one of zeros with {type(error).__name__}: {error}; leave empty batches out"
        ) from error


def product_bytes(shapes: ModelShapes, micro_batch: int) -> int:
    """What is held besides a captured batch, its factors and the parts: products, and their copies."""
    layers = shapes.layers
    captured = max((layer.tokens * (layer.inputs + layer.outputs) for layer in layers), default=0)
    one_row = micro_batch * max((layer.tokens * layer.outputs for layer in layers), default=0)
    return shapes.itemsize * (2 * max(PRODUCT_ELEMENTS, one_row) + micro_batch * captured)


def _summed(objective: Objective, layout: Layout, factors: Left, batch: Batch) -> Tensor:
    """`[t, n, S]` over all states of the model and all layers."""
    total: Tensor | None = None
    for state, own in summed_states(objective, layout):
        treated = _treated(state, own)
        recording = _recorded(treated, batch)
        S = _count(state, recording)
        if total is None:
            rows = factors[own.blocks[0]]
            total = rows.new_zeros(len(rows), batch_size(batch), S, dtype=score_dtype(rows))
        for layer in of_the_losses(recording, treated, batch):
            # None of one that the losses of these examples do not depend on.
            if layer.gradients.shape[1]:
                _add(total, layer, own, factors)
    assert total is not None, "an objective has the model or a checkpoint"
    return total


def _treated(objective: Objective, layout: Layout) -> Objective:
    """The objective of the parameters that have a slot: others contribute 0."""
    slots = {slot.name for slot in layout.slots}
    return replace(objective, names=tuple(name for name in objective.names if name in slots))


def _recorded(treated: Objective, batch: Batch) -> Recording:
    """A forward pass, if hooks see every layer of it."""
    unseen = dict.fromkeys(name.rpartition(".")[0] for name in uncaptured_parameters(treated))
    if unseen:
        _refuse(f"{module!r} ({described(treated.model, module)})" for module in unseen)
    return record(treated, batch)


def _count(objective: Objective, recording: Recording) -> int:
    """S: the one number of tokens that every call of every layer has."""
    sequences = {layer.name: recording.sequences(layer) for layer in recording.layers}
    without = [name for name, calls in sequences.items() if None in calls]
    if without:
        model = objective.model
        _refuse(f"{name!r} ({described(model, name)}), called without a token dimension" for name in without)
    by_count = {count: name for name, calls in reversed(sequences.items()) for count in reversed(calls)}
    if len(by_count) != 1:
        _refuse(f"{name!r} with {count} tokens" for count, name in reversed(by_count.items()))
    (S,) = by_count
    assert S is not None, "refused above"
    return S


def _refuse(found: Iterable[str]) -> NoReturn:
    raise UnsupportedModelError(
        "model: influences by token need Linear and Conv1d layers that are called with one and the same "
        f"sequence, [n, S, …], got {', '.join(found) or 'none that was called'}; do not track the parameters "
        "of others (requires_grad_(False); in a job InfluenceTask.parameters)"
    )


def _add(total: Tensor, layer: CapturedLayer, layout: Layout, factors: Left) -> None:
    """Adds `Σ_calls g_sᵀ Z ã_s` of one layer to `[t, n, S]`, some test rows at a time."""
    n, k = total.shape[1], layer.spec.groups
    a = layer.activations.to(total.dtype).unflatten(0, (n, k))
    g = layer.gradients.to(total.dtype).unflatten(0, (n, k))
    slots = [slot for slot in layout.slots if slot.name in layer.spec.parameters]
    at_once = max(1, PRODUCT_ELEMENTS // g.numel())
    for start in range(0, len(total), at_once):
        piece = slice(start, start + at_once)
        Z: dict[str, Tensor] = {}
        for slot in slots:
            Z |= tensors_of(factors[slot.block][piece], (slot,), total.dtype)
        products = _products(layer, Z, a)
        parts = torch.einsum("tnkso,nkso->tns", products, g)
        # Tokens of one call after those of another.
        total[piece] += parts.unflatten(2, (-1, total.shape[2])).sum(2)


def _products(layer: CapturedLayer, Z: Mapping[str, Tensor], a: Tensor) -> Tensor:
    """`Z ã` of every token, `[t, n, k, C·S, o/k]`, of activations `[n, k, C·S, i]`."""
    k = a.shape[1]
    products: Tensor | float = 0.0
    if layer.spec.weight is not None:
        weight = Z[layer.spec.weight].mT if layer.spec.transposed else Z[layer.spec.weight].flatten(2)
        products = torch.einsum("tkoi,nksi->tnkso", weight.unflatten(1, (k, -1)), a)
    if layer.spec.bias is not None:
        bias = Z[layer.spec.bias].unflatten(1, (k, -1))
        products = products + bias[:, None, :, None, :].expand(-1, len(a), -1, a.shape[2], -1)
    assert isinstance(products, Tensor), "a layer has a tracked parameter"
    return products
