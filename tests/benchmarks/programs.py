"""Running the sides of a comparison, and comparing their numbers. Used by `run` and `ekfac_comparison`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peer_environment import Peer
from workload import Workload

HERE = Path(__file__).parent
CORES = 2
HUNG_AFTER = 1200.0
"""Seconds of one process, several times what the slowest takes: pyDVL's workers were once seen to wait
for ever."""

Array = NDArray[np.float32]

Rounds = list[list[float]]
"""Seconds of each repeat, by process."""


@dataclass(frozen=True)
class Effort:
    """How much a run measures."""

    rounds: int
    """Processes of each side."""
    repeats: int
    """Within each process."""
    plain_repeats: int
    """Of the plain implementation, after one that does not count."""
    regions: int


@dataclass(frozen=True)
class Side:
    """One side's program on one workload."""

    program: str
    workload: Workload
    folder: Path
    python: Path = Path(sys.executable)

    def seconds(self, repeats: int, *arguments: str) -> list[float]:
        """Seconds of each repeat in a process of its own.

        Raises:
            subprocess.CalledProcessError: the program failed; what it said is on standard error.
            subprocess.TimeoutExpired: it hung.
        """
        given = [self.workload.name, self.folder, self._output(*arguments), "--repeats", repeats, *arguments]
        seconds: list[float] = json.loads(output(self.python, self.program, *given))
        return seconds

    def influences(self, *arguments: str) -> Array:
        """What each repeat of the latest process with these arguments found, `[R, T, N]`."""
        found: Array = np.load(self._output(*arguments))
        return found

    def _output(self, *arguments: str) -> Path:
        return self.folder / f"{self.workload.name}-{self.program}{''.join(arguments)}.npy"


def rounds_of_peer(peer: Peer, side: Side, repeats: int, *arguments: str) -> Rounds:
    """One process; none where it failed, which its own words on standard error explain."""
    try:
        return [side.seconds(repeats, *arguments)]
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as failure:
        print(f"{peer.name} failed on {side.workload.name}: {failure}", file=sys.stderr)
        return []


def output(python: Path, program: str, *arguments: Any) -> str:
    """The last line that a program of this folder prints."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [python, HERE / program, *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, cwd=HERE, env=environment, check=True, timeout=HUNG_AFTER,
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


def relative_error(found: Array, expected: Array) -> float:
    """`‖found − expected‖ / ‖expected‖`."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def correlation(found: Array, expected: Array) -> float:
    """Pearson's over all pairs of `[T, N]`, the mean of what each repeat in `found` has."""
    each = [np.corrcoef(repeat.ravel(), expected.ravel())[0, 1] for repeat in found]
    return float(np.mean(each))


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median on `CORES` threads, after one call that does not count."""
    torch.set_num_threads(CORES)
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
