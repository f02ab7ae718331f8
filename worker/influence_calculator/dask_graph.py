"""The graphs of the Dask calculator: which task runs on which chunks, under which key.

Graphs are written down task by task, so that what is computed once is computed once: factors per test
chunk, a region per group of test chunks and training chunk, and cheap cuts of the region for the
output's chunks. `dask_calculator` decides whether; here is how.

Shapes: T test examples, N training examples, P parameters, F... feature dimensions of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from operator import itemgetter
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import Alias, GraphNode, List, Task, TaskRef
from dask.typing import Key
from distributed import Future

from influence_calculator import chunk_tasks
from influence_calculator.groups import group_chunks
from influence_calculator.types import InfluenceMode

Side = Future[Any] | Delayed
"""A `chunk_tasks.WorkerSide` where tasks find it: on the workers already, or a node of the graph."""

Layer = dict[Any, GraphNode]


def factors(side: Side, x: da.Array, y: da.Array, width: int, dtype: np.dtype[Any]) -> da.Array:
    """Factors `[n, P]` of (x, y), one task per chunk."""
    name = f"influence-factors-{tokenize(side.key, x.name, y.name)}"
    layer = _per_chunk(name, (0,), chunk_tasks.factors_of_chunk, side, x, y)
    return _array(name, layer, (x.chunks[0], (width,)), dtype, x, y, side)


def factors_and_report(
    side: Side, x: da.Array, y: da.Array, width: int, dtype: np.dtype[Any]
) -> tuple[da.Array, da.Array]:
    """Factors `[n, P]` and how the solves ended `[n]`, both from one task per chunk."""
    token = tokenize(side.key, x.name, y.name)
    solves, left, report = (f"influence-{what}-{token}" for what in ("solves", "solved", "report"))
    solve = _per_chunk(solves, (), chunk_tasks.solved_chunk, side, x, y)
    first, second = dict(solve), dict(solve)
    for i in range(x.numblocks[0]):
        first[left, i, 0] = Task((left, i, 0), itemgetter(0), TaskRef((solves, i)))
        second[report, i] = Task((report, i), itemgetter(1), TaskRef((solves, i)))
    return (
        _array(left, first, (x.chunks[0], (width,)), dtype, x, y, side),
        _array(report, second, (x.chunks[0],), chunk_tasks.REPORT_DTYPE, x, y, side),
    )


def influences(
    side: Side, left: da.Array, x: da.Array, y: da.Array, mode: InfluenceMode, group_bytes: int
) -> da.Array:
    """Influences `[T, N]` (in mode perturbation `[T, N, F...]`) of (x, y) from factors `left`.

    One region per group of test chunks and training chunk.
    """
    name = f"influences-{tokenize(side.key, left.name, x.name, y.name, mode, group_bytes)}"
    features = x.shape[1:] if mode is InfluenceMode.Perturbation else ()
    rows, columns = left.chunks[0], x.chunks[0]
    widest = left.shape[1] + max(columns) * math.prod(features)
    groups = group_chunks(rows, widest * left.dtype.itemsize, group_bytes)
    layer: Layer = {}
    for number, group in enumerate(groups):
        together = List(*(_chunk(left, i) for i in group))
        for column in range(len(columns)):
            key: Key = (f"region-{name}", number, column)
            data = _chunk(x, column), _chunk(y, column)
            layer[key] = Task(
                key, chunk_tasks.region, _reference(side), f"{name}-{number}", together, *data, mode
            )
            layer |= _cuts(key, name, group, rows, (column, *(0 for _ in features)))
    chunks = (rows, columns, *((extent,) for extent in features))
    return _array(name, layer, chunks, left.dtype, left, x, y, side)


def _cuts(region: Key, name: str, group: range, rows: tuple[int, ...], rest: tuple[int, ...]) -> Layer:
    """The output's chunks of one region: one test chunk each."""
    if len(group) == 1:
        only: Key = (name, group[0], *rest)
        return {only: Alias(only, region)}
    stops = list(accumulate(rows[i] for i in group))
    layer: Layer = {}
    for i, stop in zip(group, stops, strict=True):
        key: Key = (name, i, *rest)
        layer[key] = Task(key, chunk_tasks.rows_of, TaskRef(region), stop - rows[i], stop)
    return layer


def _per_chunk(
    name: str, rest: tuple[int, ...], function: Callable[..., Any], side: Side, x: da.Array, y: da.Array
) -> Layer:
    keys: list[Key] = [(name, i, *rest) for i in range(x.numblocks[0])]
    return {
        key: Task(key, function, _reference(side), _chunk(x, i), _chunk(y, i)) for i, key in enumerate(keys)
    }


def _chunk(array: da.Array, index: int) -> TaskRef:
    return TaskRef((array.name, index, *(0 for _ in array.shape[1:])))


def _reference(side: Side) -> TaskRef:
    """A future stands in the graph itself, so that the graph keeps its data alive."""
    return side if isinstance(side, Future) else TaskRef(side.key)


def _array(
    name: str, layer: Layer, chunks: tuple[tuple[int, ...], ...], dtype: np.dtype[Any], *parents: Any
) -> da.Array:
    collections = [parent for parent in parents if not isinstance(parent, Future)]
    graph = HighLevelGraph.from_collections(name, layer, dependencies=collections)
    return da.Array(graph, name, chunks, meta=np.empty((0,) * len(chunks), dtype))
