"""Random parts of the training set, as many as a stochastic solver takes steps.

Shapes: N training examples, m examples of a part, K = ⌈N/m⌉ parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.utils import _pytree as pytree

from influence_calculator.maths.objective import IndexedBatch, batch_size, slice_batch
from influence_calculator.maths.training_batches import TrainingBatches, tree_bytes

BUFFER_BYTES = 48 << 20
"""Where parts of a training set wait for their turn that is too large to be kept."""

Part = list[IndexedBatch]
"""m consecutive examples, in pieces of one shape each."""


class MiniBatches:
    """The training set in K consecutive parts of m examples, the last maybe shorter; K make an epoch.

    Each step draws its part independently of all others, by `seed` and the epoch's number, so that a
    stochastic solver is right on average. A set that is not kept in memory is read in its own order
    instead, once per epoch, and each part leaves a buffer of `BUFFER_BYTES` at random: what a part
    has to do with the ones before it is then an error of the order of a step's length.
    """

    def __init__(self, batches: TrainingBatches, size: int, seed: int) -> None:
        self._batches = batches
        self._size = size
        self._seed = seed

    @property
    def count(self) -> int:
        """K."""
        return -(-self._batches.length // self._size)

    @property
    def weight(self) -> float:
        """`K/N`: the weighted sum over a part's examples, averaged over the K parts, is the mean over N.

        However short the last part is; its own mean would count its examples more than others.
        """
        return self.count / self._batches.length

    def endless(self) -> Iterator[Part]:
        """The parts of one epoch after another."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            yield from self._epoch(generator)
            epoch += 1

    def _epoch(self, generator: torch.Generator) -> Iterator[Part]:
        parts = in_parts(self._batches.batches(), self._size)
        if not self._batches.are_kept:
            yield from _through_a_buffer(parts, generator)
            return
        every = list(parts)
        for index in torch.randint(len(every), (len(every),), generator=generator, device="cpu").tolist():
            yield every[index]


def in_parts(batches: Iterable[IndexedBatch], size: int) -> Iterator[Part]:
    """Consecutive examples, `size` at a time, whatever batches they come in."""
    part: Part = []
    count = 0
    for start, batch in batches:
        n, offset = batch_size(batch), 0
        while offset < n:
            taken = min(size - count, n - offset)
            part.append(IndexedBatch(start + offset, slice_batch(batch, offset, offset + taken)))
            offset, count = offset + taken, count + taken
            if count == size:
                yield part
                part, count = [], 0
    if part:
        yield part


def _through_a_buffer(parts: Iterable[Part], generator: torch.Generator) -> Iterator[Part]:
    waiting: list[Part] = []
    total = 0
    for part in parts:
        # A copy: a slice would keep the whole batch that it was cut from.
        waiting.append([IndexedBatch(start, pytree.tree_map(torch.clone, batch)) for start, batch in part])
        total += _part_bytes(part)
        while total > BUFFER_BYTES:
            drawn = _drawn(waiting, generator)
            total -= _part_bytes(drawn)
            yield drawn
    while waiting:
        yield _drawn(waiting, generator)


def _drawn(waiting: list[Part], generator: torch.Generator) -> Part:
    """Takes one out at random; the last takes its place."""
    index = int(torch.randint(len(waiting), (), generator=generator, device="cpu"))
    waiting[index], waiting[-1] = waiting[-1], waiting[index]
    return waiting.pop()


def _part_bytes(part: Part) -> int:
    return sum(tree_bytes(batch) for _, batch in part)
