"""The Scores stage on a worker: one group of test rows against a run of training chunks, as a pipeline.

While a region is computed, an I/O thread reads the next training chunk and another writes the previous
region. A region is reported only after its PUT returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.layout import Left
from influence_job.plan import Plan
from influence_job.storage import arrays, sink_arrays
from influence_job.storage.ledger import Row, indices_since
from influence_job.storage.sinks import Partial
from influence_job.worker.blame import not_finite
from influence_job.worker.factors import load_group
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import Session, WorkerContext, session
from influence_job.worker.training_side import training_side

KIND = "region"
INFLUENCES = "influences"
"""The dense array's name."""


@dataclass
class _Written:
    """A region on its way into the store."""

    index: int
    inputs: str
    put: Future[str]


def compute_regions(context: WorkerContext, group: int, chunks: Sequence[int], segment: int) -> Outcome:
    """Computes and stores the regions of `group` and the training chunks `chunks`, in order.

    A region that the ledger holds in segment `segment` or a later one is left out. When a worker vanishes,
    Dask runs its task again as it was submitted, and what the first run finished must not be computed twice.
    """
    outcome = Outcome()
    with ThreadPoolExecutor(1, "influence-read") as reads, ThreadPoolExecutor(1, "influence-write") as writes:
        pipeline = _Pipeline(context, group, list(chunks), segment, outcome, reads, writes)
        pipeline.run()
    return outcome


@dataclass
class _Pipeline:
    context: WorkerContext
    group: int
    chunks: list[int]
    segment: int
    outcome: Outcome
    reads: ThreadPoolExecutor
    writes: ThreadPoolExecutor
    _next: Future[tuple[Any, str]] | None = None
    _previous: _Written | None = None

    def run(self) -> None:
        first = context_region(self.context, self.group, self.chunks[0])
        if not self.outcome.attempt(KIND, first, self._name(self.chunks[0]), self._open):
            return
        for position, chunk in enumerate(self.chunks):
            index = self.plan.region(self.group, chunk)
            if not self.outcome.attempt(KIND, index, self._name(chunk), partial(self._step, position)):
                break
        failure = self.outcome.failure
        previous = self._previous
        if previous is not None:
            self.outcome.failure = None
            self.outcome.attempt(KIND, previous.index, f"region {previous.index}", self._settle)
            self.outcome.failure = failure or self.outcome.failure

    def _name(self, chunk: int) -> str:
        return f"region of group {self.group} and training chunk {chunk}"

    @property
    def plan(self) -> Plan:
        assert self.context.plan is not None
        return self.context.plan

    def _open(self) -> None:
        self.own: Session = session(self.context)
        self.side = training_side(self.own)
        self.chunks = self._not_done()
        self.left: Left = self.own.group(self.group, lambda g: load_group(self.own, g))
        self._prefetch(0)

    def _not_done(self) -> list[int]:
        # One small request when nothing was begun, as nearly always; a region's existence proves nothing.
        if not sink_arrays.has_partial(self.own.store, self.group, self.chunks[0]):
            return self.chunks
        done = indices_since(self.own.store, self.context.epoch, self.segment, KIND)
        return [chunk for chunk in self.chunks if self.plan.region(self.group, chunk) not in done]

    def _prefetch(self, position: int) -> None:
        self._next = None
        if position < len(self.chunks):
            self._next = self.reads.submit(self.side.read, self.chunks[position])

    def _step(self, position: int) -> None:
        chunk = self.chunks[position]
        assert self._next is not None
        pending, self._next = self._next, None
        content, inputs = pending.result()
        self._prefetch(position + 1)
        values = self.side.scores(self.left, chunk, content, annotate=self.group == 0)
        whole = values if self.plan.parts_axis is None else values.sum(axis=self.plan.parts_axis)
        self._require_finite(whole, chunk)
        self._settle()
        put = self.writes.submit(_store, self.own, self.group, chunk, values, whole)
        self._previous = _Written(self.plan.region(self.group, chunk), inputs, put)

    def _require_finite(self, whole: np.ndarray, chunk: int) -> None:
        """Refuses a training example without finite scores.

        Test rows whose solve did not end finite have none at all: `solver_status` tells of them.
        """
        finite = np.isfinite(whole)
        if finite.all():
            return
        bad = ~finite.reshape(*whole.shape[:2], -1).all(axis=2)
        solved = self._solved_rows()
        columns = bad[solved].any(axis=0)
        if columns.any():
            start, _ = self.plan.train_range(chunk)
            raise not_finite("train", start + int(columns.argmax()))
        # One row that is solved shows a training example as well as all of them do.
        error = None if solved.any() else self.side.blame(chunk)
        if error is not None:
            raise error

    def _solved_rows(self) -> np.ndarray:
        """Which test rows of the group have finite factors."""
        finite = [finite_rows(block) for block in self.left.values()]
        return torch.stack(finite).all(dim=0).cpu().numpy()

    def _settle(self) -> None:
        """Waits for the previous region's PUT and reports it."""
        previous, self._previous = self._previous, None
        if previous is not None:
            digest = previous.put.result()
            self.outcome.report(Row(KIND, previous.index, digest, previous.inputs, self.own.environment))


def context_region(context: WorkerContext, group: int, chunk: int) -> int:
    """The index of a region, before the session is built."""
    assert context.plan is not None
    return context.plan.region(group, chunk)


def _store(own: Session, group: int, chunk: int, values: np.ndarray, whole: np.ndarray) -> str:
    """Feeds a region to its sinks; the dense one last, for it is what verification reads.

    `whole` of all blocks or tokens together, where `values` tell them apart: what examples are ranked by.
    """
    start, _ = own.plan.train_range(chunk)
    digest = sink_arrays.put_partial(own.store, group, chunk, Partial.of(whole, start, own.plan.top_k))
    if own.plan.dense:
        digest = arrays.write_chunk(own.store, INFLUENCES, own.plan.result_index(group, chunk), values)
    return digest


def stored_digest(own: Session, index: int) -> str:
    """What the ledger's digest of a region would be, as the region reads now."""
    group, chunk = own.plan.unravel(index)
    if not own.plan.dense:
        return sink_arrays.partial_digest(own.store, group, chunk)
    return arrays.digest(arrays.read_chunk(own.store, INFLUENCES, own.plan.result_index(group, chunk)))
