"""The decision about a job whose spec cannot be read: it stalls, and what runs of it goes on."""

from __future__ import annotations

from datetime import datetime

from influence_job.status import Condition, ConditionType, InfluenceJobStatus, Phase
from influence_operator.decisions.conditions import Statement, timed
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.view import stored_condition

_REPLACED = (ConditionType.READY, ConditionType.RECONCILING, ConditionType.STALLED)


def stalled_status(
    stored: InfluenceJobStatus, problem: str, generation: int, now: datetime
) -> InfluenceJobStatus:
    """The stored status, stalled with the field's name. A result that is there stays one."""
    if _holds(stored, ConditionType.COMPLETE):
        return stored.model_copy(update={"observed_generation": generation})
    statements = (
        Statement(ConditionType.READY, False, Reason.INVALID_SPEC, problem),
        Statement(ConditionType.STALLED, True, Reason.INVALID_SPEC, problem),
    )
    told = [timed(s, stored_condition(stored, s.kind), generation, now) for s in statements]
    kept = [condition for condition in stored.conditions if condition.type not in _REPLACED]
    failed = _holds(stored, ConditionType.FAILED)
    return stored.model_copy(
        update={
            "observed_generation": generation,
            "phase": Phase.FAILED if failed else Phase.PENDING,
            "conditions": _bounded([*told, *kept]),
        }
    )


def _holds(stored: InfluenceJobStatus, kind: ConditionType) -> bool:
    condition = stored_condition(stored, kind)
    return condition is not None and condition.status == "True"


def _bounded(conditions: list[Condition]) -> list[Condition]:
    return conditions[: len(ConditionType)]
