"""What the sequential calculator reads: anything that iterates over (x, y), as long as it is asked for.

Says how often it can be read, in which order, and refuses what would give wrong rows or columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, Generic, TypeVar

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from influence_calculator.array import LazyChunkSequence
from influence_calculator.errors import OneShotIterableError, RandomOrderError
from influence_calculator.maths.objective import batch_size

Item = TypeVar("Item")

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Readable(Generic[Item]):
    """An iterable, or a lazy sequence of chunks, that says so when it cannot be read a second time.

    Raises:
        ValueError: neither of them.
    """

    def __init__(self, field: str, items: Iterable[Item] | LazyChunkSequence[Item]) -> None:
        self.field = field
        self._items = _Chunks(items) if isinstance(items, LazyChunkSequence) else items
        if not isinstance(self._items, Iterable) and not hasattr(type(self._items), "__getitem__"):
            raise ValueError(
                f"{field}: expected something to iterate over, got {type(items).__name__}; pass a list, a "
                f"DataLoader or an object with __iter__"
            )
        self.is_one_shot = isinstance(items, Iterator)
        self._was_read = False

    @property
    def length(self) -> int | None:
        """Number of items, if known."""
        if not isinstance(self._items, Sized):
            return None
        try:
            return len(self._items)
        except TypeError:  # a DataLoader over an iterable dataset has __len__, and raises
            return None

    @property
    def examples(self) -> int | None:
        """Number of examples, if known without reading all of them: of a list or a DataLoader.

        Raises:
            ValueError: an item of a list that is no pair (x, y), or an x without examples first.
        """
        items = self._items
        if isinstance(items, list | tuple):
            return sum(batch_size(pair_of(self.field, item)[0]) for item in items)
        if not isinstance(items, DataLoader):
            return None
        if items.batch_sampler is not None:
            return len(items.dataset) if isinstance(items.dataset, Sized) else None
        # The dataset's items are batches.
        first = self.first() if self.length else None
        return self.length if first is None else batch_size(pair_of(self.field, first)[0]) * len(items)

    def first(self) -> Item | None:
        """The first item, None if there is none; for data that can be iterated over again."""
        return next(iter(self._items), None)

    def __iter__(self) -> Iterator[Item]:
        if self.is_one_shot and self._was_read:
            raise OneShotIterableError(self.field, "it was read already")
        self._was_read = True
        return iter(self._items)


class _Chunks(Generic[Item]):
    """The chunks of a lazy sequence, computed anew whenever they are iterated over."""

    def __init__(self, sequence: LazyChunkSequence[Item]) -> None:
        self._sequence = sequence

    def __iter__(self) -> Iterator[Item]:
        return self._sequence.generator_factory()

    def __len__(self) -> int:
        if self._sequence.len_generator is None:
            raise TypeError("the number of chunks is not known")
        return self._sequence.len_generator


def require_fixed_order(field: str, items: object) -> None:
    """A loader yields the same examples in the same order every time.

    Raises:
        RandomOrderError: it draws them at random.
    """
    if not isinstance(items, DataLoader):
        return
    for sampler in (items.sampler, items.batch_sampler):
        while sampler is not None:
            if is_random(sampler):
                raise RandomOrderError(field, type(sampler).__name__)
            sampler = getattr(sampler, "sampler", None)


def is_random(sampler: object) -> bool:
    """Whether a torch sampler draws another order at every pass."""
    return isinstance(sampler, _RANDOM) or (isinstance(sampler, DistributedSampler) and sampler.shuffle)


def pair_of(field: str, item: Any) -> tuple[Any, Any]:
    """The (x, y) of one item of a data iterable.

    Raises:
        ValueError: the item is not a pair.
    """
    if not isinstance(item, list | tuple) or len(item) != 2:
        size = f" of {len(item)} entries" if isinstance(item, list | tuple) else ""
        raise ValueError(
            f"{field}: expected items (x, y), got {type(item).__name__}{size}; yield one batch of inputs and "
            f"its labels"
        )
    return item[0], item[1]
