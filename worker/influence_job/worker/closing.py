"""The end of Scores and the Verifying stage on a worker: merging sinks, comparing what is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from influence_job.errors import PermanentError, Reason
from influence_job.storage import sink_arrays
from influence_job.storage.ledger import Row
from influence_job.worker import factors, scores, self_influences, training_gradients
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import Session, WorkerContext, session

MERGE_KIND = "merge"
VERIFY_KIND = "verify"
STORED_DIGESTS: dict[str, Callable[[Session, int], str]] = {
    module.KIND: module.stored_digest for module in (factors, scores, self_influences, training_gradients)
}
"""Kind of the rows that a result is made of -> the digest of one as it is stored."""


def merge(context: WorkerContext, group: int) -> Outcome:
    """Merges the partial results of one group, in the order of the training chunks, into the root arrays."""
    outcome = Outcome()

    def work() -> None:
        own = session(context)
        digest = sink_arrays.merge_group(own.store, group, own.plan.train_chunks)
        outcome.report(Row(MERGE_KIND, group, digest, "", own.environment))

    outcome.attempt(MERGE_KIND, group, f"merging group {group}", work)
    return outcome


def verify(context: WorkerContext, kind: str, indices: Sequence[int], digests: Sequence[str]) -> Outcome:
    """Reads what rows of a kind stand for back; the outcome's value lists those that differ from what the
    ledger says.
    """
    outcome = Outcome(value=[])

    def work() -> None:
        own = session(context)
        for index, expected in zip(indices, digests, strict=True):
            if _stored_digest(own, kind, index) != expected:
                outcome.value.append(index)

    outcome.attempt(VERIFY_KIND, indices[0], f"verifying {kind}", work)
    return outcome


def _stored_digest(own: Session, kind: str, index: int) -> str:
    """Digest of the result's part as it reads now; empty if it is damaged or gone."""
    try:
        return STORED_DIGESTS[kind](own, index)
    except PermanentError as error:
        if error.reason is not Reason.STORE_CORRUPT:
            raise
        return ""
