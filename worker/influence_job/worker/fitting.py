"""A pass over the training data on a worker: partial sums over a range of it, and finishing a unit.

The Fitting stage is made of such passes, and so is solving where the method solves by passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from torch import Tensor

from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.method import SETTLED, FitPass, Sums
from influence_calculator.maths.objective import IndexedBatch, micro_batches
from influence_calculator.maths.training_batches import joined
from influence_job.errors import PermanentError, Reason
from influence_job.storage.ledger import Row
from influence_job.worker import tensor_file
from influence_job.worker.blame import blame, blaming
from influence_job.worker.fit_state import (
    range_kind,
    settled_kind,
    solving_step_before,
    store_partials,
    unit_kind,
    unit_path,
)
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import Session, WorkerContext, session


def fit_range(context: WorkerContext, step_name: str, first: int, row: int) -> Outcome:
    """Sums of one pass over a range, in order, into the store; its rows in the ledger begin at `first`."""
    outcome = Outcome()
    kind, index = range_kind(step_name), row - first

    def work() -> None:
        own = session(context)
        step = _step(own, step_name)
        start, stop = own.plan.fit_range(index)
        inputs = hashlib.blake2b(digest_size=16)
        batches = _digested(own.training_reads(start, stop), inputs, own.plan.micro_batch)
        with blaming(own, own.objective, "train", start, stop):
            sums = step.accumulate(own.objective, batches, own.fit_before(step))
        if not _is_finite(sums):
            _refuse(own, step, start, stop)
        written = store_partials(own.store, step, index, sums, step.units(own.objective))
        digest = _digest(written)
        outcome.report(Row(kind, row, digest, inputs.hexdigest(), own.environment))

    outcome.attempt(kind, row, f"pass {step_name}, range {index}", work)
    return outcome


def fit_unit(context: WorkerContext, step_name: str, first: int, row: int) -> Outcome:
    """Finishes one unit of a pass from its partial sums; its rows in the ledger begin at `first`."""
    outcome = Outcome()
    kind, unit = unit_kind(step_name), row - first

    def work() -> None:
        own = session(context)
        step = _step(own, step_name)
        sums = own.fit_reader.sums(step, unit, own.plan.fit_ranges, own.device)
        name = step.units(own.objective)[unit]
        finished = step.finish(name, sums, own.length, own.fit_before(step))
        keep_unit(own, outcome, step_name, row, unit_path(step_name, unit), finished)

    outcome.attempt(kind, row, f"pass {step_name}, unit {unit}", work)
    return outcome


def keep_unit(
    own: Session,
    outcome: Outcome,
    step: str,
    row: int,
    path: str,
    finished: dict[str, Tensor],
    inputs: str = "",
) -> None:
    """Stores what a pass leaves of one unit, and reports it as that row."""
    data = tensor_file.pack(finished)
    own.store.put(path, data)
    digest = _digest([data])
    if SETTLED in finished and bool(finished[SETTLED]):
        # Before the unit's own row: who finds that one knows whether the series goes on.
        outcome.report(Row(settled_kind(step), row, digest, "", own.environment))
    outcome.report(Row(unit_kind(step), row, digest, inputs, own.environment))


def _refuse(own: Session, step: FitPass, start: int, stop: int) -> None:
    """Names the example that made sums of a range infinite or NaN; refuses such sums without one, if the pass
    has no use for them.
    """
    found = blame(own, own.objective, "train", start, stop)
    if found is not None:
        raise found
    if not step.takes_any_sums:
        raise _overflow(start, stop)


def _digested(
    reads: Iterator[tuple[IndexedBatch, str]], inputs: hashlib.blake2b, micro_batch: int
) -> Iterator[IndexedBatch]:
    """The micro-batches of what is read, whose digests go into `inputs` on the way.

    Chunks shorter than a micro-batch are joined: tiny ones would pay for nothing but their bookkeeping.
    """

    def pieces() -> Iterator[IndexedBatch]:
        for indexed, digest in reads:
            inputs.update(digest.encode())
            yield from micro_batches(indexed, micro_batch)

    yield from joined(pieces(), micro_batch)


def _is_finite(sums: Sums) -> bool:
    return all(
        bool(finite_rows(value.reshape(1, -1)).all()) for values in sums.values() for value in values.values()
    )


def _overflow(start: int, stop: int) -> PermanentError:
    return PermanentError(
        Reason.NOT_FINITE,
        f"train examples {start} to {stop - 1}: every gradient is finite and their sum is not; scale the "
        f"loss down, or take a model in float64",
    )


def _digest(objects: Iterable[bytes]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for data in objects:
        state.update(data)
    return state.hexdigest()


def _step(own: Session, name: str) -> FitPass:
    before = solving_step_before(name)
    if before is not None:
        return own.solver.solving_pass(name, before)
    return next(step for step in own.method.passes() if step.name == name)
