"""A fit on the workers: every pass over the training data is a sum over chunks, made one by one.

The sums of neighbouring chunks are added in pairs, so that the numbers depend on the chunks and not on who
computes them. What a pass leaves is finished unit by unit (layer by layer, say), on any worker, and goes
through the client to all of them, as the fitted model will.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any

import dask.array as da
import numpy as np
from dask.delayed import Delayed, delayed
from distributed import Client
from numpy.typing import NDArray

from influence_calculator.array import NumpyConverter
from influence_calculator.base_influence_function_model import FitsInParts, InfluenceFunctionModel
from influence_calculator.chunk_tasks import WorkerSide
from influence_calculator.dask_graph import sent
from influence_calculator.maths.method import FitPass, is_due
from influence_calculator.maths.one_by_one import PROBED

Arrays = Mapping[str, NDArray[Any]]
"""Sums of one unit, or what a pass leaves of it."""

State = dict[str, dict[str, Arrays]]
"""Pass -> unit -> arrays: a `FitState` as it travels."""


def fit(
    model: InfluenceFunctionModel[Any, Any],
    converter: NumpyConverter[Any],
    client: Client,
    x: da.Array,
    y: da.Array,
) -> None:
    """Fits `model` to the training examples (x, y), in aligned chunks, on the client's workers.

    Raises:
        ValueError: a model that is not fitted in parts, or no training example.
    """
    if not isinstance(model, FitsInParts):
        raise ValueError(
            f"influence_function_model: expected one that is fitted in parts, got {type(model).__name__}; "
            f"call its own fit"
        )
    if not len(x):
        raise ValueError("x: expected at least one training example, got none")
    first = client.gather(client.compute([x[:PROBED], y[:PROBED]]))
    passes = model.begin_fit(*map(converter.from_numpy, first))
    side = sent(client, "influence-model", WorkerSide(model, converter, model.factor_dtype))
    state: State = {}
    for step in passes:
        if not is_due(step, state):
            continue
        known = sent(client, "influence-fit", state)
        sums = [
            _task(chunk_sums, side, step, known, start, *chunk)
            for start, size, *chunk in zip([0, *accumulate(x.chunks[0])], x.chunks[0], _chunks(x), _chunks(y))
            if size
        ]
        total = _added(sums)
        left = {
            unit: _task(finished, side, step, known, unit, _task(itemgetter(unit), total), len(x))
            for unit in model.fit_units(step)
        }
        state[step.name] = client.compute(delayed(left)).result()
        if step.follows is not None:
            del state[step.follows]
    model.end_fit(_tensors(converter, state))


def chunk_sums(
    side: WorkerSide, step: FitPass, state: State, start: int, x: NDArray[Any], y: NDArray[Any]
) -> dict[str, Arrays]:
    """A pass's sums over one chunk, whose first example has the index `start`, by unit."""
    converter = side.converter
    with side.entered() as model:
        assert isinstance(model, FitsInParts)
        known = side.converted(state, lambda: _tensors(converter, state))
        batch = map(converter.from_numpy, (x, y))
        return {
            unit: _arrays(converter, sums)
            for unit, sums in model.fit_sums(step, known, start, *batch).items()
        }


def added(first: dict[str, Arrays], second: dict[str, Arrays]) -> dict[str, Arrays]:
    """The sums of two ranges."""
    return {
        unit: {name: np.asarray(value + second[unit][name]) for name, value in sums.items()}
        for unit, sums in first.items()
    }


def finished(side: WorkerSide, step: FitPass, state: State, unit: str, sums: Arrays, length: int) -> Arrays:
    """What a pass leaves of one unit, from its sums over all `length` examples."""
    converter = side.converter
    with side.entered() as model:
        assert isinstance(model, FitsInParts)
        total = {name: converter.from_numpy(value.copy()) for name, value in sums.items()}
        own = {name: {unit: units[unit]} for name, units in state.items() if unit in units}
        return _arrays(converter, model.fitted_unit(step, unit, total, length, _tensors(converter, own)))


def _added(sums: Sequence[Delayed]) -> Delayed:
    """The sum of neighbours, then of neighbouring pairs, and so on."""
    while len(sums) > 1:
        pairs = [_task(added, *sums[i : i + 2]) for i in range(0, len(sums) - 1, 2)]
        sums = [*pairs, *sums[2 * len(pairs) :]]
    return sums[0]


def _task(function: Any, *arguments: Any) -> Delayed:
    return delayed(function, pure=False, traverse=False)(*arguments)


def _chunks(array: da.Array) -> list[Delayed]:
    chunks: list[Delayed] = array.to_delayed().ravel().tolist()
    return chunks


def _arrays(converter: NumpyConverter[Any], tensors: Mapping[str, Any]) -> Arrays:
    return {name: converter.to_numpy(value) for name, value in tensors.items()}


def _tensors(converter: NumpyConverter[Any], state: State) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        name: {
            unit: {key: converter.from_numpy(value) for key, value in arrays.items()}
            for unit, arrays in units.items()
        }
        for name, units in state.items()
    }
