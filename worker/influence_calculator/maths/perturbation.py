"""Perturbation: what moving a training input does to the loss of a test example.

`∇x (z_t · g(x))`, the gradient by the training input x of its influence. Moving x along it lowers the
test loss; neither negated nor divided by N. No per-example gradients are formed: with `g` the gradient
of the batch's summed loss, it is the pull-back of `x → g(x)` in direction `z_t`, for every example of
the batch at once, because an example's loss depends on its own input only.

Over checkpoints it is the sum, as the influence is.

Shapes: t test rows, n training examples, B blocks, F... feature dimensions of the training input.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from influence_calculator.maths.directional import activation_elements, directions_at_once, pull_back
from influence_calculator.maths.errors import UnsupportedInputError
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.layout import Layout, Left, tensors_of
from influence_calculator.maths.objective import Batch, IndexedBatch, Objective, batch_size, micro_batches
from influence_calculator.maths.tracin import summed_states


class Laid(Protocol):
    """What knows where parameters lie: a fitted method, for one."""

    @property
    def layout(self) -> Layout:
        """Blocks and slots."""


def perturbations(fitted: Laid, objective: Objective, factors: Left, batch: Batch, micro_batch: int) -> Any:
    """`∇x (z_t · g(x))`, `[t, n, F...]`, by the perturbed input of `batch`.

    Of several inputs (`batch` is a tuple whose first entry holds them), one each in their structure, None for
    those that are no floating-point tensors. `objective` is the training side's; `factors` are by parameter
    (`Fitted.factors`), in any block structure; t and n may differ in any way.

    Raises:
        UnsupportedInputError: no floating-point input to move; names what the batch holds.
    """
    results = _empty(objective, factors, batch)
    _sum(results, objective, fitted.layout, factors, batch, micro_batch)
    return _in_their_structure(batch, results)


def perturbations_by_block(
    fitted: Laid, objective: Objective, factors: Left, batch: Batch, micro_batch: int
) -> Any:
    """Each block's part of `perturbations`, `∇x (z_b · g_b(x))`, `[B, t, n, F...]`, in the layout's order.

    They sum to it. Each block differentiates the batch again, by its own parameters alone.

    Raises:
        UnsupportedInputError: as `perturbations`.
    """
    blocks = fitted.layout.blocks
    results = _empty(objective, factors, batch, len(blocks))
    for number, block in enumerate(blocks):
        parts = [result[number] for result in results]
        _sum(parts, objective, fitted.layout.among((block,)), factors, batch, micro_batch)
    return _in_their_structure(batch, results)


def _empty(objective: Objective, factors: Left, batch: Batch, *parts: int) -> list[Tensor]:
    """One for each input that moves."""
    leaves, shape = pytree.tree_leaves(batch), (*parts, len(next(iter(factors.values()))), batch_size(batch))
    moving = [leaves[place] for place in _moving_places(batch)]
    return [
        torch.empty(*shape, *x.shape[1:], dtype=accumulation_dtype(x.dtype), device=objective.device)
        for x in moving
    ]


def _in_their_structure(batch: Batch, results: list[Tensor]) -> Any:
    """The one result, or those of several inputs as these are."""
    if len(results) == 1:
        return results[0]
    leaves, structure = pytree.tree_flatten(batch[0])
    found = dict(zip(_moving_places(batch), results, strict=True))
    return pytree.tree_unflatten([found.get(place) for place in range(len(leaves))], structure)


def _sum(
    results: list[Tensor], objective: Objective, layout: Layout, factors: Left, batch: Batch, micro_batch: int
) -> None:
    """Fills `[t, n, F...]` with the sum over the blocks of `layout`, of all states that have one of them."""
    states = [(state, laid.among(layout.blocks)) for state, laid in summed_states(objective, layout)]
    for piece in micro_batches(IndexedBatch(0, batch), micro_batch):
        own = [result[:, piece.start : piece.start + batch_size(piece.batch)] for result in results]
        for number, (state, laid) in enumerate(pair for pair in states if pair[1].blocks):
            _fill(own, state, laid, factors, piece.batch, add=number > 0)


def perturbed_input(batch: Batch) -> Tensor:
    """The input that perturbation moves: the first entry of a tuple, the only floating one of a dict.

    Raises:
        UnsupportedInputError: none, or several.
    """
    places = _moving_places(batch)
    if len(places) > 1:
        raise _unsupported(batch, "one floating-point input to move", "give the model one of them")
    leaf: Tensor = pytree.tree_leaves(batch)[places[0]]
    return leaf


def _fill(
    results: list[Tensor], objective: Objective, layout: Layout, left: Left, batch: Batch, add: bool
) -> None:
    own = objective.parameters()
    parameters = {slot.name: own[slot.name] for slot in layout.slots}
    leaves, structure = pytree.tree_flatten(batch)
    places = _moving_places(batch)

    def gradient_at(inputs: list[Tensor]) -> dict[str, Tensor]:
        moved = dict(zip(places, inputs, strict=True))
        there = [moved.get(place, leaf) for place, leaf in enumerate(leaves)]
        changed = pytree.tree_unflatten(there, structure)
        found: dict[str, Tensor] = grad(lambda values: objective.losses_at(values, changed).sum())(parameters)
        return found

    _, pull = pull_back(gradient_at, [leaves[place].detach() for place in places])
    elements = activation_elements(objective, batch)
    at_once = directions_at_once(objective, batch_size(batch), elements, layout.width)
    for start in range(0, results[0].shape[0], at_once):
        rows = slice(start, start + at_once)
        pulled = vmap(pull)(_directions(layout, left, rows, objective.dtype))
        for result, found in zip(results, pulled, strict=True):
            result[rows] = result[rows] + found if add else found


def _directions(layout: Layout, left: Left, rows: slice, dtype: torch.dtype) -> dict[str, Tensor]:
    directions: dict[str, Tensor] = {}
    for block in layout.blocks:
        directions |= tensors_of(left[block][rows], layout.slots_of(block), dtype)
    return {slot.name: directions[slot.name] for slot in layout.slots}


def _moving_places(batch: Batch) -> tuple[int, ...]:
    """Which leaves of the batch are inputs that move: all floating ones among a tuple's inputs; of a batch
    that may hold targets too, the only one.
    """
    floating = tuple(i for i, leaf in enumerate(pytree.tree_leaves(_inputs(batch))) if _moves(leaf))
    if not floating:
        raise _unsupported(batch, "a floating-point input to move", "give embeddings in place of token ids")
    if len(floating) > 1 and not isinstance(batch, tuple | list):
        cure = "give batches (inputs, targets), which tell them apart"
        raise _unsupported(batch, "one floating-point input to move", cure)
    return floating


def _unsupported(batch: Batch, expected: str, cure: str) -> UnsupportedInputError:
    entries = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(_inputs(batch))[0]]
    held = ", ".join(f"{name or 'the batch'}: {_dtype(leaf)}" for name, leaf in entries)
    count = sum(_moves(leaf) for _, leaf in entries)
    return UnsupportedInputError(
        f"mode perturbation: expected {expected}, got {count} among {held}; {cure}, or use mode up"
    )


def _inputs(batch: Batch) -> Batch:
    """The part of the batch that holds inputs: the first entry of a tuple or list, or all of it.

    Its leaves come first in the whole batch's order, so that places agree.
    """
    return (batch[0],) if isinstance(batch, tuple | list) else batch


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype).removeprefix("torch.") if isinstance(leaf, Tensor) else type(leaf).__name__
