"""Windowed submission: a bounded number of Dask tasks in flight, however many regions a job has.

The rows that workers report are what counts. A task may vanish with its worker, its scheduler or its
result: what the ledger does not hold is submitted again.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from influence_job.dask_settings import ALLOWED_DEATHS
from influence_job.driver.connection import Connection, NoSchedulerError
from influence_job.driver.reporting import ProgressTracker
from influence_job.driver.stop import Stop
from influence_job.errors import PermanentError, Reason
from influence_job.storage.ledger import Ledger, Row
from influence_job.worker.outcome import Failure, Outcome

PAUSES = (1.0, 10.0)
"""Seconds before what raised is tried again: what it reads may be away for a moment. Then it ends the job."""
TICK_SECONDS = 0.1
RESULT_SECONDS = 10.0
"""A result that takes longer went with its worker, and may never come: the work is submitted again."""
TASKS_PER_WORKER = 2


@dataclass(frozen=True)
class Work:
    """One Dask task: `function(*arguments, indices)` is to make rows `indices` of `kind`."""

    kind: str
    indices: tuple[int, ...]
    function: Callable[..., Outcome]
    arguments: Callable[[tuple[int, ...]], tuple[Any, ...]]
    """The function's arguments for what is left of `indices`."""
    what: str


@dataclass(frozen=True)
class _Waiting:
    """Work that is to be submitted again."""

    work: Work
    due: float
    """Not before, by the monotonic clock."""


