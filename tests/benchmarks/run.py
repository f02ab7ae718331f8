"""`make bench`: how fast the calculators and a whole job are, as ratios measured in one run.

Each side of a comparison is a program of its own on the same two cores; a side's numbers must agree with
the plain implementation, so that a fast wrong answer fails. Exit code 1: a target was missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import plain_cg
import plain_direct
import torch
from ekfac_comparison import COMPARISONS
from findings import Finding, table
from peer_environment import PYDVL
from programs import CORES, Effort, Side, output, relative_error, rounds_of_peer
from workload import CG_REGULARIZATION, CG_RTOL, DIGITS, FEW_PARAMETERS

MIB = 2**20
CONTRACT = Path(__file__).parents[1] / "contract"

FULL = Effort(rounds=3, repeats=5, plain_repeats=3, regions=100_000)
QUICK = Effort(rounds=1, repeats=3, plain_repeats=1, regions=2_000)


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
        for name in options.only or BENCHMARKS:
            print(f"running {name}", file=sys.stderr, flush=True)
            findings += BENCHMARKS[name](Path(folder), effort)
    print(table(findings))
    if options.output:
        options.output.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    if not all(finding.reached for finding in findings):
        raise SystemExit(1)


def conjugate_gradients(folder: Path, effort: Effort) -> list[Finding]:
    """W1 with conjugate gradients: ours on two one-thread workers, a plain one on two threads."""
    DIGITS.prepare(folder)
    side = Side("our_cg.py", DIGITS, folder)
    ours = side.seconds(2)
    model, train, test = DIGITS.load(folder)
    torch.set_num_threads(CORES)
    seconds, expected = [], np.empty(0, np.float32)
    for _ in range(2):
        start = time.perf_counter()
        solution = plain_cg.plain_cg(model, train, test, CG_REGULARIZATION, CG_RTOL)
        seconds.append(time.perf_counter() - start)
        expected = solution.influences.numpy()
    ratio = statistics.median(ours) / statistics.median(seconds)
    error = relative_error(side.influences()[-1], expected)
    return [
        Finding("CG: ours", statistics.median(ours), "s"),
        Finding("CG: plain implementation in memory, 2 threads", statistics.median(seconds), "s"),
        Finding("CG: ours / plain", ratio, "×", "≤ 3", ratio <= 3),
        Finding("CG: error of ours", error, "", "≤ 1e-2", error <= 1e-2),
    ]


def solvers(folder: Path, effort: Effort) -> list[Finding]:
    """Solving with the Hessian of a model of few parameters, pyDVL's way and ours."""
    FEW_PARAMETERS.prepare(folder)
    loaded = FEW_PARAMETERS.load(folder)
    expected = plain_direct.plain_direct(*loaded, FEW_PARAMETERS.regularization).numpy()
    ours = Side("our_hessian.py", FEW_PARAMETERS, folder)
    pydvl = Side("pydvl_hessian.py", FEW_PARAMETERS, folder, PYDVL.ensured())
    findings: list[Finding] = []
    for method, label, least in (("direct", "Direct", 2), ("cg", "CG to a residual", 10)):
        arguments = ("--method", method)
        seconds = statistics.median(ours.seconds(effort.repeats, *arguments))
        rounds = rounds_of_peer(PYDVL, pydvl, min(2, effort.repeats), *arguments)
        theirs = statistics.median(rounds[0]) if rounds else None
        ratio = theirs / seconds if theirs else None
        of_ours = relative_error(ours.influences(*arguments)[-1], expected)
        of_pydvl = relative_error(pydvl.influences(*arguments)[-1], expected) if rounds else None
        reached = ratio is not None and ratio >= least
        findings += [
            Finding(f"{label}: ours", seconds, "s"),
            Finding(f"{label}: pyDVL", theirs, "s"),
            Finding(f"{label}: pyDVL / ours", ratio, "×", f"≥ {least}", reached),
            Finding(f"{label}: error of ours", of_ours, "", "≤ 1e-3", of_ours <= 1e-3),
            Finding(f"{label}: error of pyDVL", of_pydvl, ""),
        ]
    return findings


def signatures(folder: Path, effort: Effort) -> list[Finding]:
    """Takes the signatures anew, from pyDVL's own environment, that a contract test compares ours with."""
    del folder, effort
    snapshot = CONTRACT / "pydvl_signatures.json"
    taken = subprocess.run(
        [PYDVL.ensured(), CONTRACT / "snapshot_pydvl.py"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    changed = taken != snapshot.read_text()
    snapshot.write_text(taken)
    return [Finding("signatures: pyDVL's snapshot has changed", float(changed), "", "= 0", not changed)]


def regions(folder: Path, effort: Effort) -> list[Finding]:
    """W4: a job of many tiny regions."""
    arguments = [folder / "regions.zarr", "--regions", str(effort.regions), "--workers", str(CORES)]
    found = json.loads(output(Path(sys.executable), "our_regions.py", *arguments))
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
    **{name: comparison.run for name, comparison in COMPARISONS.items()},
    "cg": conjugate_gradients,
    "solvers": solvers,
    "signatures": signatures,
    "regions": regions,
}


if __name__ == "__main__":
    main()
