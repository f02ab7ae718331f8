"""What `fit` was given, as training data that can be read as often as a method needs.

A shuffled loader is put into one order at the start and keeps it, so that every pass (and every
iteration of a solver) sees the same examples under the same index. Methods keep batches and join them: of
data that may fill its tensors again for the next batch they are given copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from influence_calculator.errors import OneShotIterableError
from influence_calculator.iterables import Readable, pair_of
from influence_calculator.maths.objective import IndexedBatch, batch_size, on_device
from influence_calculator.maths.one_by_one import PROBED
from influence_calculator.maths.training_batches import joined


class IterableTrainingData:
    """Training data of anything that iterates over (x, y), on the model's device; x may be a pytree."""

    def __init__(self, items: Iterable[Any], device: torch.device, passes: int) -> None:
        """`passes` is how often the method reads the data.

        Raises:
            OneShotIterableError: the data can be read once, and the method reads it more often.
        """
        self.device = device
        self._items = Readable("data", in_one_order(items))
        self._lends = _lends(items)
        self._peeked: Iterator[tuple[Any, Any]] | None = None
        self._length: int | None = None
        if self._items.is_one_shot and passes > 1:
            raise OneShotIterableError("data", f"the method reads it {passes} times")

    @property
    def length(self) -> int:
        """Number of examples, counted once."""
        if self._length is None:
            self._length = sum(batch_size(x) for x, _ in self._read())
        return self._length

    def first(self) -> tuple[Any, Any]:
        """The first batch that holds examples, joined with those that follow, where shapes allow, until there
        are as many as a probe tries; a later pass sees them too.

        Raises:
            ValueError: there is none.
        """
        pairs, taken, count = self._read(), [], 0
        for pair in pairs:
            taken.append(IndexedBatch(count, self._owned(pair)))
            count += batch_size(pair[0])
            if count >= PROBED:
                break
        if not taken:
            raise ValueError(
                "data: expected at least one batch with an example, got none; the training data is empty"
            )
        if self._items.is_one_shot:
            self._peeked = chain([pair for _, pair in taken], pairs)
        return self._on_device(next(joined(taken, count)).batch)

    def batches(self) -> Iterator[IndexedBatch]:
        """One pass over all examples."""
        start = 0
        for pair in self._read():
            x, y = self._on_device(self._owned(pair))
            yield IndexedBatch(start, (x, y))
            start += batch_size(x)
        self._length = start

    def _read(self) -> Iterator[tuple[Any, Any]]:
        """The batches that hold examples."""
        if self._peeked is not None:
            pairs, self._peeked = self._peeked, None
            return pairs
        pairs = (pair_of("data", item) for item in self._items)
        return (pair for pair in pairs if batch_size(pair[0]) > 0)

    def _owned(self, pair: tuple[Any, Any]) -> tuple[Any, Any]:
        """The pair as it stays when the next one is read."""
        if not self._lends:
            return pair
        owned: tuple[Any, Any] = pytree.tree_map_only(Tensor, self._copy, pair)
        return owned

    def _copy(self, leaf: Tensor) -> Tensor:
        """The tensor on the device, with memory of its own."""
        moved = leaf.to(self.device)
        return moved.detach().clone() if moved is leaf else moved

    def _on_device(self, pair: tuple[Any, Any]) -> tuple[Any, Any]:
        x, y = on_device(pair, self.device)
        return x, y


class _LoaderInOneOrder:
    """A loader's examples in the order of the sampler's first draw."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._dataset = loader.dataset
        batches: Iterable[Any] | None = loader.batch_sampler
        self._is_batched = batches is not None
        # Without examples it is a sampler that is false.
        self._order: list[Any] = list(loader.sampler if batches is None else batches)
        self._collate = loader.collate_fn
        self._pin_memory = loader.pin_memory
        self._processes: dict[str, Any] = {
            "num_workers": loader.num_workers,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
        }

    def __iter__(self) -> Iterator[Any]:
        if self._is_batched and type(self._dataset) is TensorDataset and self._collate is default_collate:
            # What collating one example after another comes to, at a hundredth of the time.
            return iter([t[torch.as_tensor(batch)] for t in self._dataset.tensors] for batch in self._order)
        batching: dict[str, Any] = (
            {"batch_sampler": self._order}
            if self._is_batched
            else {"sampler": self._order, "batch_size": None}
        )
        return iter(
            DataLoader(
                self._dataset,
                collate_fn=self._collate,
                pin_memory=self._pin_memory,
                **self._processes,
                **batching,
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        # Dask's worker processes are daemonic: they may not start processes of their own.
        return {**self.__dict__, "_processes": {}}


def in_one_order(items: Iterable[Any]) -> Iterable[Any]:
    """`items`, a loader's always in the order of its sampler's first draw."""
    if isinstance(items, DataLoader) and not isinstance(items.dataset, IterableDataset):
        return _LoaderInOneOrder(items)
    return items


def drawn_once(items: Iterable[Any]) -> Iterable[Any]:
    """`items`, a shuffled loader as one of the same batches that draws them no more.

    For whoever reads it through several `in_one_order`: one that draws examples, as `drop_last` does, would
    give each of them others.
    """
    if not isinstance(items, DataLoader) or isinstance(items.dataset, IterableDataset):
        return items
    if items.batch_size is None and items.batch_sampler is not None:
        order: dict[str, Any] = {"batch_sampler": list(items.batch_sampler)}
    else:
        order = {"sampler": list(items.sampler), "batch_size": items.batch_size, "drop_last": items.drop_last}
    return DataLoader(
        items.dataset,
        **order,
        num_workers=items.num_workers,
        collate_fn=items.collate_fn,
        pin_memory=items.pin_memory,
        timeout=items.timeout,
        worker_init_fn=items.worker_init_fn,
        multiprocessing_context=items.multiprocessing_context,
        generator=items.generator,
        prefetch_factor=items.prefetch_factor,
        persistent_workers=items.persistent_workers,
    )


def _lends(items: Iterable[Any]) -> bool:
    """Whether the tensors of a batch may be filled again for the next one."""
    if isinstance(items, DataLoader):
        # Torch collates into new tensors, and those of another process are new here.
        return items.collate_fn is not default_collate and items.num_workers == 0
    return not isinstance(items, list | tuple)
