"""Windowed submission: a bounded number of Dask tasks in flight, however many regions a job has.

The rows that workers report are what counts. A task may vanish with its worker, its scheduler or its
result: what the ledger does not hold is submitted again.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from influence_job.dask_settings import ALLOWED_DEATHS
from influence_job.driver.reporting import ProgressTracker
from influence_job.driver.stop import Stop
from influence_job.errors import InfrastructureError, JobError, PermanentError, Reason
from influence_job.storage.ledger import Ledger, Row
from influence_job.worker.outcome import ROWS_TOPIC, Failure, Outcome

STRIKES = 3
"""A region that raises this often ends the job."""
SCHEDULER_GRACE_SECONDS = 60.0
"""How long the driver waits for a restarted scheduler, or for a first worker."""
TICK_SECONDS = 0.1
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


@dataclass
class Submitter:
    """Runs work on the workers of a scheduler that may go away and come back."""

    connect: Callable[[], Client]
    ledger: Ledger
    tracker: ProgressTracker
    stop: Stop
    client: Client = field(init=False)
    _strikes: Counter[tuple[str, int]] = field(default_factory=Counter)
    _done: queue.SimpleQueue[Future[Any]] = field(default_factory=queue.SimpleQueue)
    _flight: dict[Future[Any], Work] = field(default_factory=dict)
    _workers: tuple[float, int] = (0.0, 0)

    def __post_init__(self) -> None:
        self._attach()

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
        waiting: list[Work] = []
        source = iter(works)
        try:
            while self._fill(source, waiting) or self._flight:
                self._tick()
                if self.client.status not in ("running", "connecting"):
                    waiting.extend(self._reattach())
                for future in self._completed():
                    again = self._settle(future, self._flight.pop(future), on_value)
                    if again is not None:
                        waiting.append(again)
                    on_row()
                on_row()
            self.ledger.flush()
        finally:
            self._abandon()

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Any:
        """One task whose value is wanted now; runs again if its worker or scheduler vanishes."""
        answer: list[Any] = []
        work = Work(function.__name__, (0,), function, lambda _: arguments, function.__name__)
        self.run([work], on_value=answer.append)
        return answer[-1]

    def workers(self) -> int:
        """Workers connected, looked up every two seconds."""
        now = time.monotonic()
        if now - self._workers[0] > 2.0:
            try:
                count = len(self.client.scheduler_info(n_workers=-1)["workers"])
            except Exception:
                count = 0
            self._workers = (now, count)
            self.tracker.update(workers=count)
        return self._workers[1]

    def close(self) -> None:
        """Lets go of the scheduler. Without it the interpreter hangs at exit."""
        self.client.close(timeout=5)

    def _attach(self) -> None:
        self.client = self.connect()
        self.client.subscribe_topic(ROWS_TOPIC, self._on_event)

    def _on_event(self, event: tuple[float, Any]) -> None:
        _, rows = event
        self._record([Row(*row) for row in rows])

    def _record(self, rows: list[Row]) -> None:
        """Adds what is new: a row comes by event first and with its task's result again."""
        self.ledger.add([row for row in rows if not self.ledger.has(row.kind, row.index)])

    def _fill(self, source: Iterator[Work], waiting: list[Work]) -> bool:
        """Submits until the window is full; False when nothing is left to submit."""
        window = max(2, TASKS_PER_WORKER * self.workers())
        while len(self._flight) < window and self.client.status == "running":
            work = waiting.pop() if waiting else next(source, None)
            if work is None:
                return False
            future = self.client.submit(
                work.function, *work.arguments(work.indices), pure=False, retries=0, priority=-work.indices[0]
            )
            self._flight[future] = work
            future.add_done_callback(self._done.put)
        return True

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

    def _settle(self, future: Future[Any], work: Work, on_value: Callable[[Any], None]) -> Work | None:
        """Takes over what a future brought; the work that is left of it."""
        if future.status == "finished":
            outcome: Outcome = future.result()
            self._record(outcome.rows)
            if outcome.failure is not None:
                self._strike(outcome.failure)
            else:
                on_value(outcome.value)
                return None
        elif future.status == "error":
            self._raised(future, work)
        left = tuple(i for i in work.indices if not self.ledger.has(work.kind, i))
        return Work(work.kind, left, work.function, work.arguments, work.what) if left else None

    def _raised(self, future: Future[Any], work: Work) -> None:
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
        self._strike(Failure(work.kind, first, f"{work.what}: {type(error).__name__}: {last_line}", "", None))

    def _strike(self, failure: Failure) -> None:
        self.tracker.failed(failure.message)
        if failure.error is not None:
            raise failure.error
        self._strikes[failure.kind, failure.index] += 1
        if self._strikes[failure.kind, failure.index] >= STRIKES:
            raise PermanentError(
                failure.reason,
                f"{failure.message} ({failure.kind} {failure.index} raised {STRIKES} times)",
            )

    def _tick(self) -> None:
        self.stop.check()
        self.ledger.flush_if_due()

    def _reattach(self) -> list[Work]:
        """Waits for a restarted scheduler; the work whose futures went with the old one."""
        self.tracker.warn("the scheduler was lost; waiting for it")
        lost = list(self._flight.values())
        self._flight.clear()
        self._workers = (0.0, 0)
        self.client.close(timeout=1)
        deadline = time.monotonic() + SCHEDULER_GRACE_SECONDS
        while True:
            self._tick()
            try:
                self._attach()
                return lost
            except (OSError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise InfrastructureError(
                        Reason.WORKERS_LOST,
                        f"no scheduler for {SCHEDULER_GRACE_SECONDS:.0f} s ({error}); "
                        f"run it again and it resumes",
                    ) from error
                time.sleep(1.0)

    def _abandon(self) -> None:
        """Forgets and cancels what is in flight."""
        futures = list(self._flight)
        self._flight.clear()
        if futures and self.client.status == "running":
            self.client.cancel(futures, force=True)


def ended_with(error: BaseException) -> JobError:
    """Any exception as the JobError that the exit code and the progress document tell."""
    if isinstance(error, JobError):
        return error
    return JobError(Reason.INTERNAL, f"{type(error).__name__}: {error}")
