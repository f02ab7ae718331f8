"""The whole status of a job, and whether it is worth a write.

Transitions are written at once. Progress is written when the whole percent or the workers changed, or after
30 s, and never within 5 s.
"""

from __future__ import annotations

from typing import Any

from influence_job.status import (
    AttemptsStatus,
    InfluenceJobStatus,
    ProgressStatus,
    WorkersStatus,
)
from influence_operator.decisions import progress as documents
from influence_operator.decisions.cluster_state import ClusterState
from influence_operator.decisions.conditions import conditions
from influence_operator.decisions.course import Course
from influence_operator.decisions.phase import phase
from influence_operator.decisions.view import View
from influence_operator.manifests.names import JOB_UID, ROLE, Role

OFTEN_SECONDS = 5.0
SELDOM_SECONDS = 30.0
_LESSER = ("progress", "progressed", "stages", "warnings")
"""Parts of the status that a running job changes all the time."""


def status_of(view: View, course: Course, cluster: ClusterState) -> InfluenceJobStatus:
    """The status after this pass."""
    stored = view.stored
    known = stored.attempts is not None and stored.attempts.current == course.number
    said = course.progress
    stage = said.stage if said else stored.stage if known else None
    complete = course.outcome is not None and course.outcome.complete
    result = stored.result or documents.result(said, view.spec.output.url) if complete else None
    return InfluenceJobStatus(
        observed_generation=view.generation,
        phase=phase(view, course, cluster, stage),
        stage=stage,
        stages=documents.stage_times(said) if said else stored.stages if known else [],
        progress=documents.progress_status(said, view.now) if said else stored.progress if known else None,
        workers=_workers(view, course),
        attempts=course.attempts if course.number else None,
        result=result,
        warnings=documents.warnings(said) if said else stored.warnings if known else [],
        start_time=course.start_time,
        completion_time=course.completion_time,
        active_seconds=course.active_seconds,
        waiting_since=course.waiting_since,
        progressed=course.progressed,
        cluster_incomplete_since=course.cluster_incomplete_since,
        conditions=conditions(view, course, cluster),
    )


def as_json(status: InfluenceJobStatus) -> dict[str, Any]:
    """As it is stored."""
    document: dict[str, Any] = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return document


def worth_writing(view: View, status: InfluenceJobStatus) -> bool:
    """Whether what changed without a transition is old enough, or new enough, to be written."""
    before, after = view.stored.progress, status.progress
    if before is None or after is None or before.updated is None:
        return True
    age = view.seconds_since(before.updated)
    if age < OFTEN_SECONDS:
        return False
    return age >= SELDOM_SECONDS or before.percent != after.percent or _ready(view.stored) != _ready(status)


def significant(status: InfluenceJobStatus) -> dict[str, Any]:
    """What is told of at once: everything but numbers that change all the time, and words."""
    attempts = status.attempts or AttemptsStatus()
    document = status.model_dump(exclude={*_LESSER, "attempts", "workers", "conditions"})
    return document | {
        "attempts": attempts.model_copy(update={"recorded": min(1, attempts.recorded)}),
        "desired": status.workers.desired if status.workers else None,
        "counts": status.progress is not None,
        "conditions": [(c.type, c.status, c.reason, c.observed_generation) for c in status.conditions],
    }


def same(stored: InfluenceJobStatus, status: InfluenceJobStatus) -> bool:
    """Whether both say the same, whenever they say it was found."""
    return _undated(stored) == _undated(status)


def _undated(status: InfluenceJobStatus) -> InfluenceJobStatus:
    progress = (status.progress or ProgressStatus()).model_copy(update={"updated": None})
    return status.model_copy(update={"progress": progress})


def _ready(status: InfluenceJobStatus) -> int:
    return status.workers.ready if status.workers else 0


def _workers(view: View, course: Course) -> WorkersStatus:
    ready = view.ready_workers(course.number) if course.open else 0
    desired = view.spec.workers.replicas
    return WorkersStatus(
        desired=desired,
        ready=ready,
        display="" if course.outcome else f"{ready}/{desired}",
        selector=f"{JOB_UID}={view.uid},{ROLE}={Role.WORKER.value}",
    )
