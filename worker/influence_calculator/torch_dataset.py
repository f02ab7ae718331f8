"""A map-style torch dataset as Dask arrays, one chunk of examples read by one task."""

from __future__ import annotations

import logging
from collections.abc import Sized
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import torch
from dask.delayed import delayed
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import GraphNode, Task, TaskRef
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from influence_calculator.torch.converter import TorchNumpyConverter

logger = logging.getLogger(__name__)


def torch_dataset_to_dask_array(
    dataset: Dataset[Any],
    chunk_size: int,
    total_size: int | None = None,
    resulting_dtype: DTypeLike | None = None,
) -> tuple[da.Array, ...]:
    """One Dask array per entry of the dataset's items, chunked along the examples.

    Args:
        dataset: `dataset[i]` is a tensor, a number, or a tuple of them.
        chunk_size: examples per chunk, at least 1.
        total_size: number of examples of a dataset without `len`; without either, the dataset is read
            once to count.
        resulting_dtype: of entries that are floats; entries of integers (labels, token ids) keep their
            own. Default: every entry keeps its own (bfloat16, which numpy lacks, becomes float32).

    Raises:
        ValueError: `chunk_size` below 1; `total_size` that contradicts `len`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 example, got {chunk_size}")
    length = _length(dataset, total_size)
    name = f"torch-dataset-{uuid4().hex}"
    source = delayed(dataset, name=f"{name}-source", traverse=False)
    starts = range(0, length, chunk_size)
    sizes = tuple(min(chunk_size, length - start) for start in starts)
    samples = [_as_array(entry, resulting_dtype) for entry in _entries(dataset[0])]
    layer: dict[Any, GraphNode] = {
        (name, i): Task((name, i), _read, TaskRef(source.key), start, start + size, resulting_dtype)
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    }
    chunks = HighLevelGraph.from_collections(name, layer, dependencies=[source])
    return tuple(_entry(chunks, name, position, sizes, sample) for position, sample in enumerate(samples))


def _entry(
    chunks: HighLevelGraph, name: str, position: int, sizes: tuple[int, ...], sample: NDArray[Any]
) -> da.Array:
    own = f"{name}-{position}"
    rest = (0,) * sample.ndim
    layer: dict[Any, GraphNode] = {
        (own, i, *rest): Task((own, i, *rest), _pick, TaskRef((name, i)), position) for i in range(len(sizes))
    }
    graph = HighLevelGraph({**chunks.layers, own: layer}, {**chunks.dependencies, own: {name}})
    shape = (sizes, *((extent,) for extent in sample.shape))
    return da.Array(graph, own, shape, meta=np.empty((0,) * len(shape), sample.dtype))


def _read(dataset: Dataset[Any], start: int, stop: int, dtype: DTypeLike | None) -> list[NDArray[Any]]:
    """Examples `start` to `stop`, one array per entry."""
    columns = zip(*(_entries(dataset[i]) for i in range(start, stop)), strict=True)
    return [np.stack([_as_array(entry, dtype) for entry in column]) for column in columns]


def _pick(entries: list[NDArray[Any]], position: int) -> NDArray[Any]:
    return entries[position]


def _entries(item: Any) -> tuple[Any, ...]:
    return tuple(item) if isinstance(item, list | tuple) else (item,)


def _as_array(entry: Any, dtype: DTypeLike | None) -> NDArray[Any]:
    tensor = entry if isinstance(entry, Tensor) else torch.as_tensor(entry)
    array = TorchNumpyConverter().to_numpy(tensor)
    return array.astype(dtype, copy=False) if dtype is not None and array.dtype.kind == "f" else array


def _length(dataset: Dataset[Any], total_size: int | None) -> int:
    if isinstance(dataset, Sized):
        length = len(dataset)
        if total_size is not None and total_size != length:
            raise ValueError(
                f"total_size: expected {length}, the dataset's len, got {total_size}; leave it out"
            )
        return length
    if total_size is not None:
        return total_size
    logger.warning("total_size: not given for a dataset without len; the dataset is read once to count")
    length = 0
    while True:
        try:
            dataset[length]
        except IndexError:
            return length
        length += 1
