"""`make bench`: how fast the calculators and a whole job are, as ratios measured in one run.

Each side of a comparison is a program of its own on the same two cores; a side's numbers must agree with
the plain implementation, so that a fast wrong answer fails. Exit code 1: a target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import physical_bound
import plain_cg
import plain_ekfac
import pydvl_environment
import torch
import workload
from findings import Finding, table
from numpy.typing import NDArray

HERE = Path(__file__).parent
CORES = 2
MIB = 2**20

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Effort:
    """How much a run measures."""

    rounds: int
    """Processes of our side of EK-FAC."""
    pydvl_rounds: int
    repeats: int
    """Within each of our processes."""
    regions: int


FULL = Effort(rounds=3, pydvl_rounds=2, repeats=5, regions=100_000)
QUICK = Effort(rounds=1, pydvl_rounds=1, repeats=3, regions=2_000)


def main() -> None:
    """Runs what was asked for, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="of the figures, as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and 2000 regions")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="default: all")
    options = parser.parse_args()
    effort = QUICK if options.quick else FULL
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="influence-bench-") as folder:
        workload.prepare(Path(folder) / "workload.npz")
        for name in options.only or BENCHMARKS:
            print(f"running {name}", file=sys.stderr, flush=True)
            findings += BENCHMARKS[name](Path(folder), effort)
    print(table(findings))
    if options.output:
        options.output.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    if not all(finding.reached for finding in findings):
        raise SystemExit(1)


def ekfac(folder: Path, effort: Effort) -> list[Finding]:
    """W1 with EK-FAC: ours, pyDVL's, a plain implementation and the physical bound."""
    pydvl = pydvl_environment.ensured()
    ours: list[list[float]] = []
    theirs: list[float] = []
    for number in range(effort.rounds):
        ours.append(_side(Path(sys.executable), "our_ekfac.py", folder, effort.repeats))
        if number < effort.pydvl_rounds:
            theirs += _side(pydvl, "pydvl_ekfac.py", folder, 1)
    model, train, test = workload.load(folder / "workload.npz")

    def plain(exact: bool) -> torch.Tensor:
        return plain_ekfac.plain_ekfac(model, train, test, workload.REGULARIZATION, exact)

    reference, expected = _median_seconds(lambda: plain(exact=False)), plain(exact=True).numpy()
    bound = physical_bound.physical_bound(
        [physical_bound.Layer(i + 1, o) for i, o in pairwise(workload.WIDTHS)],
        workload.TRAIN,
        workload.TEST,
        workload.CHUNK,
        physical_bound.measured_rate(CORES),
        physical_bound.measured_bandwidth(),
    )
    _side(Path(sys.executable), "our_ekfac.py", folder, 1, "--exact")
    exact = relative_error(_influences(folder, "our_ekfac.py--exact"), expected)
    sampled = correlation(_influences(folder, "our_ekfac.py"), expected)
    seconds = statistics.median(chain.from_iterable(ours))
    first = statistics.median(repeats[0] for repeats in ours)
    slowdown = min(theirs) / seconds
    return [
        Finding("EK-FAC: ours", seconds, "s"),
        Finding("EK-FAC: ours, first use in a process", first, "s"),
        Finding("EK-FAC: pyDVL 0.10", min(theirs), "s"),
        Finding("EK-FAC: plain implementation in memory, 2 threads", reference, "s"),
        Finding("EK-FAC: physical bound, 2 cores", bound, "s"),
        Finding("EK-FAC: pyDVL / ours", slowdown, "×", "≥ 25", slowdown >= 25),
        Finding("EK-FAC: pyDVL / ours, first use", min(theirs) / first, "×"),
        Finding("EK-FAC: ours / plain", seconds / reference, "×"),
        Finding("EK-FAC: ours / bound", seconds / bound, "×"),
        Finding("EK-FAC: error of ours, exact expectation", exact, "", "≤ 1e-3", exact <= 1e-3),
        Finding("EK-FAC: correlation of ours, sampled, with exact", sampled, "", "≥ 0.95", sampled >= 0.95),
        Finding(
            "EK-FAC: correlation of pyDVL with exact",
            correlation(_influences(folder, "pydvl_ekfac.py"), expected),
            "",
        ),
    ]


def conjugate_gradients(folder: Path, effort: Effort) -> list[Finding]:
    """W1 with conjugate gradients: ours on two one-thread workers, a plain one on two threads."""
    ours = _side(Path(sys.executable), "our_cg.py", folder, 2)
    model, train, test = workload.load(folder / "workload.npz")
    torch.set_num_threads(CORES)
    seconds, expected = [], np.empty(0, np.float32)
    for _ in range(2):
        start = time.perf_counter()
        solution = plain_cg.plain_cg(model, train, test, workload.CG_REGULARIZATION, workload.CG_RTOL)
        seconds.append(time.perf_counter() - start)
        expected = solution.influences.numpy()
    ratio = statistics.median(ours) / statistics.median(seconds)
    error = relative_error(_influences(folder, "our_cg.py"), expected)
    return [
        Finding("CG: ours", statistics.median(ours), "s"),
        Finding("CG: plain implementation in memory, 2 threads", statistics.median(seconds), "s"),
        Finding("CG: ours / plain", ratio, "×", "≤ 3", ratio <= 3),
        Finding("CG: error of ours", error, "", "≤ 1e-2", error <= 1e-2),
    ]


def regions(folder: Path, effort: Effort) -> list[Finding]:
    """W4: a job of many tiny regions."""
    arguments = [folder / "regions.zarr", "--regions", str(effort.regions), "--workers", str(CORES)]
    found = json.loads(_output(Path(sys.executable), "our_regions.py", *arguments))
    each = 1000 * found["stages"]["Scores"] / effort.regions
    growth = found["memory_growth"] / MIB
    error = found["largest_error"]
    return [
        Finding("Job: regions", effort.regions, ""),
        Finding("Job: first submission to last flush, per region", each, "ms", "≤ 5", each <= 5),
        Finding("Job: everything, per region", 1000 * found["seconds"] / effort.regions, "ms"),
        Finding("Job: driver's memory from region 1000", growth, "MiB", "< 50", growth < 50),
        Finding("Job: largest error", error, "", "≤ 1e-4", error <= 1e-4),
    ]


BENCHMARKS: dict[str, Callable[[Path, Effort], list[Finding]]] = {
    "ekfac": ekfac,
    "cg": conjugate_gradients,
    "regions": regions,
}


def relative_error(found: Array, expected: Array) -> float:
    """`‖found − expected‖ / ‖expected‖`."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def correlation(found: Array, expected: Array) -> float:
    """Pearson's, over all pairs."""
    return float(np.corrcoef(found.ravel(), expected.ravel())[0, 1])


def _side(python: Path, program: str, folder: Path, repeats: int, *arguments: str) -> list[float]:
    """Seconds of each repeat of one side in a process of its own."""
    output = folder / f"{program}{''.join(arguments)}.npy"
    files = [folder / "workload.npz", output, "--repeats", str(repeats)]
    seconds: list[float] = json.loads(_output(python, program, *files, *arguments))
    return seconds


def _influences(folder: Path, name: str) -> Array:
    found: Array = np.load(folder / f"{name}.npy")
    return found


def _output(python: Path, program: str, *arguments: Any) -> str:
    """The last line that a program of this folder prints."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [python, HERE / program, *arguments],
        stdout=subprocess.PIPE, text=True, cwd=HERE, env=environment, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


def _median_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The median on `CORES` threads, after one call that does not count."""
    torch.set_num_threads(CORES)
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
