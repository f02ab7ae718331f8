"""The driver's hold on a scheduler that comes late, hangs, goes away and comes back. Used by `Submitter`.

The first connection is waited for without an own limit: in a cluster the driver is there before the
scheduler, and the operator's startup deadline decides. A scheduler that was there and is lost has a minute
to come back. Between two tries the caller's `meanwhile` runs, so that a stop is obeyed and the store guarded.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Future

from influence_job.errors import InfrastructureError, Reason
from influence_job.worker import parcel
from influence_job.worker.outcome import ROWS_TOPIC

GRACE_VARIABLE = "INFLUENCE_SCHEDULER_GRACE_SECONDS"
DEFAULT_GRACE_SECONDS = 60.0
"""How long a lost scheduler may stay away."""
RETRY_SECONDS = 1.0
LOOK_SECONDS = 2.0
"""Between two questions for the workers."""
ANSWER_SECONDS = 5.0
"""A scheduler that takes longer to answer is silent; nothing here waits longer for it."""
SILENT_SECONDS = 30.0
"""A scheduler that is silent so long is lost, though its connection stands: its process may hang."""
NOTE_SECONDS = 30.0
"""Between two lines in the log while the first scheduler is awaited."""

log = logging.getLogger(__name__)


class NoSchedulerError(Exception):
    """No scheduler answers now; one may later."""


@dataclass
class Connection:
    """One client after the other, each with the subscription to the workers' reports."""

    connect: Callable[[], Client]
    """A new client.

    Raises:
        NoSchedulerError: there is no scheduler yet, or none any more.
    """
    on_rows: Callable[[tuple[float, Any]], None]
    """Called, from another thread, with each event of `ROWS_TOPIC`."""
    meanwhile: Callable[[], None]
    _client: Any = None
    _stream: Any = None
    """The client's stream to the scheduler. Another one means that it has reconnected on its own: the
    subscription and all futures went with the old one."""
    _workers: int = 0
    _looked: float = 0.0
    _silent_since: float | None = None
    _grace: float = field(
        default_factory=lambda: float(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_SECONDS))
    )

    def open(self) -> None:
        """Waits for the first scheduler, however long it takes."""
        noted = time.monotonic()
        while True:
            self.meanwhile()
            try:
                return self._attach()
            except NoSchedulerError as error:
                if time.monotonic() - noted > NOTE_SECONDS:
                    noted = time.monotonic()
                    log.info("waiting for the scheduler: %s", error)
                time.sleep(RETRY_SECONDS)

    def reopen(self) -> None:
        """Waits for a scheduler in the place of a lost one.

        Raises:
            InfrastructureError: none came in time.
        """
        self.close()
        deadline = time.monotonic() + self._grace
        while True:
            self.meanwhile()
            try:
                return self._attach()
            except NoSchedulerError as error:
                if time.monotonic() > deadline:
                    raise InfrastructureError(
                        Reason.WORKERS_LOST,
                        f"no scheduler for {self._grace:.0f} s ({error}); run it again and it resumes",
                    ) from error
                time.sleep(RETRY_SECONDS)

    @property
    def lost(self) -> bool:
        """Whether what was submitted is gone."""
        client = self._client
        if client is None or client.status != "running" or client.scheduler_comm is not self._stream:
            return True
        silent = 0.0 if self._silent_since is None else time.monotonic() - self._silent_since
        return silent > min(SILENT_SECONDS, self._grace)

    def submit(self, function: Callable[..., Any], arguments: tuple[Any, ...], priority: int) -> Future[Any]:
        """One task for any worker; its future's value is what the function returns there.

        Raises:
            NoSchedulerError: the scheduler was lost.
        """
        if self._client is None:
            raise NoSchedulerError("not connected")
        try:
            return self._client.submit(
                parcel.call,
                parcel.pack(function, arguments),
                # Dask estimates durations, and its metrics count, by what stands before the dash.
                key=f"{function.__name__}-{uuid.uuid4().hex}",
                retries=0,
                priority=priority,
            )
        except Exception as error:  # of several types, whichever thread sees the loss first
            if not self.lost:
                raise
            raise NoSchedulerError(str(error)) from error

    def workers(self) -> int:
        """Workers connected, asked for every two seconds; the last known number while nobody answers."""
        now, client = time.monotonic(), self._client
        if client is not None and now - self._looked > LOOK_SECONDS:
            try:
                answer = client.sync(client.scheduler.ncores, callback_timeout=ANSWER_SECONDS)
                self._workers, self._silent_since = len(answer), None
            except Exception:
                self._silent_since = self._silent_since or now
            self._looked = time.monotonic()
        return self._workers

    def close(self) -> None:
        """Lets go of the scheduler, which may hang. Without it the interpreter hangs at exit."""
        client, self._client, self._stream = self._client, None, None
        if client is not None:
            with suppress(Exception):
                client.close(timeout=ANSWER_SECONDS)

    def _attach(self) -> None:
        client = self.connect()
        self._client, self._stream = client, client.scheduler_comm
        self._workers, self._looked, self._silent_since = 0, 0.0, None
        client.subscribe_topic(ROWS_TOPIC, self.on_rows)
