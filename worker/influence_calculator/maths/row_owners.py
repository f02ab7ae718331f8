"""Whose rows a layer's outputs are, where a model may move them by what they hold.

What hooks capture is an example's own if it stands at the example's place in the batch. A model that removes
padding, sorts sentences by length or routes tokens puts it elsewhere in some batches and not in others, which
no shape shows. To answer example by example it puts everything back, and only operations that move rows do
that: the graph from a model's layers to its outputs tells at next to no cost whether there are any. If there
are, a second backward pass tells whose the rows are: with `ε_i ℓ_i` in place of the losses, the gradient of a
row that is example i's is `ε_i` times what it was.

Shapes: n examples, R rows of a layer's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

WEIGHTS = (1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 0.0)
"""ε of seven neighbours, over and over: products with them are exact, and as many as are prime tell all moves
apart but those by a multiple of seven places."""
ALLOWED = 0.1
"""Difference of two gradients of a row beside its own: of another example's it is a quarter at least."""
ROUNDING = 0.01
"""The same beside the largest of the layer, of half precision on a GPU that adds in any order."""

MOVING = (
    "Cat",
    "CopySlices",
    "Embedding",
    "Gather",
    "Index",
    "MaskedScatter",
    "MaskedSelect",
    "PackPaddedSequence",
    "Put",
    "Scatter",
    "SelectScatter",
    "SliceScatter",
    "Sort",
    "Stack",
    "Take",
    "Topk",
    "UnsafeIndex",
)
"""How autograd's names of operations begin that move rows by an index or a mask, or put parts together."""


def may_move_rows(outputs: Sequence[Tensor], n: int) -> bool:
    """Whether an operation between a model's layers and its outputs may move rows of n examples."""
    todo = [leaf.grad_fn for leaf in outputs]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _can_move(type(node)) and _moves_rows(node, n):
            return True
        todo.extend(before for before, _ in node.next_functions)
    return False


@lru_cache(maxsize=1024)
def _can_move(kind: type) -> bool:
    return kind.__name__.startswith(MOVING)


def _moves_rows(node: Any, n: int) -> bool:
    """Whether it does so along the first dimension, as far as it tells."""
    if type(node).__name__ == "IndexBackward0":
        return not _keeps_examples(node._saved_indices, n)
    dim = getattr(node, "_saved_dim", None)
    if dim is None:
        return True
    # Of a negative number autograd shows the unsigned one with the same bits.
    return int(dim - (1 << 64) if dim >> 63 else dim) % max(1, len(node._input_metadata[0].shape)) == 0


def _keeps_examples(indices: Sequence[Tensor | None], n: int) -> bool:
    """Whether `x[indices]` leaves the first dimension alone, or picks something of each example in order."""
    first, *others = indices
    if first is None:
        return True
    if first.dtype == torch.bool or first.shape[:1] != (n,):
        return False
    if any(other is not None and other.dim() > first.dim() for other in others):
        return False
    places = torch.arange(n, device=first.device).view(-1, *[1] * (first.dim() - 1))
    return bool((first == places).all())


def weights(n: int, like: Tensor) -> Tensor:
    """ε, `[n]`."""
    return like.new_tensor(WEIGHTS).repeat(-(-n // len(WEIGHTS)))[:n]


def are_others(g: Tensor, weighted: Tensor, ε: Tensor) -> bool:
    """Whether a row's gradient, of `[R, …]`, is not its example's, from those of `ℓ_i` and of `ε_i ℓ_i`."""
    own = g * ε.to(g.dtype).repeat_interleave(len(g) // len(ε)).view(-1, *[1] * (g.dim() - 1))
    off, size = (values.flatten(1).abs().amax(1) for values in (weighted - own, g))
    return bool((off > ALLOWED * size + ROUNDING * size.max()).any())
