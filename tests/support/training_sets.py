"""A training set in memory, cut into batches of any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from influence_calculator.maths.objective import Batch, IndexedBatch, batch_size, micro_batches


@dataclass
class TrainingSet:
    """All examples of one batch, again and again, `size` at a time."""

    whole: Batch
    size: int
    passes: int = field(default=0)
    """How often somebody went over it."""

    @property
    def length(self) -> int:
        return batch_size(self.whole)

    def batches(self) -> Iterator[IndexedBatch]:
        self.passes += 1
        yield from micro_batches(IndexedBatch(0, self.whole), self.size)
