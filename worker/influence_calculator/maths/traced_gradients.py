"""Gradients of one example each by what hooks do not capture: parameters, and the outputs of embeddings.

`torch.func` differentiates one example's loss, vmapped over the batch, so that it does not matter how an
example reaches a layer: models look up positions once for all examples, which hooks could not tell apart.

Shapes: n examples, S positions that an embedding looks up per example (over all calls), V rows of its
weight, o columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from influence_calculator.maths.layers import EmbeddingSpec
from influence_calculator.maths.layout import rows_of
from influence_calculator.maths.objective import Batch, Objective, batch_size, slice_batch, unsqueezed

Calls = dict[str, list[Tensor]]
"""Embedding -> a tensor for each of its calls."""
Change = Callable[[EmbeddingSpec, Tensor, Tensor], Tensor]
"""(layer, inputs, output of a call) -> what takes the place of the output."""


class Lookups(NamedTuple):
    """What one embedding saw of a batch."""

    ids: Tensor
    """`[n, S]`."""
    gradients: Tensor
    """g, by what was looked up, `[n, S, o]`; 0 where there is no token."""
    valid: Tensor
    """`[n, S]`: whether a position holds a token; `padding_idx` is none, nor is what an example lacks that
    looks up fewer positions than others."""


class TracedGradients(NamedTuple):
    """Gradients of one batch."""

    rows: dict[str, Tensor]
    """Parameter -> `[n, numel]`."""
    lookups: dict[str, Lookups]
    """By embedding."""


def traced_gradients(
    objective: Objective, batch: Batch, names: Sequence[str], embeddings: Sequence[EmbeddingSpec] = ()
) -> TracedGradients:
    """By some parameters and by what some embeddings look up, in one pass; all of them live at once."""
    if not names and not embeddings:
        return TracedGradients({}, {})
    own = objective.parameters()
    parameters = {name: own[name] for name in names}
    traced = _Traced(objective, tuple(embeddings))
    try:
        shifts = traced.shifts(slice_batch(batch, 0, 1))
        # Attention by its formula: other kernels are not vmapped but looped over.
        with sdpa_kernel(SDPBackend.MATH):
            differentiated = vmap(grad(traced.loss, argnums=(0, 1), has_aux=True), in_dims=(None, None, 0))
            (rows, shifted), ids = differentiated(parameters, shifts, batch)
        lookups = traced.lookups(batch_size(batch), ids, shifted)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        # Control flow that depends on data (`.item()`, `if`) cannot be vmapped: one example at a time.
        rows, lookups = _one_by_one(traced, parameters, batch)
    return TracedGradients({name: rows_of(rows.pop(name)) for name in names}, lookups)


def positions(objective: Objective, example: Batch, embeddings: Sequence[EmbeddingSpec]) -> dict[str, int]:
    """S of each embedding, for a batch of one example."""
    if not embeddings:
        return {}
    calls = _Traced(objective, tuple(embeddings)).shifts(example)
    return {spec.name: sum(call.numel() for call in calls[spec.name]) // spec.columns for spec in embeddings}


def used_by_hand(objective: Objective, batch: Batch, embeddings: Sequence[EmbeddingSpec]) -> tuple[str, ...]:
    """Weights that the first example's loss depends on beside what is looked up, as a head's may be."""
    if not embeddings:
        return ()
    example, own = slice_batch(batch, 0, 1), objective.parameters()
    weights = {spec.weight: own[spec.weight].requires_grad_() for spec in embeddings}
    with _hooks(objective, embeddings, lambda _, __, output: output.detach()), torch.enable_grad():
        loss = objective.losses_at(weights, example).sum()
    if not loss.requires_grad:
        return ()
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(weights, found, strict=True) if gradient is not None)


@dataclass(frozen=True)
class _Traced:
    """The loss of one example as a function of parameters and of what is added to what embeddings look up."""

    objective: Objective
    embeddings: tuple[EmbeddingSpec, ...]

    def shifts(self, one: Batch) -> Calls:
        """Zeros of the shape of every call's output, for a batch of one example."""
        found: Calls = {spec.name: [] for spec in self.embeddings}
        if not found:
            return found

        def seen(spec: EmbeddingSpec, _: Tensor, output: Tensor) -> Tensor:
            found[spec.name].append(torch.zeros_like(output))
            return output

        with _hooks(self.objective, self.embeddings, seen), torch.enable_grad():
            self.objective.outputs(one)
        return found

    def loss(self, parameters: Mapping[str, Tensor], shifts: Calls, example: Batch) -> tuple[Tensor, Calls]:
        """The loss, and the ids of every call."""
        ids: Calls = {spec.name: [] for spec in self.embeddings}

        def shifted(spec: EmbeddingSpec, inputs: Tensor, output: Tensor) -> Tensor:
            added = output + shifts[spec.name][len(ids[spec.name])]
            ids[spec.name].append(inputs)
            return added

        with _hooks(self.objective, self.embeddings, shifted):
            return self.objective.example_loss(parameters, example), ids

    def lookups(self, n: int, ids: Calls, gradients: Calls) -> dict[str, Lookups]:
        """Of n examples, from the ids of every call and the gradients by its shift."""
        own = self.objective.parameters()
        return {
            spec.name: _joined(spec, own[spec.weight], n, ids[spec.name], gradients[spec.name])
            for spec in self.embeddings
        }


