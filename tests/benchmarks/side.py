"""What the sides with Dask share: the cluster and the arrays.

Runs in both virtual environments that have Dask: numpy, torch and Dask only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import clock
import dask.array as da
import numpy as np
import torch
from distributed import Client, LocalCluster
from torch.utils.data import DataLoader, TensorDataset
from workload import Workload

WORKERS = 2
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Inputs(NamedTuple):
    """The workload as a calculator takes it."""

    workload: Workload
    model: torch.nn.Module
    loader: DataLoader[tuple[torch.Tensor, ...]]
    arrays: tuple[da.Array, da.Array, da.Array, da.Array]
    """x_test, y_test, x, y in the workload's chunks."""
    method: str = ""
    """What the command line asks of a program that knows several."""
    seed: int = 0
    """Of what is drawn, another one in each repeat."""


Compute = Callable[[Client, Inputs], np.ndarray]
"""From an unfitted model to influences `[T, N]`."""


def main(imports: str, compute: Compute, exactly: Compute | None = None) -> None:
    """Measures `compute`, or `exactly` where the command line asks for it, on a cluster that is up."""
    options = clock.options()
    chosen = exactly if options.exact and exactly else compute
    os.environ.update(WORKER_ENVIRONMENT)
    with _cluster() as cluster, Client(cluster) as client:
        # The workers wait while this process fits, on all cores, as it does for anyone who sets nothing.
        clock.ready(imports, threads=WORKERS)
        client.run(clock.ready, imports, threads=1)
        options.measure(partial(_inputs, options), lambda inputs: chosen(client, inputs))


def _cluster() -> LocalCluster:
    return LocalCluster(n_workers=WORKERS, threads_per_worker=1, memory_limit=0, dashboard_address=None)


def _inputs(options: clock.Options, seed: int) -> Inputs:
    chunk = options.workload.chunk

    def chunked(tensor: torch.Tensor) -> da.Array:
        return da.from_array(tensor.numpy(), chunks=(chunk, *tensor.shape[1:]))

    model, (x, y), (x_test, y_test) = options.workload.load(options.folder)
    loader = DataLoader(TensorDataset(x, y), batch_size=chunk)
    arrays = (chunked(x_test), chunked(y_test), chunked(x), chunked(y))
    return Inputs(options.workload, model, loader, arrays, options.method, seed)
