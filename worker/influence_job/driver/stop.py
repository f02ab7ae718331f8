"""How a run is told to stop: by a signal, which the driver's loop obeys between two regions.

A signal's handler may run inside any line of any library, where an exception can be lost. So a handler only
notes what was asked, and the loop raises it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from influence_job.errors import InfrastructureError, Reason


class Stop:
    """What the process was told, if anything."""

    def __init__(self) -> None:
        self._asked: BaseException | None = None

    def ask(self, error: BaseException) -> None:
        """The next `check` raises `error`."""
        self._asked = error

    @property
    def asked(self) -> bool:
        """Whether the process was told to stop."""
        return self._asked is not None

    def check(self) -> None:
        """Raises what was asked for: exit code 75 for SIGTERM, 130 for Ctrl-C."""
        if self._asked is not None:
            raise self._asked


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """A `Stop` that SIGTERM and Ctrl-C ask; a second Ctrl-C does not wait for the loop."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def terminate(*_: object) -> None:
        stop.ask(InfrastructureError(Reason.TERMINATED, "told to stop; run it again and it resumes"))

    def interrupt(*_: object) -> None:
        stop.ask(KeyboardInterrupt())
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
        signal.SIGINT: signal.signal(signal.SIGINT, interrupt),
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
