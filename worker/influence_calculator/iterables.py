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

from influence_calculator.errors import OneShotIterableError, RandomOrderError

Item = TypeVar("Item")

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Readable(Generic[Item]):
    """An iterable that says so when it cannot be read a second time."""

    def __init__(self, field: str, items: Iterable[Item]) -> None:
        self.field = field
        self._items = items
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
        """Number of examples, if known without reading."""
        dataset = self._items.dataset if isinstance(self._items, DataLoader) else None
        if isinstance(dataset, Sized):
            return len(dataset)
        if isinstance(self._items, list | tuple):
            return sum(len(x) for x, *_ in self._items)
        return None

    def __iter__(self) -> Iterator[Item]:
        if self.is_one_shot and self._was_read:
            raise OneShotIterableError(self.field, "it was read already")
        self._was_read = True
        return iter(self._items)


def require_fixed_order(field: str, items: object) -> None:
    """A loader yields the same examples in the same order every time.

    Raises:
        RandomOrderError: it draws them at random.
    """
    if not isinstance(items, DataLoader):
        return
    for sampler in (items.sampler, getattr(items.batch_sampler, "sampler", None)):
        if is_random(sampler):
            raise RandomOrderError(field, type(sampler).__name__)


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
