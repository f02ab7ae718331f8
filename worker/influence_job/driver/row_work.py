"""Ledger rows as work for the submitter: those that are missing, one per Dask task, counted as progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from influence_job.driver.reporting import ProgressTracker
from influence_job.driver.submission import Submitter, Work
from influence_job.storage.ledger import Ledger
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import WorkerContext


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one kind."""

    kind: str
    total: int
    first: int = 0


@dataclass(frozen=True)
class RowWork:
    """Computes rows on the workers of one attempt."""

    context: WorkerContext
    ledger: Ledger
    submitter: Submitter
    tracker: ProgressTracker

    def done(self, rows: Rows) -> int:
        """How many of few rows the ledger holds."""
        return sum(self.ledger.has(rows.kind, rows.first + i) for i in range(rows.total))

    def missing(self, rows: Rows) -> list[int]:
        """Those that the ledger lacks, ascending."""
        lacking = self.ledger.missing(rows.kind, rows.first + rows.total)
        found: list[int] = lacking[lacking >= rows.first].tolist()
        return found

    def compute(
        self,
        rows: Rows,
        function: Callable[..., Outcome],
        *leading: object,
        on_value: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """Computes what is missing of `rows` by `function(context, *leading, row)`, and counts it."""
        missing = self.missing(rows)
        others = self.ledger.count(rows.kind) - (rows.total - len(missing))
        self.tracker.start_counting(rows.total - len(missing), rows.total)
        self.submitter.run(
            self.work(rows, function, *leading),
            lambda: self.tracker.count(self.ledger.count(rows.kind) - others),
            on_value,
        )

    def work(self, rows: Rows, function: Callable[..., Outcome], *leading: object) -> Iterator[Work]:
        """A task for each missing row."""
        for index in self.missing(rows):
            yield Work(
                rows.kind,
                (index,),
                function,
                lambda left: (self.context, *leading, left[0]),
                f"{rows.kind} {index}",
            )