@dataclass
class Submitter:
    """Runs work on the workers of a scheduler that may go away and come back."""

    connect: Callable[[], Client]
    ledger: Ledger
    tracker: ProgressTracker
    stop: Stop
    _strikes: Counter[tuple[str, int]] = field(default_factory=Counter)
    _done: queue.SimpleQueue[Future[Any]] = field(default_factory=queue.SimpleQueue)
    _flight: dict[Future[Any], Work] = field(default_factory=dict)
    _connection: Connection = field(init=False)
    _workers: int = 0
    _refused: PermanentError | None = None
    """Why rows that a worker reported are not recorded."""

    def __post_init__(self) -> None:
        self._connection = Connection(self.connect, self._on_event, self._tick)

    def open(self) -> None:
        """Waits for a scheduler, as long as it takes.

        Raises:
            JobError: the process is to stop, or the store was taken over.
        """
        self._connection.open()

    def run(
        self,
        works: Iterable[Work],
        on_row: Callable[[], None] = lambda: None,
        on_value: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """Runs all of `works`; returns when the ledger holds every row of them, flushed.

        Args:
            works: the tasks.
            on_row: called when rows may have come.
            on_value: called with each task's small result.

        Raises:
            JobError: a region failed for good, the scheduler stayed away, or the process is to stop.
        """
        waiting: list[_Waiting] = []
        source = iter(works)
        try:
            while self._fill(source, waiting) or self._flight:
                self._tick()
                if self._connection.lost:
                    waiting.extend(self._reopen())
                waiting.extend(self._settled(on_value))
                on_row()
            self.ledger.flush()
        finally:
            # Released, so that the scheduler forgets them; what a thread of a worker is at, it finishes.
            self._flight.clear()

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Any:
        """One task whose value is wanted now; runs again if its worker or scheduler vanishes."""
        answer: list[Any] = []
        work = Work(function.__name__, (0,), function, lambda _: arguments, function.__name__)
        self.run([work], on_value=answer.append)
        return answer[-1]

    def workers(self) -> int:
        """Workers connected."""
        count = self._connection.workers()
        if count != self._workers:
            self._workers = count
            self.tracker.update(workers=count)
        return count

    def close(self) -> None:
        """Lets go of the scheduler."""
        self._connection.close()

    def _on_event(self, event: tuple[float, Any]) -> None:
        _, rows = event
        try:
            self._record([Row(*row) for row in rows])
        except PermanentError as error:  # of another thread than the one that it is to end
            self._refused = error

    def _record(self, rows: list[Row]) -> None:
        """Adds what is new: a row comes by event first and with its task's result again."""
        self.ledger.add([row for row in rows if not self.ledger.has(row.kind, row.index)])

    def _fill(self, source: Iterator[Work], waiting: list[_Waiting]) -> bool:
        """Submits until the window is full; False when nothing is left to submit, now or later."""
        window = max(2, TASKS_PER_WORKER * self.workers())
        while len(self._flight) < window and not self._connection.lost:
            if (work := self._next(source, waiting)) is None:
                return bool(waiting)
            try:
                future = self._connection.submit(
                    work.function, work.arguments(work.indices), -work.indices[0]
                )
            except NoSchedulerError:
                waiting.append(_Waiting(work, 0.0))
                return True
            self._flight[future] = work
            future.add_done_callback(self._done.put)
        return True

    def _next(self, source: Iterator[Work], waiting: list[_Waiting]) -> Work | None:
        """What is left of the work that has waited long enough, as the ledger is now, and then new work."""
        now = time.monotonic()
        for again in [again for again in waiting if again.due <= now]:
            waiting.remove(again)
            work = again.work
            if left := tuple(i for i in work.indices if not self.ledger.has(work.kind, i)):
                return replace(work, indices=left)
        return next(source, None)

    def _completed(self) -> list[Future[Any]]:
        """Futures that ended, after at most one tick."""
        ended: list[Future[Any]] = []
        try:
            ended.append(self._done.get(timeout=TICK_SECONDS))
            while True:
                ended.append(self._done.get_nowait())
        except queue.Empty:
            pass
        return [future for future in ended if future in self._flight]

    def _settled(self, on_value: Callable[[Any], None]) -> list[_Waiting]:
        """Takes over what completed; the work that did not bring all it was to.

        No future is known afterwards: Dask would compute again what it holds when its worker vanishes.
        """
        ended = ((self._flight.pop(future), future) for future in self._completed())
        pauses = [(work, self._settle(future, work, on_value)) for work, future in ended]
        now = time.monotonic()
        return [_Waiting(work, now + pause) for work, pause in pauses if pause is not None]

    def _settle(self, future: Future[Any], work: Work, on_value: Callable[[Any], None]) -> float | None:
        """Takes over what a future brought; how long the rest is to wait, None if that was all."""
        if future.status == "error":
            return self._raised(future, work)
        outcome = _result(future)
        if outcome is None:
            return 0.0
        self._record(outcome.rows)
        if outcome.failure is not None:
            return self._strike(outcome.failure)
        on_value(outcome.value)
        return None

    def _raised(self, future: Future[Any], work: Work) -> float:
        error = future.exception()
        first = next((i for i in work.indices if not self.ledger.has(work.kind, i)), work.indices[0])
        if isinstance(error, KilledWorker):
            raise PermanentError(
                Reason.REGION_FAILED,
                f"{work.what}, {work.kind} {first}: {ALLOWED_DEATHS} workers died while computing "
                f"it; look for out-of-memory kills and raise spec.workers.resources.limits.memory, or lower "
                f"spec.chunks",
            )
        last_line = (str(error).strip().splitlines() or [""])[-1]
        message = f"{work.what}: {type(error).__name__}: {last_line}"
        return self._strike(Failure(work.kind, first, message, "", None))

    def _strike(self, failure: Failure) -> float:
        """How long what failed is to wait.

        Raises:
            JobError: it is not tried again.
        """
        self.tracker.failed(failure.message)
        if failure.error is not None:
            raise failure.error
        strikes = self._strikes[failure.kind, failure.index]
        if strikes == len(PAUSES):
            raise PermanentError(
                failure.reason,
                f"{failure.message} ({failure.kind} {failure.index} raised {strikes + 1} times)",
            )
        self._strikes[failure.kind, failure.index] += 1
        return PAUSES[strikes]

    def _tick(self) -> None:
        self.stop.check()
        if self._refused is not None:
            raise self._refused
        self.ledger.flush_if_due()

    def _reopen(self) -> list[_Waiting]:
        """Waits for another scheduler; the work whose futures went with the old one."""
        self.tracker.warn("the scheduler was lost; waiting for it")
        lost = [_Waiting(work, 0.0) for work in self._flight.values()]
        self._flight.clear()
        self._connection.reopen()
        return lost


def _result(future: Future[Any]) -> Outcome | None:
    """What a future brought; None if it was cancelled, or went with a worker or the scheduler."""
    if future.status != "finished":
        return None
    try:
        outcome: Outcome = future.result(timeout=RESULT_SECONDS)
    except (CancelledError, TimeoutError, OSError):
        return None
    return outcome
