"""Layers that a model uses otherwise than by calling them on its examples.

It may multiply by a layer's weight itself, as Mamba does, or call the layer on what all examples share, as
DeBERTa does with its positions, on tokens that a router chose, or with time first. What hooks see is then not
the gradient of the layer's parameters, or not that of each example: they are differentiated as those of any
other module are.

Shapes: n examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_calculator.maths.capture import float_leaves, record
from influence_calculator.maths.layers import LayerSpec, supported_layers
from influence_calculator.maths.objective import Batch, Objective, batch_size, slice_batch
from influence_calculator.maths.one_by_one import Sketched, gradients_one_by_one, mismatched, tolerance


def at_work(objective: Objective, few: Batch) -> Objective:
    """The objective with what these examples show of its layers, in the state of each checkpoint too:
    `by_hand` and `untried`.
    """
    states = objective.checkpoints.models if objective.checkpoints else ()
    return in_all_states(
        seen_at_work(objective, few, gradients_one_by_one(objective, few)),
        [
            seen_at_work(state, few, gradients_one_by_one(state, few))
            for state in map(objective.in_state_of, states)
        ],
    )


def in_all_states(objective: Objective, others: Sequence[Objective]) -> Objective:
    """The objective with what was seen of the same model in other states."""
    by_hand = {name for seen in (objective, *others) for name in seen.by_hand}
    return replace(
        objective,
        by_hand=tuple(name for name in objective.names if name in by_hand),
        untried=tuple(name for name in objective.untried if all(name in seen.untried for seen in others)),
    )


def seen_at_work(objective: Objective, few: Batch, expected: Sketched) -> Objective:
    """The same in the objective's own state alone; `expected` are the examples' gradients one by one."""
    plain = replace(objective, by_hand=(), untried=())
    layers = supported_layers(plain)
    if not layers:
        return plain
    # One alone is the whole batch; of two of it as much can be told.
    several = few if batch_size(few) > 1 else pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]), few)
    together = _Met.of(plain, several, layers)
    untried = tuple(
        name for name, counts in together.rows.items() if not counts and name not in together.transformed
    )
    others = _called_on_other_things(plain, several, layers, together.rows) | together.transformed
    if together.of_others - others and _answers_alone(plain, few):
        others |= together.of_others
    seen = _without(plain, layers, others)
    wrong = mismatched(seen, few, expected)
    if wrong and _answers_alone(plain, few):
        others = {layer.name for layer in supported_layers(seen) if set(layer.parameters) & set(wrong)}
        seen = _without(seen, layers, others)
    return replace(seen, untried=untried)


def _without(objective: Objective, layers: Sequence[LayerSpec], names: Iterable[str]) -> Objective:
    """The objective with the parameters of these layers used by hand too."""
    found = {name for layer in layers if layer.name in set(names) for name in layer.parameters}
    by_hand = tuple(name for name in objective.names if name in found or name in objective.by_hand)
    return replace(objective, by_hand=by_hand)


def _called_on_other_things(
    objective: Objective, few: Batch, layers: Sequence[LayerSpec], together: Mapping[str, list[int]]
) -> set[str]:
    """Names of layers whose inputs do not count examples first: n times as many as those of one alone."""
    n = batch_size(few)
    if all(counts == [n] * len(counts) for counts in together.values()):
        return set()
    alone = [_Met.of(objective, slice_batch(few, i, i + 1), layers).rows for i in range(n)]
    return {
        name
        for name, counts in together.items()
        if counts != [n] * len(counts) and any([n * rows for rows in one[name]] != counts for one in alone)
    }


class _Met(NamedTuple):
    """What a forward pass of some examples shows of layers."""

    rows: dict[str, list[int]]
    """By layer, of the inputs of every call that the losses or other outputs depend on."""
    of_others: set[str]
    """Layers with rows of other examples than those at whose places they stand."""
    transformed: set[str]
    """Layers that are called inside of `torch.vmap` or another transform."""

    @classmethod
    def of(cls, objective: Objective, batch: Batch, layers: Sequence[LayerSpec]) -> _Met:
        recording = record(objective, batch, layers)
        with torch.enable_grad():
            losses: Tensor = objective.losses(recording.outputs, batch)
        rows = recording.rows_called_with([losses, *float_leaves(recording.outputs)])
        return cls(rows, set(recording.with_rows_of_others(losses)), recording.transformed)


def _answers_alone(objective: Objective, few: Batch) -> bool:
    """Whether the outputs of each example are what they are without the others."""
    with torch.no_grad():
        together = float_leaves(objective.outputs(few))
        for i in range(batch_size(few)):
            alone = float_leaves(objective.outputs(slice_batch(few, i, i + 1)))
            for whole, own in zip(together, alone, strict=True):
                allowed, here = tolerance(whole.dtype), whole[i : i + 1]
                if here.shape != own.shape:
                    return False
                if not torch.allclose(here, own, rtol=allowed, atol=allowed, equal_nan=True):
                    return False
    return True
