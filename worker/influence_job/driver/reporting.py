"""The progress document of a running job: one tracker that every thread may write to and read from."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from influence_job.errors import JobError
from influence_job.identity import JobIdentity
from influence_job.progress import (
    MESSAGE_CHARACTERS,
    WARNING_CHARACTERS,
    Problem,
    Progress,
    Regions,
    SolverCounts,
    Stage,
    StageTimes,
    bounded,
)

RATE_SECONDS = 60.0
MAX_WARNINGS = 20


class ProgressTracker:
    """Keeps the document; `snapshot` is what `/progress` serves and the progress bar draws."""

    def __init__(self, identity: JobIdentity, on_progress: Callable[[Progress], None]) -> None:
        self._lock = threading.Lock()
        self._document = Progress(job_uid=identity.uid, attempt=identity.attempt, recorded=0)
        self._marks: deque[tuple[float, int]] = deque()
        self._on_progress = on_progress
        self._told = 0.0

    def snapshot(self) -> Progress:
        """The document as of now."""
        with self._lock:
            return self._document.model_copy(deep=True)

    def enter(self, stage: Stage) -> None:
        """Closes the present stage and opens `stage`."""
        now = datetime.now(UTC)
        with self._lock:
            stages = self._document.stages
            if stages and stages[-1].end is None:
                stages[-1].end = now
            stages.append(StageTimes(name=stage, start=now))
            self._document.stage = stage
            self._document.regions = Regions()
            self._reset_rate()
        self.tell(force=True)

    def start_counting(self, done: int, total: int) -> None:
        """The present stage has `total` rows, of which the ledger holds `done`."""
        with self._lock:
            failed = self._document.regions.failed
            self._document.regions = Regions(done=done, total=total, failed=failed)
            self._reset_rate()
        self.tell(force=True)

    def count(self, done: int) -> None:
        """`done` rows of the present stage are computed."""
        with self._lock:
            document, now = self._document, time.monotonic()
            if document.stage is not Stage.VERIFYING:  # which reads rows and writes none
                document.recorded = (document.recorded or 0) + max(0, done - document.regions.done)
            document.regions.done = done
            self._marks.append((now, done))
            while now - self._marks[0][0] > RATE_SECONDS:
                self._marks.popleft()
            first_time, first_done = self._marks[0]
            if done > first_done and now > first_time:
                document.rate = (done - first_done) / (now - first_time)
                document.eta_seconds = (document.regions.total - done) / document.rate
        self.tell()

    def failed(self, message: str) -> None:
        """One attempt at a region raised."""
        with self._lock:
            self._document.regions.failed += 1
            self._document.last_error = _problem("RegionRaised", message)
        self.tell()

    def solver(self, counts: dict[str, int]) -> None:
        """Right-hand sides by how they ended, over all that is done."""
        with self._lock:
            self._document.solver = SolverCounts(**{name.lower(): value for name, value in counts.items()})
        self.tell()

    def warn(self, message: str) -> None:
        """A warning for the user, each once."""
        message = bounded(message, WARNING_CHARACTERS)
        with self._lock:
            if message not in self._document.warnings and len(self._document.warnings) < MAX_WARNINGS:
                self._document.warnings.append(message)
        self.tell(force=True)

    def update(self, **fields: Any) -> None:
        """Sets plain fields of the document."""
        with self._lock:
            for name, value in fields.items():
                setattr(self._document, name, value)
        self.tell()

    def finish(self, result: dict[str, object]) -> None:
        """The job is complete."""
        self._close(finished=True, result=result)

    def fail(self, error: JobError) -> None:
        """The attempt ended with `error`."""
        self._close(last_error=_problem(str(error.reason), error.message))

    def _close(self, **fields: Any) -> None:
        with self._lock:
            stages = self._document.stages
            if stages and stages[-1].end is None:
                stages[-1].end = datetime.now(UTC)
            for name, value in fields.items():
                setattr(self._document, name, value)
            self._document.eta_seconds = None
        self.tell(force=True)

    def tell(self, force: bool = False) -> None:
        """Calls `on_progress`, at most ten times a second unless forced."""
        now = time.monotonic()
        if force or now - self._told >= 0.1:
            self._told = now
            self._on_progress(self.snapshot())

    def _reset_rate(self) -> None:
        self._marks = deque([(time.monotonic(), self._document.regions.done)])
        self._document.rate = self._document.eta_seconds = None


def _problem(reason: str, message: str) -> Problem:
    return Problem(reason=reason, message=bounded(message, MESSAGE_CHARACTERS))
