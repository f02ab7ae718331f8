"""The Fitting stage on a worker: partial sums over a range of the training data, and finishing a unit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch

from influence_calculator.maths.method import SETTLED, FitPass, Sums
from influence_calculator.maths.objective import IndexedBatch, micro_batches
from influence_calculator.maths.training_batches import joined
from influence_job.errors import PermanentError, Reason
from influence_job.storage.ledger import Row
from influence_job.worker import tensor_file
from influence_job.worker.blame import blame, blaming
from influence_job.worker.fit_state import (
    FitReader,
    range_kind,
    settled_kind,
    store_partials,
    unit_kind,
    unit_path,
)
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import Session, WorkerContext, session


def fit_range(context: WorkerContext, step_name: str, index: int) -> Outcome:
    """Sums of one pass over range `index`, in order, into the store."""
    outcome = Outcome()
    kind = range_kind(step_name)

    def work() -> None:
        own = session(context)
        step = _step(own, step_name)
        start, stop = own.plan.fit_range(index)
        inputs = hashlib.blake2b(digest_size=16)
        batches = _digested(own.training_reads(start, stop), inputs, own.plan.micro_batch)
        with blaming(own, own.objective, "train", start, stop):
            sums = step.accumulate(own.objective, batches, own.fit_before(step_name))
        if not _is_finite(sums):
            raise blame(own, own.objective, "train", start, stop) or _overflow(start, stop)
        written = store_partials(own.store, step, index, sums, step.units(own.objective))
        outcome.report(Row(kind, index, _digest(written), inputs.hexdigest(), own.environment))

    outcome.attempt(kind, index, f"fit pass {step_name}, range {index}", work)
    return outcome


def fit_unit(context: WorkerContext, step_name: str, unit: int) -> Outcome:
    """Finishes one unit of a pass from its partial sums."""
    outcome = Outcome()
    kind = unit_kind(step_name)

    def work() -> None:
        own = session(context)
        step = _step(own, step_name)
        sums = FitReader(own.store, own.method, own.objective).sums(
            step, unit, own.plan.fit_ranges, own.device
        )
        name = step.units(own.objective)[unit]
        finished = step.finish(name, sums, own.length, own.fit_before(step_name))
        data = tensor_file.pack(finished)
        own.store.put(unit_path(step_name, unit), data)
        if SETTLED in finished and bool(finished[SETTLED]):
            # Before the unit's own row: who finds that one knows whether the series goes on.
            outcome.report(Row(settled_kind(step_name), unit, _digest([data]), "", own.environment))
        outcome.report(Row(kind, unit, _digest([data]), "", own.environment))

    outcome.attempt(kind, unit, f"fit pass {step_name}, unit {unit}", work)
    return outcome


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
    return all(bool(torch.isfinite(value).all()) for values in sums.values() for value in values.values())


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
    return next(step for step in own.method.passes() if step.name == name)
