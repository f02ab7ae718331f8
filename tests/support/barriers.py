"""Stops a running job at a chosen place, and notes every file it writes: for the tests that kill jobs.

The task module of the tests imports this, so it is in the driver and in every worker of a run that a
test starts, and in nothing that we ship. What it does is told by environment variables, which
`jobs.Barrier` and `jobs.Jobs` set:

BARRIER        "<function> <before|after> <n> <pattern>": the n-th call, counted over all processes, of one
               of `PLACES` whose text matches the pattern
BARRIER_FOLDER where `reached` appears when a process waits there, and `go` lets it go on; `ticket-<n>` holds
               the id of the process that made the n-th call
BARRIER_PACE   seconds that every region waits before it is stored: time to see a run half done
WRITES_LOG     a file that gets one line per file renamed, linked or removed, by Python's own audit events
"""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from influence_job.driver.reporting import ProgressTracker
from influence_job.storage.ledger import Ledger
from influence_job.storage.store import Store
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import Session

LONGEST_WAIT_SECONDS = 240.0

_added: set[str] = set()
"""Kinds of the rows that wait in this process's ledger for a flush."""

PLACES: dict[str, tuple[type, str, Callable[..., str]]] = {
    "put": (Store, "put", lambda _, path, *__: path),
    "delete": (Store, "delete", lambda _, path: path),
    "enter": (ProgressTracker, "enter", lambda _, stage: str(stage)),
    "flush": (Ledger, "flush", lambda _: " ".join(sorted(_added))),
    "read": (Session, "training_reads", lambda _, start, stop: f"{start} {stop}"),
    "report": (Outcome, "report", lambda _, row: f"{row.kind} {row.index}"),
}
"""Function -> where it stands, and the text of a call that patterns are matched with."""


def install() -> None:
    """Does what the environment says, once per process."""
    if "WRITES_LOG" in os.environ:
        _log_writes(os.environ["WRITES_LOG"])
    if "BARRIER_PACE" in os.environ:
        pace = float(os.environ["BARRIER_PACE"])
        _wrap("put", lambda when, path: time.sleep(pace) if when == "before" and _is_region(path) else None)
    if "BARRIER" in os.environ:
        function, when, count, pattern = os.environ["BARRIER"].split(" ", 3)
        folder = Path(os.environ["BARRIER_FOLDER"])
        if function == "flush":
            _note_added_kinds()
        _wrap(
            function,
            lambda now, text: _pass(folder, int(count)) if _meant(now, text, when, pattern) else None,
        )


def _is_region(path: str) -> bool:
    return path.startswith("influences/c/")


def _meant(now: str, text: str, when: str, pattern: str) -> bool:
    return now == when and re.search(pattern, text) is not None


def _wrap(function: str, at: Callable[[str, str], None]) -> None:
    owner, name, text_of = PLACES[function]
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        text = text_of(*args, **kwargs)
        at("before", text)
        result = original(*args, **kwargs)
        at("after", text)
        return result

    setattr(owner, name, wrapper)


def _note_added_kinds() -> None:
    add, flush = Ledger.add, Ledger.flush

    @functools.wraps(add)
    def noted(self: Ledger, rows: Any) -> None:
        rows = list(rows)
        _added.update(row.kind for row in rows)
        add(self, rows)

    @functools.wraps(flush)
    def cleared(self: Ledger) -> None:
        flush(self)
        _added.clear()

    Ledger.add, Ledger.flush = noted, cleared  # type: ignore[method-assign]


def _pass(folder: Path, count: int) -> None:
    """Waits if this is the `count`-th call that comes here, over all processes."""
    if _ticket(folder) != count:
        return
    (folder / "reached").touch()
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while not (folder / "go").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened the barrier {folder}")
        time.sleep(0.005)


def _ticket(folder: Path) -> int:
    """1, 2, 3, ... over all processes."""
    number = 1
    while True:
        try:
            ticket = os.open(folder / f"ticket-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            number += 1
        else:
            os.write(ticket, str(os.getpid()).encode())
            os.close(ticket)
            return number


def _log_writes(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    places = {"os.rename": 1, "os.link": 1, "os.remove": 0}

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event in places:
            os.write(log, f"{event} {os.fspath(args[places[event]])}\n".encode())

    sys.addaudithook(note)
