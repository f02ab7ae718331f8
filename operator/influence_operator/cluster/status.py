"""Writes the status of a job, once per pass at most, and progress no faster than the API server should bear.

Server-side apply under our field manager, with the UID and the resource version that the decision saw as
preconditions: a status that was decided on something older is refused and decided anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from influence_operator.cluster.api import Api
from influence_operator.cluster.cache import Cache, JobKey
from influence_operator.cluster.kinds import INFLUENCE_JOB
from influence_operator.cluster.memory import Memory
from influence_operator.decisions.actions import Decision
from influence_operator.decisions.snapshot import Object


class Rate:
    """Grants so many turns per second; what was not used is saved up for one second."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._most = max(1.0, per_second)
        self._clock = clock
        self._turns = self._most
        self._at = clock()

    def wait(self) -> float:
        """Takes a turn and returns 0, or returns the seconds until there will be one."""
        now = self._clock()
        self._turns = min(self._most, self._turns + (now - self._at) * self._per_second)
        self._at = now
        if self._turns < 1.0:
            return (1.0 - self._turns) / self._per_second
        self._turns -= 1.0
        return 0.0


class StatusWriter:
    """Writes what decisions want the status to be."""

    def __init__(self, api: Api, cache: Cache, progress: Rate) -> None:
        self._api = api
        self._cache = cache
        self._progress = progress

    def wait(self, job: Object, decision: Decision, memory: Memory) -> float | None:
        """Seconds until the status is to be written, mostly 0; None if it is what it should be."""
        stored, wanted = job.get("status") or {}, decision.status
        # The second test holds when the API server stores something else than it was sent (a default, a
        # pruned field): without it every pass would write, and every write bring a pass.
        if stored == wanted or memory.written == (wanted, stored):
            return None
        return 0.0 if decision.urgent or decision.status_first else self._progress.wait()

    async def write(self, key: JobKey, job: Object, status: Mapping[str, Any], memory: Memory) -> None:
        """Writes the status.

        Raises:
            ClusterError: it was not written; a conflict means that the job changed meanwhile.
        """
        metadata = job["metadata"]
        body = {
            "apiVersion": INFLUENCE_JOB.api_version,
            "kind": INFLUENCE_JOB.kind,
            "metadata": {
                "name": key.name,
                "namespace": key.namespace,
                "uid": key.uid,
                "resourceVersion": metadata["resourceVersion"],
            },
            "status": status,
        }
        stored = await self._api.apply_status(INFLUENCE_JOB, key.namespace, key.name, body)
        self._cache.put(INFLUENCE_JOB, stored)
        memory.written = (status, stored.get("status") or {})
