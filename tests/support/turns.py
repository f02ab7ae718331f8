"""Who may use the cluster when: tests side by side, a test that breaks a part of it alone.

Several pytest processes share one cluster. File locks order them, so nothing is left behind by a process
that was killed.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """The caller's turn: with others, or `alone`.

    Everybody passes a gate first, and who waits for the others to finish holds it: without it a test that
    wants to be alone would wait until no other is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "turn.gate").open("w") as gate, (folder / "turn").open("w") as use:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(use, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


def once(folder: Path, run: str, name: str, action: Callable[[], object]) -> None:
    """Does `action` in the first process of this test run that asks; the others wait for it to succeed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"once-{name}").open("a+") as done:
        fcntl.flock(done, fcntl.LOCK_EX)
        done.seek(0)
        if done.read() == run:
            return
        action()
        done.truncate(0)
        done.write(run)
