"""The graphs of the Dask calculator: which task runs on which chunks, under which key.

Graphs are written down task by task, so that what is computed once is computed once: factors per test
chunk, then a region per group of test chunks and training chunk, which is a chunk of the output.
`dask_calculator` decides whether; here is how.

Shapes: T test examples, N training examples, P parameters, F... feature dimensions of x.
"""

from __future__ import annotations

import logging
import math
import pickle
import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple
from uuid import uuid4

import dask
import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.task_spec import GraphNode, List, Task, TaskRef
from dask.typing import Key
from distributed import Client
from distributed.protocol import pickle as distributed_pickle
from numpy.typing import NDArray

from influence_calculator import chunk_tasks
from influence_calculator.chunk_tasks import Rows
from influence_calculator.groups import group_chunks, join_chunks
from influence_calculator.types import InfluenceMode

logger = logging.getLogger(__name__)

Layer = dict[Any, GraphNode]


class Limits(NamedTuple):
    """How much one region takes."""

    group_bytes: int
    """For the factors of its group and their scores."""
    tasks: float
    """Regions that are left at least when short training chunks are joined; infinite: none are."""


def sent(client: Client, name: str, value: Any) -> Delayed:
    """`value` on every worker of the client, as a node that other graphs refer to.

    Data that is scattered is lost with the last worker that holds it. This is made again, from a pickle that
    stays with the scheduler, which never opens it. An asynchronous client's workers get it as they need it.
    """
    buffers: list[pickle.PickleBuffer] = []
    pickled = distributed_pickle.dumps(value, buffer_callback=buffers.append)
    # The value may change while it waits to be sent, and where workers share this process.
    shared = client.asynchronous or client.scheduler_info(n_workers=0)["address"].startswith("inproc")
    arrays = [np.array(buffer.raw(), copy=shared) for buffer in buffers]
    key = f"{name}-{uuid4().hex}"
    load = Task(key, _loaded, pickled, arrays)
    # Dask warns of what should be scattered.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": sys.maxsize}):
        [node] = client.persist([Delayed(key, HighLevelGraph.from_collections(key, {key: load}))])
    if not client.asynchronous and client.ncores():
        # Tasks run where what they need is: all of them where one worker alone held it. Of a worker that dies
        # meanwhile Dask tells in many ways, and none matters: the node is made again where it is needed.
        try:
            client.replicate([node])
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            logger.warning("%s goes to each worker when that needs it, not at once: %s", name, why)
    return node


def _loaded(pickled: bytes, buffers: list[NDArray[Any]]) -> Any:
    return pickle.loads(pickled, buffers=buffers)


def rows_of(
    rows: Rows, side: Delayed, x: da.Array, y: da.Array, width: int, dtype: np.dtype[Any]
) -> da.Array:
    """Factors or left representations `[n, P]` of (x, y), one task per chunk."""
    name = f"influence-{rows.value}-{tokenize(side.key, x.name, y.name)}"
    solve = chunk_tasks.factors_of_chunk if rows is Rows.FACTORS else chunk_tasks.left_of_chunk
    layer = _per_chunk(name, (0,), solve, side, x, y)
    return _array(name, layer, (x.chunks[0], (width,)), dtype, x, y, side)


