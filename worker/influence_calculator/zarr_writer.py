"""Writes a Dask array to Zarr in parallel, with checksums: one task and one storage object per chunk."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import zarr
from dask.delayed import Delayed, delayed
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import GraphNode, List, Task, TaskRef
from numpy.typing import NDArray
from zarr.storage import StoreLike

from influence_calculator.dask_checks import require_known_chunks
from influence_calculator.errors import MisalignedChunksError
from influence_calculator.storage import create_array


def write_zarr(
    array: da.Array,
    url: StoreLike,
    *,
    overwrite: bool = False,
    compute: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> zarr.Array[Any] | Delayed:
    """Writes `array` to a new Zarr v3 array at `url`, each Dask chunk as one storage object.

    Every object carries a crc32c checksum, so that a damaged one is an error when read. Chunks that are
    not written yet read as NaN (0 for integers).

    Args:
        array: chunks of one size per dimension; only the last of each may be shorter.
        url: a path, a URL (fsspec) or a zarr store that all workers reach.
        overwrite: replace an array that is there.
        compute: write now, with the default scheduler or client, and return the stored array. False:
            create the empty array now and return a `Delayed` that writes it and yields it.
        storage_options: for fsspec.

    Raises:
        MisalignedChunksError, UnknownChunksError: chunks that are no storage objects; nothing is written.
        ContainsArrayError: there is an array already and `overwrite` is False.
    """
    require_known_chunks("array", array)
    chunks = tuple(_regular(dimension, sizes) for dimension, sizes in enumerate(array.chunks))
    dtype = np.dtype(array.dtype)
    target = create_array(
        url, array.shape, chunks, dtype, overwrite=overwrite, storage_options=storage_options
    )
    written = _written(array, target)
    return written.compute() if compute else written


def _regular(dimension: int, sizes: tuple[int, ...]) -> int:
    """The size that all chunks along `dimension` have, but the last, which may be shorter."""
    if len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0] or (len(sizes) > 1 and 0 in sizes):
        raise MisalignedChunksError(dimension, sizes)
    return sizes[0]


def _written(array: da.Array, target: zarr.Array[Any]) -> Delayed:
    """A graph that writes every chunk, then yields the array."""
    place = delayed(target, name=f"zarr-array-{uuid4().hex}", traverse=False)
    name = f"write-zarr-{uuid4().hex}"
    layer: dict[Any, GraphNode] = {}
    for index in product(*map(range, array.numblocks)):
        block = TaskRef((array.name, *index))
        layer[name, *index] = Task((name, *index), _write_chunk, TaskRef(place.key), index, block)
    layer[name] = Task(name, _all_written, TaskRef(place.key), List(*map(TaskRef, layer)))
    parents: list[Any] = [array, place]
    return Delayed(name, HighLevelGraph.from_collections(name, layer, dependencies=parents))


def _write_chunk(target: zarr.Array[Any], index: tuple[int, ...], block: NDArray[Any]) -> None:
    starts = [i * extent for i, extent in zip(index, target.chunks, strict=True)]
    place = tuple(slice(start, start + extent) for start, extent in zip(starts, block.shape, strict=True))
    target[place] = block


def _all_written(target: zarr.Array[Any], _: list[None]) -> zarr.Array[Any]:
    return target
