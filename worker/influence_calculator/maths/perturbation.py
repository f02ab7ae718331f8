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

from influence_calculator.maths.directional import directions_at_once, pull_back
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


def perturbations(
    fitted: Laid, objective: Objective, factors: Left, batch: Batch, micro_batch: int
) -> Tensor:
    """`∇x (z_t · g(x))`, `[t, n, F...]`, by the perturbed input of `batch`.

    `objective` is the training side's; `factors` are by parameter (`Fitted.factors`), in any block
    structure; t and n may differ in any way.

    Raises:
        UnsupportedInputError: no floating-point input to move; names what the batch holds.
    """
    result = _empty(objective, factors, batch)
    _sum(result, objective, fitted.layout, factors, batch, micro_batch)
    return result


def perturbations_by_block(
    fitted: Laid, objective: Objective, factors: Left, batch: Batch, micro_batch: int
) -> Tensor:
    """Each block's part of `perturbations`, `∇x (z_b · g_b(x))`, `[B, t, n, F...]`, in the layout's order.

    They sum to it. Each block differentiates the batch again, by its own parameters alone.

    Raises:
        UnsupportedInputError: as `perturbations`.
    """
    blocks = fitted.layout.blocks
    result = _empty(objective, factors, batch, len(blocks))
    for part, block in zip(result, blocks, strict=True):
        _sum(part, objective, fitted.layout.among((block,)), factors, batch, micro_batch)
    return result


def _empty(objective: Objective, factors: Left, batch: Batch, *parts: int) -> Tensor:
    x = perturbed_input(batch)
    shape = (*parts, len(next(iter(factors.values()))), batch_size(batch), *x.shape[1:])
    return torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=objective.device)


def _sum(
    result: Tensor, objective: Objective, layout: Layout, factors: Left, batch: Batch, micro_batch: int
) -> None:
    """Fills `[t, n, F...]` with the sum over the blocks of `layout`, of all states that have one of them."""
    states = [(state, laid.among(layout.blocks)) for state, laid in summed_states(objective, layout)]
    for piece in micro_batches(IndexedBatch(0, batch), micro_batch):
        own = result[:, piece.start : piece.start + batch_size(piece.batch)]
        for number, (state, laid) in enumerate(pair for pair in states if pair[1].blocks):
            _fill(own, state, laid, factors, piece.batch, add=number > 0)


def perturbed_input(batch: Batch) -> Tensor:
    """The input that perturbation moves: the first entry of a tuple, the only floating one of a dict."""
    leaf: Tensor = pytree.tree_leaves(batch)[_input_place(batch)]
    return leaf


def _fill(result: Tensor, objective: Objective, layout: Layout, left: Left, batch: Batch, add: bool) -> None:
    own = objective.parameters()
    parameters = {slot.name: own[slot.name] for slot in layout.slots}
    leaves, structure = pytree.tree_flatten(batch)
    place = _input_place(batch)

    def gradient_at(x: Tensor) -> dict[str, Tensor]:
        moved = pytree.tree_unflatten([*leaves[:place], x, *leaves[place + 1 :]], structure)
        found: dict[str, Tensor] = grad(lambda values: objective.losses_at(values, moved).sum())(parameters)
        return found

    _, pull = pull_back(gradient_at, leaves[place].detach())
    at_once = directions_at_once(objective, batch, layout.width)
    for start in range(0, result.shape[0], at_once):
        rows = slice(start, start + at_once)
        found = vmap(pull)(_directions(layout, left, rows, objective.dtype))
        result[rows] = result[rows] + found if add else found


def _directions(layout: Layout, left: Left, rows: slice, dtype: torch.dtype) -> dict[str, Tensor]:
    directions: dict[str, Tensor] = {}
    for block in layout.blocks:
        directions |= tensors_of(left[block][rows], layout.slots_of(block), dtype)
    return {slot.name: directions[slot.name] for slot in layout.slots}


def _input_place(batch: Batch) -> int:
    """Which leaf of the batch is the input."""
    entries = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(_inputs(batch))[0]]
    floating = [i for i, (_, leaf) in enumerate(entries) if _moves(leaf)]
    if len(floating) != 1:
        held = ", ".join(f"{name or 'the batch'}: {_dtype(leaf)}" for name, leaf in entries)
        raise UnsupportedInputError(
            f"mode perturbation: expected one floating-point input to move, got {len(floating)} among "
            f"{held}; give embeddings in place of token ids, or use mode up"
        )
    return floating[0]


def _inputs(batch: Batch) -> Batch:
    """The part of the batch that holds inputs: the first entry of a tuple or list, or all of it.

    Its leaves come first in the whole batch's order, so that places agree.
    """
    return (batch[0],) if isinstance(batch, tuple | list) else batch


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype).removeprefix("torch.") if isinstance(leaf, Tensor) else type(leaf).__name__