def factors_and_report(
    side: Delayed, x: da.Array, y: da.Array, width: int, dtype: np.dtype[Any]
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


def self_influences(side: Delayed, x: da.Array, y: da.Array, dtype: np.dtype[Any]) -> da.Array:
    """Each example's influence on itself, `[n]`, one task per chunk."""
    name = f"self-influences-{tokenize(side.key, x.name, y.name)}"
    layer = _per_chunk(name, (), chunk_tasks.self_influences_of_chunk, side, x, y)
    return _array(name, layer, (x.chunks[0],), dtype, x, y, side)


def influences(
    side: Delayed,
    rows: Rows,
    test: da.Array,
    x: da.Array,
    y: da.Array,
    mode: InfluenceMode,
    limits: Limits,
) -> da.Array:
    """Influences `[T, N]` (in mode perturbation `[T, N, F...]`) of (x, y) from the rows `test` of the test
    side, `[T, P]`.

    One region per group of test chunks and run of training chunks, and one chunk of the output per region;
    short training chunks share a run as `limits` has it.
    """
    name = f"influences-{tokenize(side.key, test.name, x.name, y.name, mode, limits)}"
    features = x.shape[1:] if mode is InfluenceMode.Perturbation else ()
    heights, columns = test.chunks[0], x.chunks[0]
    scored = math.prod(features) * test.dtype.itemsize
    scores = max(columns) * scored
    groups = group_chunks(heights, test.shape[1] * test.dtype.itemsize + scores, limits.group_bytes, scores)
    layer: Layer = {}
    chunks_of = _read_once if len(groups) == 1 else _chunks
    examples, labels, test_chunks = chunks_of(x), chunks_of(y), _chunks(test)
    needed = _row_bytes(x) + _row_bytes(y) + max(map(_count(heights), groups), default=0) * scored
    runs = join_chunks(columns, needed, limits.tasks / max(1, len(groups)))
    for number, group in enumerate(groups):
        together = List(*(test_chunks[i] for i in group))
        for column, run in enumerate(runs):
            key: Key = (name, number, column, *(0 for _ in features))
            data = (List(*(chunks[i] for i in run)) for chunks in (examples, labels))
            layer[key] = Task(
                key, chunk_tasks.region, TaskRef(side.key), f"{name}-{number}", rows, together, *data, mode
            )
    chunks = (
        tuple(map(_count(heights), groups)),
        tuple(map(_count(columns), runs)),
        *((extent,) for extent in features),
    )
    return _array(name, layer, chunks, test.dtype, test, x, y, side)


def _count(sizes: Sequence[int]) -> Callable[[range], int]:
    """Rows of the chunks of a range."""
    return lambda chunks: sum(sizes[i] for i in chunks)


def _row_bytes(array: da.Array) -> int:
    return math.prod(array.shape[1:]) * array.dtype.itemsize


def _per_chunk(
    name: str, rest: tuple[int, ...], function: Callable[..., Any], side: Delayed, x: da.Array, y: da.Array
) -> Layer:
    layer: Layer = {}
    for i, data in enumerate(zip(_read_once(x), _read_once(y), strict=True)):
        key: Key = (name, i, *rest)
        layer[key] = Task(key, function, TaskRef(side.key), *data)
    return layer


def _chunks(array: da.Array) -> list[TaskRef]:
    rest = (0,) * (array.ndim - 1)
    return [TaskRef((array.name, index, *rest)) for index in range(array.numblocks[0])]


def _read_once(array: da.Array) -> Sequence[TaskRef | NDArray[Any]]:
    """The chunks, each for one task alone: those in memory travel with it, without tasks of their own."""
    references = _chunks(array)
    layer = array.dask.layers[array.name]
    if not isinstance(layer, MaterializedLayer):
        return references
    chunks = [layer.mapping[reference.key] for reference in references]
    return chunks if all(isinstance(chunk, np.ndarray) for chunk in chunks) else references


def _array(
    name: str, layer: Layer, chunks: tuple[tuple[int, ...], ...], dtype: np.dtype[Any], *parents: Any
) -> da.Array:
    """The array of a layer's tasks; parents that none of them refers to are left out of its graph."""
    referred = {dependency for task in layer.values() for dependency in task.dependencies}
    names = {key[0] if isinstance(key, tuple) else key for key in referred}
    collections = [p for p in parents if _name(p) in names]
    graph = HighLevelGraph.from_collections(name, layer, dependencies=collections)
    return da.Array(graph, name, chunks, meta=np.empty((0,) * len(chunks), dtype))


def _name(collection: da.Array | Delayed) -> Key:
    return collection.name if isinstance(collection, da.Array) else collection.key
