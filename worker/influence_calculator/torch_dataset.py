"""A map-style torch dataset as Dask arrays, one chunk of examples read by one task."""

from __future__ import annotations

import logging
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import torch
from dask.delayed import delayed
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import GraphNode, Task, TaskRef
from numpy.typing import DTypeLike, NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset

from influence_calculator.torch.converter import TorchNumpyConverter

logger = logging.getLogger(__name__)


def torch_dataset_to_dask_array(
    dataset: Dataset[Any],
    chunk_size: int,
    total_size: int | None = None,
    resulting_dtype: DTypeLike | None = None,
) -> tuple[da.Array, ...]:
    """One Dask array per entry of the dataset's items, chunked along the examples.

    Every example must have as many entries as the first, of the same shapes and dtypes.

    Args:
        dataset: `dataset[i]` is a tensor, a number, or a tuple of them.
        chunk_size: examples per chunk, at least 1.
        total_size: number of examples of a dataset without `len`; without either, the dataset is read
            once to count.
        resulting_dtype: of entries that are floats; entries of integers (labels, token ids) keep their
            own. Default: every entry keeps its own (bfloat16, which numpy lacks, becomes float32).

    Raises:
        ValueError: `chunk_size` below 1; `total_size` that contradicts `len`, or is no number of examples; a
            dataset without examples, or with items of another kind. When a chunk is computed: an example that
            differs from the first.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 example, got {chunk_size}")
    _require_by_index(dataset)
    length = _length(dataset, total_size)
    if length == 0:
        raise ValueError("dataset: expected at least one example, got none; it is empty")
    name = f"torch-dataset-{uuid4().hex}"
    source = delayed(dataset, name=f"{name}-source", traverse=False)
    starts = range(0, length, chunk_size)
    sizes = tuple(min(chunk_size, length - start) for start in starts)
    first = [_Entry(array.dtype, array.shape) for array in _arrays(dataset, 0, resulting_dtype)]
    layer: dict[Any, GraphNode] = {
        (name, i): Task((name, i), _read, TaskRef(source.key), start, start + size, resulting_dtype, first)
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    }
    chunks = HighLevelGraph.from_collections(name, layer, dependencies=[source])
    return tuple(_array_of(chunks, name, position, sizes, entry) for position, entry in enumerate(first))


@dataclass(frozen=True)
class _Entry:
    """What one entry of every example is like, as the first example has it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} of shape {list(self.shape)}"


def _array_of(
    chunks: HighLevelGraph, name: str, position: int, sizes: tuple[int, ...], entry: _Entry
) -> da.Array:
    own = f"{name}-{position}"
    rest = (0,) * len(entry.shape)
    layer: dict[Any, GraphNode] = {
        (own, i, *rest): Task((own, i, *rest), _pick, TaskRef((name, i)), position) for i in range(len(sizes))
    }
    graph = HighLevelGraph({**chunks.layers, own: layer}, {**chunks.dependencies, own: {name}})
    shape = (sizes, *((extent,) for extent in entry.shape))
    return da.Array(graph, own, shape, meta=np.empty((0,) * len(shape), entry.dtype))


def _read(
    dataset: Dataset[Any], start: int, stop: int, dtype: DTypeLike | None, first: list[_Entry]
) -> list[NDArray[Any]]:
    """Examples `start` to `stop`, one array per entry.

    Raises:
        ValueError: one that is not like the first; names the example and the entry.
    """
    examples = [_arrays(dataset, index, dtype) for index in range(start, stop)]
    for index, arrays in enumerate(examples, start):
        if len(arrays) != len(first):
            raise ValueError(
                f"dataset[{index}]: expected {len(first)} entries, as dataset[0] has, got {len(arrays)}; "
                "return as many for every example"
            )
        for position, (array, expected) in enumerate(zip(arrays, first, strict=True)):
            found = _Entry(array.dtype, array.shape)
            if found != expected:
                raise ValueError(
                    f"dataset[{index}], entry {position}: expected {expected}, as dataset[0] has it, got "
                    f"{found}; return tensors of one shape and dtype for every example"
                )
    return [np.stack(column) for column in zip(*examples, strict=True)]


def _pick(entries: list[NDArray[Any]], position: int) -> NDArray[Any]:
    return entries[position]


def _arrays(dataset: Dataset[Any], index: int, dtype: DTypeLike | None) -> list[NDArray[Any]]:
    """The entries of one example."""
    item = dataset[index]
    entries = item if isinstance(item, list | tuple) else (item,)
    return [_as_array(entry, dtype, index, position) for position, entry in enumerate(entries)]


def _as_array(entry: Any, dtype: DTypeLike | None, index: int, position: int) -> NDArray[Any]:
    converter = TorchNumpyConverter()
    try:
        tensor = converter.from_numpy(entry) if isinstance(entry, np.ndarray) else torch.as_tensor(entry)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"dataset[{index}], entry {position}: expected a tensor or a number, got {_kind(entry)}; return "
            "tensors and numbers, as (x, y), for every example"
        ) from error
    array = converter.to_numpy(tensor)
    return array.astype(dtype, copy=False) if dtype is not None and array.dtype.kind == "f" else array


def _kind(entry: Any) -> str:
    return f"an array of {entry.dtype}" if isinstance(entry, np.ndarray) else type(entry).__name__


def _require_by_index(dataset: object) -> None:
    """Examples can be asked for one by one.

    Raises:
        ValueError: they cannot.
    """
    if isinstance(dataset, DataLoader | IterableDataset):
        cure = "pass its dataset" if isinstance(dataset, DataLoader) else "give it __getitem__ and __len__"
        raise ValueError(
            f"dataset: expected a map-style dataset, whose examples are dataset[i], got "
            f"{type(dataset).__name__}; {cure}"
        )


def _length(dataset: Dataset[Any], total_size: int | None) -> int:
    if isinstance(dataset, Sized):
        length = len(dataset)
        if total_size is not None and total_size != length:
            raise ValueError(
                f"total_size: expected {length}, the dataset's len, got {total_size}; leave it out"
            )
        return length
    if total_size is not None:
        _require_there(dataset, total_size)
        return total_size
    logger.warning("total_size: not given for a dataset without len; the dataset is read once to count")
    length = 0
    while True:
        try:
            dataset[length]
        except IndexError:
            return length
        length += 1


def _require_there(dataset: Dataset[Any], total_size: int) -> None:
    """A dataset without len has an example of the last index.

    Raises:
        ValueError: it has not.
    """
    if total_size < 1:
        raise ValueError(f"total_size: expected at least 1 example, got {total_size}; leave it out to count")
    try:
        dataset[total_size - 1]
    except (IndexError, KeyError) as error:
        raise ValueError(
            f"total_size: expected at most the number of examples, got {total_size}, but "
            f"dataset[{total_size - 1}] is not there; leave it out to count"
        ) from error
