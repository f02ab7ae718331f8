"""Operation SelfInfluence on a worker: each training example of a chunk against itself, into the store."""

from __future__ import annotations

from influence_calculator.maths import region
from influence_job.storage import arrays
from influence_job.storage.ledger import Row
from influence_job.worker.factors import as_array, differentiated, solve, store_report
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import Session, WorkerContext, session

KIND = "self"
SELF_INFLUENCES = "self_influences"
"""The array's name."""


def compute_self_influences(context: WorkerContext, ended: str | None, index: int) -> Outcome:
    """Solves one training chunk for its own gradients and stores `z_i · g_i`, coordinates and the report.

    `ended` is the last of the passes that solved it, if passes did.
    """
    outcome = Outcome()

    def work() -> None:
        own = session(context)
        gradients, inputs = differentiated(own, index, annotated=True)
        solved = solve(own, gradients, ended)
        store_report(own, index, solved.report)
        values = as_array(region.self_influences(solved.left, gradients))
        digest = arrays.write_chunk(own.store, SELF_INFLUENCES, (index,), values)
        outcome.value = (*own.fitted.notes, *solved.report.notes)
        outcome.report(Row(KIND, index, digest, inputs, own.environment))

    outcome.attempt(KIND, index, f"self-influences of training chunk {index}", work)
    return outcome


def stored_digest(own: Session, index: int) -> str:
    """What the ledger's digest of a chunk would be, as the chunk reads now."""
    return arrays.digest(arrays.read_chunk(own.store, SELF_INFLUENCES, (index,)))
