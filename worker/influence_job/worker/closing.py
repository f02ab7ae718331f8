"""The end of Scores and the Verifying stage on a worker: merging sinks, comparing what is stored."""

from __future__ import annotations

from collections.abc import Sequence

from influence_job.errors import PermanentError, Reason
from influence_job.storage import arrays, sink_arrays
from influence_job.storage.ledger import Row
from influence_job.worker.outcome import Outcome
from influence_job.worker.scores import INFLUENCES
from influence_job.worker.session import Session, WorkerContext, session

MERGE_KIND = "merge"
VERIFY_KIND = "verify"


def merge(context: WorkerContext, group: int) -> Outcome:
    """Merges the partial results of one group, in the order of the training chunks, into the root arrays."""
    outcome = Outcome()

    def work() -> None:
        own = session(context)
        digest = sink_arrays.merge_group(own.store, group, own.plan.train_chunks)
        outcome.report(Row(MERGE_KIND, group, digest, "", own.environment))

    outcome.attempt(MERGE_KIND, group, f"merging group {group}", work)
    return outcome


def verify(context: WorkerContext, indices: Sequence[int], digests: Sequence[str]) -> Outcome:
    """Reads regions back; the outcome's value lists those that differ from what the ledger says."""
    outcome = Outcome(value=[])

    def work() -> None:
        own = session(context)
        for index, expected in zip(indices, digests, strict=True):
            if _stored_digest(own, index) != expected:
                outcome.value.append(index)

    outcome.attempt(VERIFY_KIND, indices[0], "verifying regions", work)
    return outcome


def _stored_digest(own: Session, index: int) -> str:
    """Digest of a region as it reads now; empty if it is damaged or gone."""
    group, chunk = own.plan.unravel(index)
    try:
        if not own.plan.dense:
            return sink_arrays.partial_digest(own.store, group, chunk)
        return arrays.digest(arrays.read_chunk(own.store, INFLUENCES, own.plan.result_index(group, chunk)))
    except PermanentError as error:
        if error.reason is not Reason.STORE_CORRUPT:
            raise
        return ""
