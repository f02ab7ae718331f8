"""Gradients of training examples in the store, in the coordinates in which the method scores.

TrainingGradients writes them once; each job with InfluencesFromGradients reads them in place of the examples.
"""

from __future__ import annotations

import hashlib

from influence_calculator.maths.layout import Left
from influence_job.storage import arrays
from influence_job.storage.ledger import Row
from influence_job.worker.factors import as_array, differentiated, read_rows, stored_rows, write_rows
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import Session, WorkerContext, session

KIND = "gradients"


def gradient_path(block: int) -> str:
    """The array of one block's gradients, dimensions train and column."""
    return f"gradients/{block}"


def compute_gradients(context: WorkerContext, index: int) -> Outcome:
    """Differentiates one chunk of training examples and stores gradients and coordinates."""
    outcome = Outcome()

    def work() -> None:
        own = session(context)
        gradients, inputs = differentiated(own, index, annotated=True)
        digests = []
        for number, block in enumerate(own.layout.blocks):
            digests += write_rows(own, gradient_path(number), number, index, gradients.pop(block))
        outcome.value = own.fitted.notes
        outcome.report(Row(KIND, index, arrays.joined_digest(digests), inputs, own.environment))

    outcome.attempt(KIND, index, f"gradients of training chunk {index}", work)
    return outcome


def stored_digest(own: Session, index: int) -> str:
    """What the ledger's digest of a chunk would be, as the chunk reads now."""
    return arrays.joined_digest(stored_rows(own, gradient_path, index))


def load_gradients(own: Session, start: int, stop: int) -> tuple[Left, str]:
    """Stored gradients of training examples `start` to `stop`, on the host, and their digest."""
    state = hashlib.blake2b(digest_size=16)
    loaded: Left = {}
    for number, block in enumerate(own.layout.factor_widths):
        rows = read_rows(own, own.fit_store, gradient_path(number), block, start, stop)
        state.update(arrays.digest(as_array(rows)).encode())
        loaded[block] = rows
    return loaded, state.hexdigest()