@contextmanager
def _hooks(objective: Objective, embeddings: Sequence[EmbeddingSpec], change: Change) -> Iterator[None]:
    """Of every call that the loss is differentiated through."""
    handles = []
    try:
        for spec in embeddings:
            module = objective.model.get_submodule(spec.name)
            hook = _hook(spec, change)
            # First, so that hooks of the user's see and change the output after it.
            handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(spec: EmbeddingSpec, change: Change) -> Any:
    def changed(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            # The model detaches this call from its loss.
            return output
        return change(spec, args[0] if args else kwargs["input"], output)

    return changed


def _one_by_one(
    traced: _Traced, parameters: Mapping[str, Tensor], batch: Batch
) -> tuple[dict[str, Tensor], dict[str, Lookups]]:
    rows, lookups = [], []
    for i in range(batch_size(batch)):
        example = pytree.tree_map(lambda leaf, i=i: leaf[i], batch)
        given = (dict(parameters), traced.shifts(unsqueezed(example)))
        leaves, structure = pytree.tree_flatten(given)
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        values, shifts = pytree.tree_unflatten(leaves, structure)
        with torch.enable_grad():
            loss, ids = traced.loss(values, shifts, example)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        own_rows, shifted = pytree.tree_unflatten(list(gradients), structure)
        rows.append(own_rows)
        lookups.append(traced.lookups(1, ids, shifted))
    return (
        {name: torch.stack([own[name] for own in rows]) for name in parameters},
        {spec.name: _filled([own[spec.name] for own in lookups]) for spec in traced.embeddings},
    )


def _filled(lookups: Sequence[Lookups]) -> Lookups:
    """Of one example each as a batch: a model may cut each to its length, or call a layer for some alone."""
    return Lookups(*(pad_sequence([v[0] for v in values], batch_first=True) for values in zip(*lookups)))


def _joined(
    spec: EmbeddingSpec, weight: Tensor, n: int, ids: list[Tensor], gradients: list[Tensor]
) -> Lookups:
    """The calls of one layer as further positions; none if it was not called for these examples."""
    tokens = [
        weight.new_zeros(n, 0, dtype=torch.int64),
        *(call.reshape(n, -1).to(torch.int64) for call in ids),
    ]
    g = [weight.new_zeros(n, 0, spec.columns), *(call.reshape(n, -1, spec.columns) for call in gradients)]
    joined, values = torch.cat(tokens, dim=1), torch.cat(g, dim=1)
    if spec.padding is None:
        return Lookups(joined, values, torch.ones_like(joined, dtype=torch.bool))
    valid = joined != spec.padding
    return Lookups(joined, values.masked_fill(~valid.unsqueeze(2), 0.0), valid)
