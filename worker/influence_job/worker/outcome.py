"""What a task on a worker answers: rows of finished work and at most one failure."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from distributed import get_worker

from influence_calculator.maths.errors import CalculatorError, NotFiniteError
from influence_job.data import ReadError
from influence_job.errors import OF_THE_TASK, JobError, PermanentError, Reason
from influence_job.plan.memory import CUDA_BUDGET
from influence_job.storage.ledger import Row
from influence_job.units import in_words

REPORT_SECONDS = 0.25

ROWS_TOPIC = "influence-rows"
"""Dask events on which workers report rows as soon as their objects are in the store."""

_TOO_SMALL = (
    f"; set workers.deviceMemory to what a worker may use of its GPU: batches and groups are planned for it, "
    f"{in_words(CUDA_BUDGET)} by default"
)


@dataclass(frozen=True)
class Failure:
    """Why one index of a kind could not be computed."""

    kind: str
    index: int
    message: str
    """The exception's type and last line, with what was being computed."""
    details: str
    """The traceback."""
    error: JobError | None
    """Set when no retry by the driver makes sense: it ends the job with this error."""
    reason: Reason = Reason.REGION_FAILED
    """What the job ends with when every retry failed the same way."""


@dataclass
class Outcome:
    """What became durable, in order, and what went wrong last."""

    rows: list[Row] = field(default_factory=list)
    failure: Failure | None = None
    value: Any = None
    """A small result for the driver itself (sizes, counts)."""
    _told: int = 0
    _told_at: float = field(default_factory=time.monotonic)

    def report(self, row: Row) -> None:
        """Records a row whose PUT has returned, and tells the driver without waiting for the task's end.

        Rows of one quarter of a second travel together: a tiny region costs no event of its own.
        """
        self.rows.append(row)
        now = time.monotonic()
        if now - self._told_at >= REPORT_SECONDS:
            get_worker().log_event(ROWS_TOPIC, [astuple(row) for row in self.rows[self._told :]])
            self._told, self._told_at = len(self.rows), now

    def attempt(self, kind: str, index: int, what: str, work: Callable[[], None]) -> bool:
        """Runs `work`; an exception becomes the failure of `kind` `index`. Whether it went well."""
        try:
            work()
        except JobError as error:
            self.failure = Failure(kind, index, f"{what}: {error}", traceback.format_exc(), error)
        except CalculatorError as error:
            # The maths refuses what it is given: it would refuse it again.
            reason = Reason.NOT_FINITE if isinstance(error, NotFiniteError) else Reason.UNSUPPORTED_MODEL
            refusal = PermanentError(reason, f"{what}: {error}")
            self.failure = Failure(kind, index, refusal.message, traceback.format_exc(), refusal)
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            self.failure = _failure(kind, index, what, error, _TOO_SMALL)
        except OF_THE_TASK as error:
            self.failure = _failure(kind, index, what, error)
        return self.failure is None


def _failure(kind: str, index: int, what: str, error: BaseException, advice: str = "") -> Failure:
    last_line = (str(error).strip().splitlines() or [""])[-1]
    reason = Reason.INVALID_DATA if isinstance(error, ReadError) else Reason.REGION_FAILED
    message = f"{what}: {type(error).__name__}: {last_line}{advice}"
    return Failure(kind, index, message, traceback.format_exc(), None, reason)
