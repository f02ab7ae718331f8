"""A job that stands half done at a gate, to be killed at, and what must hold of it afterwards.

Used by `tests/cluster/test_kills.py`. What was computed twice, and by whom, is read from the bucket's request
log, never from what the job says of itself.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import stored
from cluster_jobs import REGIONS, STORE, ClusterJob

Rows = set[tuple[str, int]]
_COMPUTED = re.compile(rf"^{STORE}/(influences/c|factors/\d+/c|fit/|partials/|most_\w+/c|score_\w+/c)")
_LEDGER = re.compile(rf"^{STORE}/ledger/\d")
WORKERS = 2


@dataclass(frozen=True)
class Place:
    """Where a gate stands, in the way of the last rows of some kinds."""

    path: str
    """Of the objects whose writers wait."""
    kinds: tuple[str, ...]
    total: int
    """Rows of these kinds in a finished ledger."""
    several: bool = False
    """Whether more than one worker can stand there."""


REGION = Place(r"^influences/c/0/(9|1\d)$", ("region",), REGIONS, several=True)
PLACES = {
    "fit": Place(r"^fit/correction/partial/([5-9]|10)/", ("fit/correction/range",), 11, several=True),
    "factors": Place(r"^factors/\d+/c/2/", ("factors",), 3),
    "region": REGION,
    "last": Place(r"^(most|score)_\w+/c/", ("region", "merge"), REGIONS + 1),
}
"""The moments of `chaos` in `cluster_jobs.BASE`."""


@dataclass
class Half:
    """A job at its gate: some rows are in the ledger, and not all."""

    job: ClusterJob
    place: Place
    undisturbed: dict[str, bytes]
    held: Rows = field(default_factory=set)
    killed: set[str] = field(default_factory=set)
    """Addresses of processes that ended, without grace or with their attempt: others must do the rest."""
    newcomers: set[str] = field(default_factory=set)
    """Addresses of processes that came in the place of killed ones and must have written something."""
    mark: int = 0
    """Length of the bucket's log at the kill."""

    def reached(self, seconds: float = 180) -> Half:
        """Waits until the job stands at the gate, and its ledger holds what was done before it."""
        self.job.at_gate(seconds=seconds)
        deadline = time.monotonic() + 30
        while not self._count(held := self.job.held()):
            assert time.monotonic() < deadline, self.job.cluster.describe(self.job.namespace)
            time.sleep(0.3)
        assert self._count(held) < self.place.total, "the gate did not hold the job"
        self.held, self.mark = held, len(self.job.bucket.log())
        return self

    def known_to_the_operator(self) -> None:
        """Waits until the operator has heard that rows were recorded."""

        def heard() -> bool:
            return bool(self.job.status.get("attempts", {}).get("recorded"))

        self.job.wait_until(heard, "the operator to hear of rows", 40)

    # -- killing --------------------------------------------------------------------------------

    def kill(self, role: str, count: int = 1) -> list[str]:
        """Deletes pods of a role without grace, first those that stand at the gate; returns their names."""
        here = self.job.standing()
        pods = [pod for pod in self.job.pods(role) if _ready(pod)]
        pods = sorted(pods, key=lambda pod: address(pod) not in here)[:count]
        assert len(pods) == count, f"{count} {role} expected\n{self.job.cluster.describe(self.job.namespace)}"
        names = [str(pod["metadata"]["name"]) for pod in pods]
        self.killed |= {address(pod) for pod in pods}
        self.job.kubectl("delete", "pods", *names, "--grace-period=0", "--force")
        self.mark = len(self.job.bucket.log())
        return names

    def replaced(self, role: str, count: int = 1, seconds: float = 90) -> None:
        """Waits until others run in the place of the killed."""

        def there() -> bool:
            self.job.not_failed()
            return len(self._others(role)) >= count

        self.job.wait_until(there, f"{count} {role} in the place of the killed", seconds)

    def replaced_at_the_gate(self, old: set[str], seconds: float = 90) -> None:
        """Waits until a worker that is none of the `old` stands at the gate."""

        def there() -> set[str]:
            self.job.not_failed()
            return self.job.standing(since=self.mark) - old

        self.newcomers = self.job.wait_until(there, "a new worker at the gate", seconds)

    def workers(self) -> set[str]:
        """Addresses of the workers that run."""
        return {address(pod) for pod in self.job.pods("worker") if _ready(pod)}

    def _others(self, role: str) -> set[str]:
        return {address(pod) for pod in self.job.pods(role) if _ready(pod)} - self.killed

    # -- what must hold then --------------------------------------------------------------------

    def finishes(self, counted_failures: int = 0, attempt: int = 1, seconds: float = 240) -> None:
        """Opens the gate; the job completes with the undisturbed result, and nothing held was redone."""
        self.job.open_gate()
        self.finished(counted_failures, attempt, seconds)

    def finished(self, counted_failures: int = 0, attempt: int = 1, seconds: float = 240) -> None:
        """The job completes, and others than the killed did what was left."""
        self.job.complete(seconds)
        assert stored.differing(self.job.result(), self.undisturbed) == []
        writes = self.job.writes_of(self.held)
        assert writes, "the request log tells of what the ledger held"
        again = {path: n for path, n in writes.items() if n > 1}
        assert not again, f"the ledger held these, and they were written again: {again}"
        assert self.job.attempt == attempt, self.job.status["attempts"]
        assert self.job.counted_failures == counted_failures, self.job.status["attempts"]
        assert self.writers(_COMPUTED) - self.killed, "the killed did all that was left"
        assert not self.newcomers or self.newcomers & self.writers(_COMPUTED), "the new process did nothing"
        assert self.writers(_LEDGER), "what was left was recorded"

    def writers(self, matching: re.Pattern[str]) -> set[str]:
        """Addresses of those who have written such objects since the kill."""
        log = self.job.bucket.log()[self.mark :]
        return {r.client for r in log if r.action == "PUT" and r.reached and matching.search(r.object_name)}

    def recorded_by_others(self) -> None:
        """Another driver than the killed one wrote the ledger's last rows."""
        assert self.writers(_LEDGER) - self.killed, "the killed driver alone wrote the ledger"

    def _count(self, held: Rows) -> int:
        counts = Counter(kind for kind, _ in held)
        return sum(counts[kind] for kind in self.place.kinds)


def address(pod: dict[str, Any]) -> str:
    """Of a pod; empty while it has none."""
    return str(pod["status"].get("podIP", ""))


def _ready(pod: dict[str, Any]) -> bool:
    statuses = pod["status"].get("containerStatuses", [])
    return bool(statuses) and all(status["ready"] for status in statuses)
