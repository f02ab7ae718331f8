"""Influences over Dask arrays that need not fit into memory.

Two phases: factors once per test chunk, as chunks of an array; then each training chunk is
differentiated once per GROUP of test chunks (not once per pair). Such a region is one chunk of the
result: the input's chunks along the training axis (short ones joined), groups of them along the test axis.

`chunk_tasks` is what a worker runs, `dask_graph` how the tasks hang together, `dask_checks` what is
refused before.

Shapes: T test examples, N training examples, P parameters, F... feature dimensions of x.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable
from typing import Any, Self
from uuid import uuid4

import dask.array as da
import numpy as np
from dask.delayed import Delayed, delayed
from distributed import Client, futures_of

from influence_calculator import chunk_tasks, dask_fit, dask_graph
from influence_calculator.array import NumpyConverter
from influence_calculator.base_influence_function_model import InfluenceFunctionModel, require_both_or_none
from influence_calculator.chunk_tasks import Rows
from influence_calculator.dask_checks import (
    require_aligned_pair,
    require_differentiable,
    require_factors,
    require_single_threads,
)
from influence_calculator.errors import NotFittedException
from influence_calculator.groups import DEFAULT_GROUP_BYTES, TASKS_PER_WORKER
from influence_calculator.types import InfluenceMode, as_mode

logger = logging.getLogger(__name__)


class DisableClientSingleThreadCheck:
    """Given in place of a client: no client is asked how many threads its workers run.

    For the synchronous scheduler, or where you know better:
    `calculator.influences(...).compute(scheduler="synchronous")`. A copy of the model that shares its
    tensors is then part of the graph.
    """

    @staticmethod
    def warning_msg() -> str:
        """What is logged when the check is off."""
        return (
            "The thread-safety check of the client's workers is off; use the synchronous scheduler or "
            "workers with one thread each"
        )


class DaskInfluenceCalculator:
    """Influences of chunked arrays on any Dask cluster.

    Args:
        influence_function_model: a fitted model (or one that is fitted before the first graph is built).
        converter: between numpy arrays and the model's tensors, on the worker's device.
        client: any `distributed.Client`; the model is sent to its workers once, when the first graph is
            built, and again only after the model changed.
            Or `DisableClientSingleThreadCheck`.

    Attributes:
        group_bytes: memory for the factors of one group of test chunks and their scores against one
            training chunk (default 1 GiB). Each worker holds about twice as much: the chunks, and the
            group put together, which stays until the calculator and its arrays are gone. Fewer bytes
            mean more groups; each further group differentiates the training data once more.

    Raises:
        ThreadSafetyViolationError: workers with several threads and a model that is not thread-safe.

    Example:
        ```python
        model = CgInfluence(network, loss, regularization=0.01).fit(train_loader)
        x, y = torch_dataset_to_dask_array(train_set, chunk_size=256)
        x_test, y_test = torch_dataset_to_dask_array(test_set, chunk_size=64)
        client = Client(n_workers=4, threads_per_worker=1)
        calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
        write_zarr(calculator.influences(x_test, y_test, x, y), "influences.zarr")
        ```
    """

    def __init__(
        self,
        influence_function_model: InfluenceFunctionModel[Any, Any],
        converter: NumpyConverter[Any],
        client: Client | type[DisableClientSingleThreadCheck],
    ) -> None:
        self.influence_function_model = influence_function_model
        self.numpy_converter = converter
        self.group_bytes = DEFAULT_GROUP_BYTES
        self._sent: tuple[InfluenceFunctionModel[Any, Any], Hashable, Delayed] | None = None
        self._client: Client | None = None
        self._tasks: float = math.inf
        if isinstance(client, Client):
            self._client = client
            workers = client.scheduler_info(n_workers=-1)["workers"]
            require_single_threads(workers, influence_function_model.is_thread_safe)
            self._tasks = TASKS_PER_WORKER * sum(worker["nthreads"] for worker in workers.values())
        elif client is DisableClientSingleThreadCheck:
            logger.warning(DisableClientSingleThreadCheck.warning_msg())
        else:
            raise ValueError(
                f"client: expected a distributed.Client or the type DisableClientSingleThreadCheck, got "
                f"{client!r}; create one with Client(threads_per_worker=1)"
            )

    @property
    def n_parameters(self) -> int:
        """P: number of parameters that the factors have a column for."""
        return self.influence_function_model.n_parameters

    def fit(self, x: da.Array, y: da.Array) -> Self:
        """Fits the model to the training examples (x, y) on the workers, chunk by chunk, now, and returns
        this calculator.

        As the model's own `fit` but for rounding; the numbers do not depend on the number of workers. A
        worker holds one chunk and a few times the sums over the training data (of EK-FAC, matrices as wide
        as a layer's inputs and outputs). Chunks are read once per pass of the method; persist them where
        reading costs more than memory.

        Raises:
            ValueError: no synchronous client; a model that reads its training data whenever it solves (fit
                it with all of it); no training example; a model that cannot be differentiated example by
                example.
            UnknownChunksError, UnalignedChunksError, InvalidDimensionChunksError: as for `influences`.
        """
        require_aligned_pair(x, y)
        if self._client is None or self._client.asynchronous:
            raise ValueError(
                "client: expected a synchronous distributed.Client to fit on its workers, got "
                f"{self._client or DisableClientSingleThreadCheck.__name__}; or fit the model itself: "
                "model.fit(loader)"
            )
        dask_fit.fit(self.influence_function_model, self.numpy_converter, self._client, x, y)
        return self

    def influence_factors(self, x: da.Array, y: da.Array) -> da.Array:
        """Factors `z = (H + λI)^-1 g` of the examples (x, y), lazily: `[n, P]`, in x's chunks.

        Raises:
            NotFittedException, UnknownChunksError, UnalignedChunksError, InvalidDimensionChunksError:
                when the graph is built.
        """
        self._require_fitted()
        require_aligned_pair(x, y)
        return dask_graph.rows_of(Rows.FACTORS, self._worker_side(), x, y, self.n_parameters, self._dtype)

    def influence_factors_and_report(self, x: da.Array, y: da.Array) -> tuple[da.Array, da.Array]:
        """Factors as `influence_factors`, and how each example's solve ended, from the same solves.

        Returns:
            Factors `[n, P]` and a structured array `[n]` with the fields `status` (a `SolverStatus`),
            `iterations` and `residual` (`‖r‖ / ‖b‖`). Compute both in one `dask.compute`.
        """
        self._require_fitted()
        require_aligned_pair(x, y)
        return dask_graph.factors_and_report(self._worker_side(), x, y, self.n_parameters, self._dtype)

    def influences(
        self,
        x_test: da.Array,
        y_test: da.Array,
        x: da.Array | None = None,
        y: da.Array | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> da.Array:
        """Influences of the training examples (x, y) on the test examples, lazily; without x and y, of
        the test examples on each other.

        Up: `z_test · g_train`, `[T, N]`; positive: the training example helps, removing it raises the
        test loss by about score / N. Perturbation: `∇x (z_test · g_train(x))`, `[T, N, F...]`. Neither
        is negated or divided by N. Chunks are x's along its axis (short ones are joined while every worker
        has two tasks), and whole groups of x_test's (see `group_bytes`) along the other; the dtype is the
        factors'. A test chunk is solved once, a training
        chunk differentiated once per group.

        Raises:
            NotFittedException, UnsupportedInfluenceModeException, UnknownChunksError,
            UnalignedChunksError, InvalidDimensionChunksError: when the graph is built.
            ValueError: one of x and y without the other; integer x in mode perturbation.
        """
        self._require_fitted()
        require_aligned_pair(x_test, y_test, "_test")
        require_both_or_none(x, y)
        mode = as_mode(mode)
        if x is None or y is None:
            x, y = x_test, y_test
        require_aligned_pair(x, y)
        require_differentiable(x, mode)
        side = self._worker_side()
        rows = Rows.LEFT if mode is InfluenceMode.Up else Rows.FACTORS
        test = dask_graph.rows_of(rows, side, x_test, y_test, self.n_parameters, self._dtype)
        return dask_graph.influences(side, rows, test, x, y, mode, self._limits)

    def influences_from_factors(
        self,
        z_test_factors: da.Array,
        x: da.Array,
        y: da.Array,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> da.Array:
        """Influences of (x, y) from factors `[T, P]`, lazily; shapes, sign, scale, chunks and errors as in
        `influences`. The dtype is the factors'.

        Raises:
            ValueError: x or y missing; factors that are not `[T, P]` floats.
        """
        self._require_fitted()
        if x is None or y is None:
            raise ValueError(
                "x and y: expected the training examples, got None; factors do not hold the examples they "
                "came from, so pass them: influences_from_factors(z_test_factors, x_test, y_test)"
            )
        require_factors(z_test_factors, self.n_parameters)
        require_aligned_pair(x, y)
        mode = as_mode(mode)
        require_differentiable(x, mode)
        side = self._worker_side()
        return dask_graph.influences(side, Rows.FACTORS, z_test_factors, x, y, mode, self._limits)

    @property
    def _limits(self) -> dask_graph.Limits:
        return dask_graph.Limits(self.group_bytes, self._tasks)

    def self_influences(self, x: da.Array, y: da.Array) -> da.Array:
        """Each example's influence on itself, `z_i · g_i`, lazily: `[n]`, in x's chunks.

        Costs what `influence_factors` costs, and no pair of examples is ever formed.

        Raises:
            NotFittedException, UnknownChunksError, UnalignedChunksError, InvalidDimensionChunksError:
                when the graph is built.
        """
        self._require_fitted()
        require_aligned_pair(x, y)
        return dask_graph.self_influences(self._worker_side(), x, y, self._dtype)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return self.influence_function_model.factor_dtype

    def _worker_side(self) -> Delayed:
        """The model where the workers find it: a node on them, or one that each graph takes along."""
        model = self.influence_function_model
        now = model.as_of_now()
        sent = self._sent
        if sent is None or sent[0] is not model or sent[1] != now or _is_lost(sent[2]):
            # What is sent to workers stays as it was sent; what is not sent must be made to.
            kept = model if self._client is not None else _as_it_is(model)
            side = chunk_tasks.WorkerSide(kept, self.numpy_converter, model.factor_dtype)
            if self._client is None:
                node = delayed(side, name=f"influence-model-{uuid4().hex}", traverse=False)
            else:
                node = dask_graph.sent(self._client, "influence-model", side)
            self._sent = sent = (model, now, node)
        return sent[2]

    def _require_fitted(self) -> None:
        if not self.influence_function_model.is_fitted:
            raise NotFittedException(type(self.influence_function_model))


def _is_lost(node: Delayed) -> bool:
    """Whether the workers lost what was sent for good, as when a client restarts them."""
    return any(future.status in ("cancelled", "lost") for future in futures_of(node))


def _as_it_is(model: InfluenceFunctionModel[Any, Any]) -> InfluenceFunctionModel[Any, Any]:
    """A copy that a later λ, fit or device leaves alone; the model itself if it cannot be copied.

    The copy builds solvers of its own, so that a dense factorization is held twice.
    """
    try:
        return model.at_rest()()
    except Exception as error:
        logger.warning(
            "The model cannot be copied (%s): a lazy result follows its changes until it is computed", error
        )
        return model
