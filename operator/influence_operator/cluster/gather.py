"""Collects what one pass may decide by: from the watches' cache, and from the network where that is needed.

Most of a snapshot costs nothing. Asked for are: the driver's `/progress` while its pod runs, the ConfigMap of
the task's source before an attempt is made, the warnings about children while the job is not ready, and
whatever was found in the way of a child last time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime

from influence_job.status import ConditionType
from influence_operator.cluster.api import Api
from influence_operator.cluster.cache import Cache, JobKey
from influence_operator.cluster.driver import DriverClient
from influence_operator.cluster.errors import ApiError
from influence_operator.cluster.events import Events
from influence_operator.cluster.kinds import CONFIG_MAP, INFLUENCE_JOB, KINDS
from influence_operator.cluster.memory import Memory
from influence_operator.decisions import observed
from influence_operator.decisions.driver import UNREAD_SECONDS
from influence_operator.decisions.snapshot import (
    Children,
    Conflict,
    DriverReport,
    Object,
    Snapshot,
)
from influence_operator.manifests.names import ATTEMPT, ROLE, Role

FRESH_SECONDS = 1.0
"""A driver that was asked so short a time ago is not asked again."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gatherer:
    """Makes snapshots."""

    api: Api
    cache: Cache
    events: Events
    drivers: DriverClient
    dask_operator: Callable[[], bool]
    clock: Callable[[], datetime] = field(kw_only=True)

    async def snapshot(self, key: JobKey, job: Object, memory: Memory) -> Snapshot:
        """Everything that a decision about `job` may depend on."""
        children = self.cache.children(key)
        conflicts, source, driver, warnings = await asyncio.gather(
            self._conflicts(key, memory.conflicts),
            self._source(key, job, children),
            self._driver(key, children, memory),
            self._warnings(key, job, children),
        )
        return Snapshot(
            job=job,
            children=children,
            now=self.clock(),
            driver=driver,
            conflicts=conflicts,
            refusals=memory.refusals,
            unretired=memory.unretired,
            source=source[0],
            missing=source[1],
            warnings=warnings,
            dask_operator=self.dask_operator(),
            looked=memory.looked,
        )

    async def _conflicts(self, key: JobKey, known: tuple[Conflict, ...]) -> tuple[Conflict, ...]:
        """Those that still stand in the way."""
        standing = []
        for conflict in known:
            kind = next(kind for kind in KINDS if kind.kind == conflict.kind)
            try:
                found = await self.api.get(kind, key.namespace, conflict.name)
            except ApiError as error:
                if not error.not_found:
                    raise
            else:
                if not owned_by(found, key.uid):
                    standing.append(conflict)
        return tuple(standing)

    async def _source(
        self, key: JobKey, job: Object, children: Children
    ) -> tuple[Object | None, tuple[str, ...]]:
        """The ConfigMap with the task's source and what is missing; read only when an attempt may start, or
        has lost its own copy.
        """
        name = _source_name(job)
        if name is None or job["spec"].get("suspend") or ended(job) or _has_driver_and_copy(children):
            return None, ()
        try:
            return await self.api.get(CONFIG_MAP, key.namespace, name), ()
        except ApiError as error:
            if not error.not_found:
                raise
            return None, (f"ConfigMap {name}",)

    async def _driver(self, key: JobKey, children: Children, memory: Memory) -> DriverReport | None:
        """What the running driver of the latest attempt says, or said a moment ago."""
        jobs = {job["metadata"]["uid"] for job in children.driver_jobs if owned_by(job, key.uid)}
        made = [pod for pod in children.pods if _role(pod) == Role.DRIVER and _controller(pod) in jobs]
        running = [pod for pod in made if pod.get("status", {}).get("phase") == "Running" and _address(pod)]
        if not running:
            memory.driver = None
            return None
        pod = max(running, key=lambda pod: (attempt(pod), pod["metadata"].get("creationTimestamp", "")))
        asked, last = time.monotonic(), memory.driver
        if last is None or asked >= last[0] + FRESH_SECONDS:
            report = await self.drivers.report(_address(pod), key.uid, attempt(pod))
            if report.problem and observed.ready(pod):
                report = self._dated(key, report, last, asked)
            memory.driver = last = asked, report
        return last[1]

    def _dated(
        self, key: JobKey, report: DriverReport, last: tuple[float, DriverReport] | None, asked: float
    ) -> DriverReport:
        """The report, with the time since when the driver could not be read; logged once, when it is told."""
        now = self.clock()
        since = (last[1].unread_since if last else None) or now
        silent = (now - since).total_seconds()
        if last and silent >= UNREAD_SECONDS > silent - (asked - last[0]):
            log.warning("%s: attempt %d: cannot read /progress: %s", key, report.attempt, report.problem)
        return replace(report, unread_since=since)

    async def _warnings(self, key: JobKey, job: Object, children: Children) -> tuple[Object, ...]:
        idle = ended(job) or job["spec"].get("suspend") or not children.driver_jobs
        if idle or condition(job, ConditionType.CLUSTER_READY):
            return ()
        return await self.events.warnings(key)


def owned_by(obj: Object, uid: str) -> bool:
    """Whether `uid` is an owner of the object."""
    return any(owner.get("uid") == uid for owner in obj["metadata"].get("ownerReferences") or ())


def attempt(obj: Object) -> int:
    """The attempt that a child belongs to; 0 when its label says nothing of use."""
    text = str((obj["metadata"].get("labels") or {}).get(ATTEMPT, ""))
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def condition(job: Object, kind: ConditionType) -> bool:
    """Whether a condition of the stored status is true."""
    conditions = (job.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == kind and c.get("status") == "True" for c in conditions)


def ended(job: Object) -> bool:
    """Complete or Failed."""
    return condition(job, ConditionType.COMPLETE) or condition(job, ConditionType.FAILED)


def _source_name(job: Object) -> str | None:
    assert job["kind"] == INFLUENCE_JOB.kind
    source = (job["spec"].get("task") or {}).get("source") or {}
    name = (source.get("configMap") or {}).get("name")
    return str(name) if name else None


def _has_driver_and_copy(children: Children) -> bool:
    """Whether an attempt whose driver Job has not ended has its copy of the source."""
    copies = {attempt(copy) for copy in children.config_maps}
    for job in children.driver_jobs:
        finished = any(
            c.get("type") in ("Complete", "Failed") and c.get("status") == "True"
            for c in (job.get("status") or {}).get("conditions") or ()
        )
        if not finished and not job["metadata"].get("deletionTimestamp"):
            return attempt(job) in copies
    return False


def _role(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get(ROLE, ""))


def _controller(obj: Object) -> str | None:
    owners = obj["metadata"].get("ownerReferences") or ()
    return next((owner.get("uid") for owner in owners if owner.get("controller")), None)


def _address(pod: Object) -> str:
    return str((pod.get("status") or {}).get("podIP") or "")
