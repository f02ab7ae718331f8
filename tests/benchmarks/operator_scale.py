"""Second half of `make bench`: what many jobs cost on the test cluster, in requests, time and memory.

The measurements are those of `tests/support/scale.py`, which the tests run smaller. They count requests per
namespace and take turns with tests that run at the same time; times and memory want an idle machine. Exit
code 1: a target was missed. Needs the test cluster's host, for its audit log, and PYTHONPATH=tests/support.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from findings import Finding, table

import chart
import cluster_storage
import scale
from api_requests import Requests, by_verb, writes
from cluster import HOME, Cluster, prepare
from cluster_storage import ClusterStorage
from host_tests import CLUSTER_VARIABLE
from scale import FULL, SMALL, Side, Sizes
from turns import turn

LOCKS = HOME / "tests"
MIB = 2**20
MOST_REQUESTS = 10
"""Per job until it has its children."""
MOST_GROWTH = 16
"""MiB of the operator for all foreign pods."""


def main() -> None:
    """Runs what was asked for, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="of the figures, as JSON")
    parser.add_argument("--quick", action="store_true", help="the sizes of the tests")
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="default: all")
    options = parser.parse_args()
    if CLUSTER_VARIABLE in os.environ:
        sys.exit(
            f"{CLUSTER_VARIABLE} is set: requests are counted from the audit log of `make cluster`; unset it"
        )
    prepare()
    cluster = Cluster.connect()
    with turn(LOCKS, alone=False):
        chart.install(cluster)
        cluster_storage.install(cluster)
    storage = ClusterStorage(cluster)
    findings: list[Finding] = []
    try:
        for name in options.only or MEASUREMENTS:
            print(f"running {name}", file=sys.stderr, flush=True)
            with turn(LOCKS, alone=name == "resting"):
                findings += MEASUREMENTS[name](cluster, storage, SMALL if options.quick else FULL)
    finally:
        storage.close()
    print(table(findings))
    if options.output:
        options.output.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    if not all(finding.reached for finding in findings):
        raise SystemExit(1)


def waiting(cluster: Cluster, storage: ClusterStorage, sizes: Sizes) -> list[Finding]:
    """Jobs created at once whose pods no node accepts."""
    found = scale.waiting(cluster, sizes.waiting)
    each = found.until_children.total() / found.jobs
    before, after = (memory / MIB for memory in found.memory)
    idle = writes(found.while_waiting).total()
    return [
        Finding("Waiting: jobs", found.jobs, ""),
        Finding("Waiting: first job to last child", found.seconds, "s"),
        Finding("Waiting: job to its last child, median", scale.median(found.delays), "s"),
        Finding("Waiting: job to its last child, longest", found.delays[-1], "s"),
        Finding(
            "Waiting: requests per job until children", each, "", f"≤ {MOST_REQUESTS}", each <= MOST_REQUESTS
        ),
        *_per_job("Waiting: until children", found.until_children, found.jobs),
        *_per_job("Waiting: until the cause is told", found.until_settled, found.jobs),
        Finding(f"Waiting: requests in {scale.WATCHED_SECONDS:g} s after", found.while_waiting.total(), ""),
        Finding(f"Waiting: writes in {scale.WATCHED_SECONDS:g} s after", idle, "", "0", idle == 0),
        Finding("Waiting: operator's share of a core", 100 * found.processor, "%"),
        Finding("Waiting: operator's memory before", before, "MiB"),
        Finding("Waiting: operator's memory with the jobs", after, "MiB"),
    ]


def resting(cluster: Cluster, storage: ClusterStorage, sizes: Sizes) -> list[Finding]:
    """Suspended and finished jobs while the operator is started anew."""
    found = scale.resting(cluster, sizes.suspended, sizes.finished)
    written = writes(found.restart).total()
    return [
        Finding("Restart: suspended and finished jobs", found.jobs, ""),
        Finding("Restart: writes", written, "", "0", written == 0),
        Finding("Restart: requests about their namespace", found.restart.total(), ""),
        Finding("Restart: new operator's memory", found.memory / MIB, "MiB"),
    ]


def foreign(cluster: Cluster, storage: ClusterStorage, sizes: Sizes) -> list[Finding]:
    """Pods that are none of ours."""
    found = scale.foreign(cluster, sizes.foreign)
    before, after = (memory / MIB for memory in found.memory)
    growth = after - before
    return [
        Finding("Foreign: pods", found.pods, ""),
        Finding("Foreign: requests about them", found.requests.total(), "", "0", not found.requests),
        Finding("Foreign: pod events told to the operator", found.told, ""),
        Finding("Foreign: operator's memory before", before, "MiB"),
        Finding("Foreign: growth of it", growth, "MiB", f"≤ {MOST_GROWTH}", growth <= MOST_GROWTH),
    ]


def running(cluster: Cluster, storage: ClusterStorage, sizes: Sizes) -> list[Finding]:
    """Jobs that run to their end."""
    return _side("InfluenceJobs", scale.running(cluster, storage, sizes.running))


def dask_jobs(cluster: Cluster, storage: ClusterStorage, sizes: Sizes) -> list[Finding]:
    """The same work as DaskJobs."""
    return _side("DaskJobs", scale.running_dask_jobs(cluster, storage, sizes.running))


Measurement = Callable[[Cluster, ClusterStorage, Sizes], list[Finding]]
MEASUREMENTS: dict[str, Measurement] = {
    "waiting": waiting,
    "resting": resting,
    "foreign": foreign,
    "running": running,
    "dask_jobs": dask_jobs,
}


def _side(name: str, found: Side) -> list[Finding]:
    return [
        Finding(f"{name}: jobs of one worker, side by side", found.jobs, ""),
        Finding(f"{name}: first job to end of the last", found.seconds, "s"),
        Finding(f"{name}: requests per job, both operators", found.requests / found.jobs, ""),
        *_per_job(f"{name}: of our operator", found.ours, found.jobs),
        *_per_job(f"{name}: of the dask operator", found.theirs, found.jobs),
    ]


def _per_job(name: str, requests: Requests, jobs: int) -> list[Finding]:
    verbs: Counter[str] = by_verb(requests)
    return [Finding(f"{name}, {verb} per job", number / jobs, "") for verb, number in sorted(verbs.items())]


if __name__ == "__main__":
    main()
