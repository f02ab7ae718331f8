"""What a Dask worker runs for one chunk or one region: numpy in, the model's own functions, numpy out.

Every task refers to one `WorkerSide`, which reaches a worker once and stays there. Blocks travel
between workers as numpy arrays, never as tensors of a framework or a device.

Shapes: t rows of a group of test chunks, n training examples of a chunk, P parameters.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from distributed import warn
from numpy.typing import NDArray

from influence_calculator.array import NumpyConverter
from influence_calculator.base_influence_function_model import InfluenceFunctionModel
from influence_calculator.errors import SolverWarning
from influence_calculator.heap import keep_freed_memory
from influence_calculator.types import InfluenceMode

REPORT_DTYPE = np.dtype([("status", "i1"), ("iterations", "i4"), ("residual", "f8")])
"""How one right-hand side ended: a `SolverStatus`, iterations, `‖r‖ / ‖b‖`."""


class Rows(Enum):
    """What the chunks of a test side hold."""

    FACTORS = "factors"
    """Influence factors by parameter."""
    LEFT = "left"
    """What the model's own `left` returned."""


_one_at_a_time = threading.Lock()
"""Workers with one thread each may still share a process (LocalCluster(processes=False)), and with it
the model that they must not enter together."""


class _Group(NamedTuple):
    """What `WorkerSide.group` made last, and of which arrays."""

    name: str
    rows: list[weakref.ref[NDArray[Any]]]
    together: Any

    def is_of(self, name: str, rows: Sequence[NDArray[Any]]) -> bool:
        """Whether it was made of these very arrays."""
        same = self.name == name and len(self.rows) == len(rows)
        return same and all(known() is chunk for known, chunk in zip(self.rows, rows, strict=True))


class WorkerSide:
    """The model and the converter on a worker, with the factors that were used last.

    A group's factors are put together and converted (moved to the device) once per worker, not once
    per training chunk.
    """

    def __init__(
        self, model: InfluenceFunctionModel[Any, Any], converter: NumpyConverter[Any], dtype: np.dtype[Any]
    ) -> None:
        self.model = model
        self.converter = converter
        self.dtype = dtype
        self._group: _Group | None = None
        self._converted: tuple[object, Any] | None = None
        self._copied: Callable[[], InfluenceFunctionModel[Any, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A worker sends it on to others, and may be computing with the model.
        model = self.model if self._copied is None else self._copied()
        return {**self.__dict__, "model": model, "_group": None, "_converted": None, "_copied": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # It has come to a process of its own: a worker.
        keep_freed_memory()
        self.__dict__.update(state)
        self._copied = self.model.at_rest()

    def group(self, name: str, rows: Sequence[NDArray[Any]], turn: Callable[[Any], Any] | None = None) -> Any:
        """The rows of the group called `name` as one tensor `[t, P]`, after `turn` if there is one.

        Put together anew for other arrays: the name says where they come from, which may hold something else
        by now, as a file that was written again.
        """
        last = self._group
        if last is None or not last.is_of(name, rows):
            self._group = None
            together = self._together([chunk for chunk in rows if len(chunk)], turn)
            last = self._group = _Group(name, [weakref.ref(chunk) for chunk in rows], together)
        return last.together

    def converted(self, given: object, convert: Callable[[], Any]) -> Any:
        """What `convert` makes of `given`, once for all tasks in a row that are given the same object."""
        if self._converted is None or self._converted[0] is not given:
            self._converted = None
            self._converted = given, convert()
        return self._converted[1]

    def _together(self, rows: Sequence[NDArray[Any]], turn: Callable[[Any], Any] | None) -> Any:
        if turn is None:
            return self.converter.from_numpy(joined(rows))
        if len({chunk.shape[1] for chunk in rows}) == 1:
            return turn(self.converter.from_numpy(joined(rows)))
        # Some chunks have a narrower form, and others none.
        turned = [self.converter.to_numpy(turn(self.converter.from_numpy(chunk))) for chunk in rows]
        return self.converter.from_numpy(joined(turned))

    @contextmanager
    def entered(self) -> Iterator[InfluenceFunctionModel[Any, Any]]:
        """The model, for this thread alone if it must be; solver warnings reach the client."""
        guard = nullcontext() if self.model.is_thread_safe else _one_at_a_time
        with guard, _solver_warnings_sent_to_client():
            yield self.model


@contextmanager
def _solver_warnings_sent_to_client() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SolverWarning)
        yield
    for one in caught:
        if issubclass(one.category, SolverWarning):
            warn(one.message, one.category)
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def joined(chunks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Chunks one below another; a single one as it is."""
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def factors_of_chunk(side: WorkerSide, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Factors of one chunk, `[t, P]`."""
    return solved_chunk(side, x, y)[0]


def left_of_chunk(side: WorkerSide, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """What `expanded` of the model takes, of one chunk: `[t, P]`, or `[t, K]` in a narrower form."""
    if len(x) == 0:
        return np.empty((0, side.model.n_parameters), side.dtype)
    with side.entered() as model:
        left = model.left(side.converter.from_numpy(x), side.converter.from_numpy(y))
    return side.converter.to_numpy(left).astype(side.dtype, copy=False)


def solved_chunk(side: WorkerSide, x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.void]]:
    """Factors of one chunk and how each of its solves ended, `[t]` of `REPORT_DTYPE`."""
    rows = np.zeros(len(x), REPORT_DTYPE)
    if len(x) == 0:
        return np.empty((0, side.model.n_parameters), side.dtype), rows
    with side.entered() as model:
        factors = model.influence_factors(side.converter.from_numpy(x), side.converter.from_numpy(y))
        report = model.solver_report
    if report is not None:
        rows["status"] = report.status.cpu().numpy()
        rows["iterations"] = report.iterations.cpu().numpy()
        rows["residual"] = report.residual.cpu().numpy()
    return side.converter.to_numpy(factors).astype(side.dtype, copy=False), rows


def region(
    side: WorkerSide,
    name: str,
    rows: Rows,
    chunks: Sequence[NDArray[Any]],
    x_chunks: Sequence[NDArray[Any]],
    y_chunks: Sequence[NDArray[Any]],
    mode: InfluenceMode,
) -> NDArray[Any]:
    """The group called `name` against a run of training chunks: `[t, n]`, in mode perturbation
    `[t, n, F...]`.

    `rows` says what its `chunks` hold; a left representation is scored in mode Up only.
    """
    x, y = joined(x_chunks), joined(y_chunks)
    t = sum(len(chunk) for chunk in chunks)
    dtype = chunks[0].dtype
    if t == 0 or len(x) == 0:
        features = x.shape[1:] if mode is InfluenceMode.Perturbation else ()
        return np.empty((t, len(x), *features), dtype)
    data = side.converter.from_numpy(x), side.converter.from_numpy(y)
    with side.entered() as model:
        if mode is InfluenceMode.Up:
            turn = model.left_of_factors if rows is Rows.FACTORS else model.expanded
            values = model.influences_from_left(side.group(name, chunks, turn), *data)
        else:
            values = model.influences_from_factors(side.group(name, chunks), *data, mode)
        return side.converter.to_numpy(values).astype(dtype, copy=False)


def self_influences_of_chunk(side: WorkerSide, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Each example's influence on itself, `[n]`."""
    if len(x) == 0:
        return np.empty(0, side.dtype)
    with side.entered() as model:
        values = model.self_influences(side.converter.from_numpy(x), side.converter.from_numpy(y))
        return side.converter.to_numpy(values).astype(side.dtype, copy=False)
