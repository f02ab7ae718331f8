"""Kubernetes Events: one for each transition between two statuses, none for what stays as it is."""

from __future__ import annotations

from collections.abc import Iterator

from influence_job.status import AttemptsStatus, ConditionType, InfluenceJobStatus
from influence_operator.decisions.actions import Event
from influence_operator.decisions.cluster_state import ClusterState
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.view import stored_condition

MOST_BYTES = 1024
"""Of a message; the API server refuses a longer one."""


def transitions(
    old: InfluenceJobStatus, new: InfluenceJobStatus, cluster: ClusterState | None
) -> tuple[Event, ...]:
    """What happened between the two."""
    told = [*_attempts(old, new), *_conditions(old, new), *_scaled(old, new)]
    if cluster:
        told += _cluster(old, cluster)
    return tuple(Event(event.type, event.reason, _cut(event.message)) for event in told)


def _attempts(old: InfluenceJobStatus, new: InfluenceJobStatus) -> Iterator[Event]:
    before, after = old.attempts or AttemptsStatus(), new.attempts or AttemptsStatus()
    ended = after.ended is not None and before.ended is None
    failed = after.last_reason not in (Reason.SUSPENDED, Reason.COMPLETE, None)
    if ended and failed:
        said = f"attempt {after.current} ended: {after.last_reason}: {after.last_message}"
        yield Event("Warning", Reason.ATTEMPT_ENDED, said)
    if after.current > before.current and after.ended is None:
        yield Event("Normal", Reason.ATTEMPT_STARTED, f"attempt {after.current} started")


def _conditions(old: InfluenceJobStatus, new: InfluenceJobStatus) -> Iterator[Event]:
    for condition in new.conditions:
        before = stored_condition(old, ConditionType(condition.type))
        changed = before is None or before.status != condition.status
        holds = condition.status == "True"
        match condition.type:
            case ConditionType.COMPLETE if changed:
                yield Event("Normal", condition.reason, condition.message)
            case ConditionType.FAILED if changed:
                yield Event("Warning", condition.reason, condition.message)
            case ConditionType.STALLED if changed or (before and before.reason != condition.reason):
                if not _has(new, ConditionType.FAILED):
                    yield Event("Warning", condition.reason, condition.message)
            case ConditionType.SUSPENDED if changed and (holds or condition.reason == Reason.RESUMED):
                yield Event("Normal", condition.reason, condition.message)
            case ConditionType.READY if changed and condition.reason == Reason.RUNNING:
                yield Event("Normal", Reason.RUNNING, "preflight has passed")


def _cluster(old: InfluenceJobStatus, cluster: ClusterState) -> Iterator[Event]:
    before = stored_condition(old, ConditionType.CLUSTER_READY)
    was_ready = before is not None and before.status == "True"
    if cluster.ready and not was_ready:
        yield Event("Normal", Reason.CLUSTER_READY, cluster.message)
    if cluster.wrong and (before is None or before.reason != cluster.reason):
        yield Event("Warning", cluster.reason, cluster.message)


def _scaled(old: InfluenceJobStatus, new: InfluenceJobStatus) -> Iterator[Event]:
    if old.workers and new.workers and old.workers.desired != new.workers.desired:
        said = f"workers: {old.workers.desired} before, {new.workers.desired} now"
        yield Event("Normal", Reason.SCALED, said)


def _has(status: InfluenceJobStatus, kind: ConditionType) -> bool:
    return stored_condition(status, kind) is not None


def _cut(message: str) -> str:
    return message.encode()[:MOST_BYTES].decode(errors="ignore")
