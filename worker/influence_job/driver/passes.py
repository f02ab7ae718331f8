"""Passes over the training data: of a fit, and of solving where the method solves by passes.

A pass is partial sums over fixed ranges, and then what each of its units leaves. What is left of it is what
the ledger lacks; objects that nobody needs any more are deleted on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from influence_job.driver.row_work import Rows, RowWork
from influence_job.driver.submission import Work
from influence_job.plan import Plan
from influence_job.storage.ledger import Ledger
from influence_job.storage.store import Store
from influence_job.worker import fitting, solving
from influence_job.worker.fit_state import (
    SOLVING,
    first_row,
    partial_prefix,
    pass_prefix,
    range_kind,
    settled_kind,
    solving_series,
    solving_step,
    unit_kind,
)
from influence_job.worker.loading import Loaded
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import data_changed


@dataclass(frozen=True)
class Step:
    """One pass."""

    name: str
    units: int
    follows: str | None = None
    """The pass before it in its series."""


@dataclass(frozen=True)
class Passes:
    """Runs the passes of one attempt."""

    plan: Plan
    loaded: Loaded
    store: Store
    ledger: Ledger
    rows: RowWork

    def fit(self) -> None:
        """Every pass of the fit that is due."""
        for name, units in self.loaded.units.items():
            self._run(Step(name, units, self.loaded.follows.get(name)), like=next(iter(self.loaded.units)))

    def solve(
        self, kind: str, chunks: int, function: Callable[..., Outcome], on_value: Callable[[Any], None]
    ) -> None:
        """Solves chunk by chunk and makes each one's row by `function(context, last pass, chunk)`."""
        self._delete_of_solved(kind)
        for chunk in self.rows.missing(Rows(kind, chunks)):
            ended = self._solve_chunk(chunk)
            self.rows.compute(Rows(kind, 1, chunk), function, ended, on_value=on_value)
            self._check_solved(kind, chunk)
            self._delete(pass_prefix(solving_series(chunk)))
        self._delete_of_solved(kind)

    def forget(self, chunks: Iterable[int]) -> None:
        """Has chunks solved from the beginning, of which all passes are deleted; nothing if none solve."""
        for chunk in chunks if self.plan.solves_by_passes else ():
            begun = solving_step(chunk, 0)
            for kind in (range_kind(begun), unit_kind(begun), settled_kind(begun)):
                self.ledger.forget(kind, [row.index for row in self.ledger.rows(kind)])

    def range_inputs(self, index: int) -> Iterator[str]:
        """Digests of what the fit, and the passes that solved, read of a range; all passes of a series read
        the same.
        """
        chunks = range(self.plan.solved_chunks if self.plan.solves_by_passes else 0)
        for name in (*self.loaded.units, *(solving_step(chunk, 1) for chunk in chunks)):
            ranges = self._ranges(name)
            if self.ledger.has(ranges.kind, ranges.first + index):
                yield self.ledger.row(ranges.kind, ranges.first + index).inputs

    def _run(self, step: Step, like: str) -> bool:
        """What is left of a pass; False if it is not due. It must have read what pass `like` did."""
        if not self._is_due(step):
            return False
        ranges, units = self._ranges(step.name), self._units(step.name, step.units)
        if self.rows.done(units) < units.total:
            self.rows.compute(ranges, fitting.fit_range, step.name, ranges.first)
            self._check_read_alike(like, step.name)
            self.rows.compute(units, fitting.fit_unit, step.name, units.first)
        self._delete(partial_prefix(step.name))
        if step.follows is not None:
            self._delete(pass_prefix(step.follows))
        return True

    def _is_due(self, step: Step) -> bool:
        """Whether a pass is not one of a series, or the pass before it ran and left units to go on with."""
        if step.follows is None:
            return True
        before = self._units(step.follows, step.units)
        settled = Rows(settled_kind(step.follows), before.total, before.first)
        return self.rows.done(before) == step.units and self.rows.done(settled) < step.units

    def _solve_chunk(self, chunk: int) -> str:
        """The passes that solve a chunk, until all units are settled; the name of the last."""
        count = len(self.plan.blocks)
        self._begin(chunk, count)
        number = 1
        # A pass begins only when what the one before it left over is deleted: of those done look at the last.
        while self.rows.done(self._units(solving_step(chunk, number + 1), count)) == count:
            number += 1
        like = next(iter(self.loaded.units), solving_step(chunk, 1))
        while self._run(Step(solving_step(chunk, number), count, solving_step(chunk, number - 1)), like):
            number += 1
        return solving_step(chunk, number - 1)

    def _begin(self, chunk: int, count: int) -> None:
        """What the first pass follows, as one task."""
        units = self._units(solving_step(chunk, 0), count)
        missing = self.rows.missing(units)
        if missing:
            work = Work(
                units.kind,
                tuple(missing),
                solving.begin,
                lambda left: (self.rows.context, chunk, left),
                f"the beginning of solving chunk {chunk}",
            )
            self.rows.submitter.run([work])

    def _check_solved(self, kind: str, chunk: int) -> None:
        """What a chunk's row was made from is what was solved."""
        begun = self.ledger.row(unit_kind(solving_step(chunk, 0)), 0).inputs
        if self.ledger.row(kind, chunk).inputs != begun:
            raise data_changed(*self.plan.differentiated_range(chunk))

    def _check_read_alike(self, like: str, step: str) -> None:
        """Two passes read the same in every range."""
        for index in range(self.plan.fit_ranges):
            both = (self._ranges(like), self._ranges(step))
            if len({self.ledger.row(rows.kind, rows.first + index).inputs for rows in both}) > 1:
                raise data_changed("train", *self.plan.fit_range(index))

    def _delete_of_solved(self, kind: str) -> None:
        """What an attempt that was killed left of chunks that it had finished, or a task long given up."""
        prefix = pass_prefix(SOLVING.rstrip("/"))

        def needed(path: str) -> bool:
            return not self.ledger.has(kind, int(path.removeprefix(prefix).split("/")[0]))

        self._delete(prefix, needed)

    def _delete(self, prefix: str, keep: Callable[[str], bool] = lambda _: False) -> None:
        self.store.delete_prefix(prefix, self.ledger.guard.check_if_due, keep)

    def _ranges(self, step: str) -> Rows:
        total = self.plan.fit_ranges
        return Rows(range_kind(step), total, first_row(step, total))

    def _units(self, step: str, total: int) -> Rows:
        return Rows(unit_kind(step), total, first_row(step, total))
