"""Writes a Dask array to Zarr in parallel, with checksums: one task and one storage object per chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import zarr
from dask.blockwise import Blockwise
from dask.delayed import Delayed, delayed
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import DataNode, GraphNode, List, Task, TaskRef
from numpy.typing import NDArray
from zarr.storage import StoreLike

from influence_calculator.dask_checks import require_known_chunks
from influence_calculator.errors import MisalignedChunksError
from influence_calculator.storage import create_array
from influence_calculator.storage.zarr_array import place_of, stored_at


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
        overwrite: replace an array that is there: its chunks are gone before the first is written.
        compute: write now, with the default scheduler or client, and return the stored array. False:
            create the empty array now and return a `Delayed` that writes it and yields it.
        storage_options: for fsspec.

    Raises:
        MisalignedChunksError, UnknownChunksError: chunks that are no storage objects; nothing is written.
        ContainsArrayError: there is an array already and `overwrite` is False.
        ContainsGroupError: there is a group, which is never replaced.
        ValueError: `array` is no Dask array, or reads from the array that it would replace, as `da.from_zarr`
            does. A reader of another kind is not found out, and reads NaN.
    """
    require_known_chunks("array", array)
    chunks = tuple(_regular(dimension, sizes) for dimension, sizes in enumerate(array.chunks))
    if overwrite:
        _require_not_read(array, url, storage_options)
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


def _require_not_read(array: da.Array, url: StoreLike, storage_options: Mapping[str, Any] | None) -> None:
    """`array` reads nothing of what is stored at `url`.

    Raises:
        ValueError: it does.
    """
    target = stored_at(url, storage_options)
    if target is None:
        return
    place = place_of(target)
    if any(place_of(source) == place for source in _sources(array)):
        raise ValueError(
            f"array: expected one that does not read from {url}, which overwrite=True empties before it is "
            "read; write to another place, or hold the array in memory: write_zarr(array.persist(), ...)"
        )


def _sources(array: da.Array) -> Iterator[zarr.Array[Any]]:
    """The stored arrays that the graph of `array` holds."""
    for layer in array.dask.layers.values():
        # A Blockwise layer writes its tasks down when asked for them: all are of these arguments.
        nodes = (
            [argument for argument, _ in layer.indices] if isinstance(layer, Blockwise) else layer.values()
        )
        for node in nodes:
            for value in (node, *(node.args if isinstance(node, Task) else ())):
                held = value.value if isinstance(value, DataNode) else value
                if isinstance(held, zarr.Array):
                    yield held


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
