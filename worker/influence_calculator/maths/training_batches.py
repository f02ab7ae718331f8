"""The training set in batches of a good length, kept in memory for solvers that go over it again and again.

Shapes: n examples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_calculator.maths.directional import GRAPH_COPIES, activation_elements, workspace_bytes
from influence_calculator.maths.objective import Batch, IndexedBatch, Objective, TrainingData, batch_size

KEPT_BYTES = 192 << 20
"""How much of the training set, and of the graphs over it, an iterative solver may keep on the device.

A larger set is read again at every iteration. A constant, so that the plan can count it."""


class TrainingBatches:
    """The batches of a training set, read once if all of them fit into `KEPT_BYTES`.

    Kept batches are joined, where shapes allow, to what the workspace differentiates in eight
    directions at once: a short batch pays as much for its bookkeeping as a long one.
    """

    def __init__(self, objective: Objective, data: TrainingData) -> None:
        self._objective = objective
        self._data = data
        self._kept: list[IndexedBatch] | None = None
        self._too_large = False

    @property
    def length(self) -> int:
        """Number of examples."""
        self._try_to_keep()
        return self._data.length

    @property
    def are_kept(self) -> bool:
        """Whether a pass reads nothing."""
        self._try_to_keep()
        return self._kept is not None

    def batches(self) -> Iterator[IndexedBatch]:
        """One pass over all examples, in order."""
        self._try_to_keep()
        if self._kept is not None:
            yield from self._kept
        else:
            yield from JoinedBatches(self._objective, self._data).batches()

    @property
    def kept_bytes(self) -> int:
        """What the kept batches take."""
        self._try_to_keep()
        return sum(tree_bytes(batch) for _, batch in self._kept or ())

    def _try_to_keep(self) -> None:
        """Reads the data at the first question, to keep it if it fits."""
        if self._kept is not None or self._too_large:
            return
        kept, total = [], 0
        for indexed in self._data.batches():
            total += tree_bytes(indexed.batch)
            if total > KEPT_BYTES:
                self._too_large = True
                return
            kept.append(indexed)
        self._kept = list(joined(kept, self._examples_at_once(kept)))

    def _examples_at_once(self, kept: list[IndexedBatch]) -> int:
        if not kept:
            return 1
        itemsize = self._objective.dtype.itemsize
        one = itemsize * GRAPH_COPIES * max(1, activation_elements(self._objective, kept[0].batch))
        return int(workspace_bytes(self._objective) // (8 * one))


class KeptBatches:
    """The batches of a training set, kept at the first pass if all of them fit into `KEPT_BYTES`."""

    def __init__(self, data: TrainingData) -> None:
        self._data = data
        self._kept: list[IndexedBatch] | None = None

    @property
    def length(self) -> int:
        """Number of examples."""
        return self._data.length

    def batches(self) -> Iterator[IndexedBatch]:
        """One pass over all examples, in order."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[IndexedBatch] = []
        total = 0
        for indexed in self._data.batches():
            total += tree_bytes(indexed.batch)
            if total > KEPT_BYTES:
                kept.clear()
            else:
                kept.append(indexed)
            yield indexed
        self._kept = kept if total <= KEPT_BYTES else None


class JoinedBatches:
    """Short batches joined to what the workspace holds; for fitting, whose sums take any length.

    Numbers do not depend on it but for rounding.
    """

    def __init__(self, objective: Objective, data: TrainingData) -> None:
        self._objective = objective
        self._data = data

    @property
    def length(self) -> int:
        """Number of examples."""
        return self._data.length

    def batches(self) -> Iterator[IndexedBatch]:
        """One pass over all examples, in order."""
        batches = self._data.batches()
        first = next(batches, None)
        if first is not None:
            yield from joined(chain([first], batches), self._examples_at_once(first.batch))

    def _examples_at_once(self, batch: Batch) -> int:
        """By an example's graph and its gradient of the largest parameter."""
        gradient = max(value.numel() for value in self._objective.parameters().values())
        graph = GRAPH_COPIES * activation_elements(self._objective, batch)
        return int(workspace_bytes(self._objective) // (self._objective.dtype.itemsize * (graph + gradient)))


def joined(batches: Iterable[IndexedBatch], size: int) -> Iterator[IndexedBatch]:
    """Consecutive batches of equal shapes joined to at most `size` examples; longer ones as they are."""
    group: list[IndexedBatch] = []
    count = 0
    for indexed in batches:
        n = batch_size(indexed.batch)
        if group and (count + n > size or _form(indexed.batch) != _form(group[0].batch)):
            yield _join(group)
            group, count = [], 0
        group.append(indexed)
        count += n
    if group:
        yield _join(group)


def _join(group: list[IndexedBatch]) -> IndexedBatch:
    if len(group) == 1:
        return group[0]
    leaves = [pytree.tree_leaves(batch) for _, batch in group]
    whole = [torch.cat(column) for column in zip(*leaves, strict=True)]
    return IndexedBatch(group[0].start, pytree.tree_unflatten(whole, pytree.tree_structure(group[0].batch)))


def _form(batch: Batch) -> object:
    leaves, structure = pytree.tree_flatten(batch)
    return structure, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]


def tree_bytes(batch: Batch) -> int:
    """Bytes of all tensors of a batch."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
