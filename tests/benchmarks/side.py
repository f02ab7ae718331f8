"""What the two sides of a comparison share: the cluster, the arrays and the clock.

Runs in both virtual environments: numpy, torch and Dask only. A side is a program of its own; it starts
the cluster, imports what it needs in every process, then measures each repeat from unfitted model to
influences in this process's memory. The clock runs in the first repeat as in the others.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import dask.array as da
import numpy as np
import torch
import workload
from distributed import Client, LocalCluster
from torch.utils.data import DataLoader, TensorDataset

WORKERS = 2
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Inputs(NamedTuple):
    """The workload as a calculator takes it."""

    model: torch.nn.Sequential
    loader: DataLoader[tuple[torch.Tensor, ...]]
    arrays: tuple[da.Array, da.Array, da.Array, da.Array]
    """x_test, y_test, x, y in chunks of 64 examples."""


Compute = Callable[[Client, Inputs], np.ndarray]
"""From an unfitted model to influences `[T, N]`."""


def main(imports: str, compute: Compute, exactly: Compute | None = None) -> None:
    """Measures `compute` as often as the command line says, and writes seconds and influences.

    With `--exact` it measures `exactly` instead.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", type=Path)
    parser.add_argument("output", type=Path, help="of the influences (.npy); seconds go to standard output")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--exact", action="store_const", const=exactly, default=compute, dest="compute")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(WORKER_ENVIRONMENT)
    with _cluster() as cluster, Client(cluster) as client:
        _import(imports)
        client.run(_import, imports)
        seconds, influences = [], np.empty(0)
        for _ in range(options.repeats):
            inputs = _inputs(options.workload)
            start = time.perf_counter()
            influences = options.compute(client, inputs)
            seconds.append(time.perf_counter() - start)
    np.save(options.output, influences)
    print(json.dumps(seconds))


def _cluster() -> LocalCluster:
    return LocalCluster(n_workers=WORKERS, threads_per_worker=1, memory_limit=0, dashboard_address=None)


def _import(name: str) -> None:
    importlib.import_module(name)
    torch.set_num_threads(1)
    # A collection of all that the imports made takes as long as a repeat, and would hit some of them.
    gc.collect()
    gc.freeze()


def _inputs(path: Path) -> Inputs:
    def chunked(tensor: torch.Tensor) -> da.Array:
        return da.from_array(tensor.numpy(), chunks=(workload.CHUNK, *tensor.shape[1:]))

    model, (x, y), (x_test, y_test) = workload.load(path)
    loader = DataLoader(TensorDataset(x, y), batch_size=workload.CHUNK)
    return Inputs(model, loader, (chunked(x_test), chunked(y_test), chunked(x), chunked(y)))
