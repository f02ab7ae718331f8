"""What all sides of a comparison share: the command line, the clock and the output.

Runs in every virtual environment: numpy and torch only. A side is a program of its own; it imports what it
needs in every process, then measures each repeat from unfitted model to influences in this process's memory.
The clock runs in the first repeat as in the others.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from workload import WORKLOADS, Workload

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Options:
    """What the command line asks of a side."""

    workload: Workload
    folder: Path
    output: Path
    repeats: int
    exact: bool
    """Without draws, so that the numbers can be compared with those of another implementation."""
    method: str
    """Of a program that knows several."""

    def measure(self, inputs: Callable[[int], Inputs], compute: Callable[[Inputs], np.ndarray]) -> None:
        """Computes from new `inputs(seed)` each time; writes seconds and influences `[R, T, N]`."""
        seconds, influences = [], []
        for repeat in range(self.repeats):
            given = inputs(repeat)
            start = time.perf_counter()
            influences.append(compute(given))
            seconds.append(time.perf_counter() - start)
        np.save(self.output, np.stack(influences))
        print(json.dumps(seconds))


def options() -> Options:
    """Of this program's command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("folder", type=Path, help="of the workload's file")
    parser.add_argument("output", type=Path, help="of the influences (.npy); seconds go to standard output")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--method", default="")
    given = parser.parse_args()
    workload = WORKLOADS[given.workload]
    return Options(workload, given.folder, given.output, given.repeats, given.exact, given.method)


def ready(module: str, threads: int) -> None:
    """Makes this process ready for the clock: imports what is measured, sets the number of threads."""
    importlib.import_module(module)
    torch.set_num_threads(threads)
    # A collection of all that the imports made takes as long as a repeat, and would hit some of them.
    gc.collect()
    gc.freeze()
