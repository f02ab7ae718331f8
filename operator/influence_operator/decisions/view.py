"""A snapshot as the policies read it: parsed spec, stored status, and the children sorted by attempt.

Made once per pass by `decide`. What a policy decides on lies here or in the `Course`, never in the raw
snapshot: children that another owner made are left out already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cached_property

from pydantic import ValidationError

from influence_job.progress import Progress
from influence_job.spec import InfluenceJobSpec
from influence_job.status import Condition, ConditionType, InfluenceJobStatus
from influence_operator.decisions import observed
from influence_operator.decisions.snapshot import Children, Object, Snapshot
from influence_operator.manifests import names
from influence_operator.manifests.names import Role

LOST_SECONDS = 60.0
"""A pod still Terminating so long after its grace period is lost: its kubelet does not answer."""
_OWNED = ("config_maps", "network_policies", "driver_jobs", "dask_clusters")
"""Children that the operator makes itself and that therefore name the job as their owner."""
_NONE = Children()


@dataclass(frozen=True)
class View:
    """What a pass sees of one job."""

    snapshot: Snapshot
    spec: InfluenceJobSpec
    stored: InfluenceJobStatus
    """As the last pass left it."""
    now: datetime
    """UTC, whole seconds, which is what Kubernetes' own times have."""
    refusal: str = ""
    """Why the job's spec cannot be carried out; `spec` then is the one that the latest attempt began with."""

    @cached_property
    def name(self) -> str:
        return observed.name(self.snapshot.job)

    @cached_property
    def uid(self) -> str:
        return observed.uid(self.snapshot.job)

    @cached_property
    def generation(self) -> int:
        return generation(self.snapshot.job)

    @cached_property
    def attempts(self) -> Mapping[int, Children]:
        """Our children by attempt number."""
        return by_attempt(self.snapshot.children, self.uid)

    @cached_property
    def latest(self) -> int:
        """The highest attempt of which a child is there that we made: labels alone are anybody's to set."""
        made = (n for n, children in self.attempts.items() if any(getattr(children, k) for k in _OWNED))
        return max(made, default=0)

    def base(self, attempt: int) -> str:
        """The name of an attempt's children."""
        return names.base_name(self.name, self.uid, attempt)

    def of(self, attempt: int) -> Children:
        """The children of one attempt."""
        return self.attempts.get(attempt, _NONE)

    def driver_job(self, attempt: int) -> Object | None:
        return _named(self.of(attempt).driver_jobs, self.base(attempt))

    def cluster(self, attempt: int) -> Object | None:
        return _named(self.of(attempt).dask_clusters, self.base(attempt))

    def worker_group(self, attempt: int) -> Object | None:
        return _named(self.of(attempt).worker_groups, names.worker_group_name(self.base(attempt)))

    def pods(self, attempt: int, role: Role) -> list[Object]:
        """The pods of a role. A driver's are those of our Job alone: what they say ends the job."""
        pods = [pod for pod in self.of(attempt).pods if observed.label(pod, names.ROLE) == role.value]
        if role is Role.DRIVER:
            jobs = [observed.uid(job) for job in self.of(attempt).driver_jobs]
            pods = [pod for pod in pods if observed.owned_by(pod, jobs)]
        return pods

    def ready_workers(self, attempt: int) -> int:
        return sum(map(observed.ready, self.pods(attempt, Role.WORKER)))

    def worker_deployments(self, attempt: int) -> list[Object]:
        """The Deployments that dask-kubernetes made for our worker group and that are to stay."""
        groups = [observed.uid(group) for group in self.of(attempt).worker_groups]
        return [
            deployment
            for deployment in self.of(attempt).deployments
            if observed.owned_by(deployment, groups) and not observed.being_deleted(deployment)
        ]

    def report(self, attempt: int) -> Progress | None:
        """What the driver of that attempt says of itself now."""
        report = self.snapshot.driver
        if report is None or report.attempt != attempt or report.progress is None:
            return None
        return of_this_job(report.progress, self.uid, attempt)

    def condition(self, kind: ConditionType) -> Condition | None:
        """The stored condition of that type."""
        return stored_condition(self.stored, kind)

    def seconds_since(self, then: datetime | None) -> float:
        """Seconds from `then` to now, at least 0; 0 for None."""
        return seconds_between(then, self.now)

    def lost(self, pod: Object) -> bool:
        """Whether its kubelet has been asked to end it and never said that it did."""
        return self.seconds_since(observed.deleted(pod)) >= LOST_SECONDS


def of_this_job(progress: Progress, uid: str, attempt: int) -> Progress | None:
    """The document, unless it speaks of another job or attempt."""
    return progress if progress.job_uid == uid and progress.attempt == attempt else None


def seconds_between(then: datetime | None, now: datetime) -> float:
    """Seconds from `then` to `now`, at least 0; 0 when `then` is no time."""
    then = observed.in_utc(then) if then else None
    return max(0.0, (now - then).total_seconds()) if then else 0.0


def generation(job: Object) -> int:
    """Raised by the API server with every change of the spec."""
    return max(0, observed.whole(job, "metadata", "generation") or 0)


def stored_condition(status: InfluenceJobStatus, kind: ConditionType) -> Condition | None:
    """The condition of that type, whatever its status."""
    return next((c for c in status.conditions if c.type == kind.value), None)


def stored_status(job: Object) -> InfluenceJobStatus:
    """The status as stored; parts that somebody else made unreadable read as absent."""
    raw = observed.look(job, "status")
    if not isinstance(raw, Mapping):
        return InfluenceJobStatus()
    try:
        return InfluenceJobStatus.model_validate(raw)
    except ValidationError:
        return InfluenceJobStatus.model_validate({k: v for k, v in raw.items() if _readable(k, v)})


def _readable(key: object, value: object) -> bool:
    try:
        InfluenceJobStatus.model_validate({key: value})
    except ValidationError:
        return False
    return isinstance(key, str)


def by_attempt(children: Children, job_uid: str) -> dict[int, Children]:
    """The children that are this job's, by the attempt on their label."""
    sorted_: defaultdict[int, dict[str, list[Object]]] = defaultdict(lambda: defaultdict(list))
    for kind in fields(Children):
        for child in getattr(children, kind.name):
            attempt = observed.attempt_of(child)
            if attempt and (kind.name not in _OWNED or observed.owned_by(child, [job_uid])):
                sorted_[attempt][kind.name].append(child)
    return {n: Children(**{k: tuple(v) for k, v in kinds.items()}) for n, kinds in sorted_.items()}


def _named(things: tuple[Object, ...], name: str) -> Object | None:
    return next((thing for thing in things if observed.name(thing) == name), None)
