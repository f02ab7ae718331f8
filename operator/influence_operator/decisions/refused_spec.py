"""A job whose spec cannot be carried out: it stalls, and what runs of it goes on as it began.

Suspending it counts nevertheless, as do the deadlines that its latest attempt began with.
"""

from __future__ import annotations

from datetime import datetime

from influence_job.spec import InfluenceJobSpec
from influence_job.status import Condition, ConditionType, InfluenceJobStatus, Phase
from influence_operator.decisions import observed
from influence_operator.decisions.conditions import Statement, timed
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.snapshot import Snapshot
from influence_operator.decisions.view import by_attempt, stored_condition
from influence_operator.manifests.config_map import kept_spec

_REPLACED = (ConditionType.READY, ConditionType.RECONCILING, ConditionType.STALLED)


def spec_begun_with(snapshot: Snapshot) -> InfluenceJobSpec | None:
    """The spec that the latest attempt of which a ConfigMap is there began with, and today's `suspend`."""
    attempts = by_attempt(snapshot.children, observed.uid(snapshot.job))
    copies = [attempts[number].config_maps for number in sorted(attempts) if attempts[number].config_maps]
    begun = kept_spec(copies[-1][0]) if copies else None
    if begun is None:
        return None
    return begun.model_copy(update={"suspend": observed.look(snapshot.job, "spec", "suspend") is True})


def stalled_status(
    stored: InfluenceJobStatus, problem: str, generation: int, now: datetime
) -> InfluenceJobStatus:
    """The status of a job of which nothing runs: the stored one, stalled with the field's name. A result that
    is there stays one.
    """
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
