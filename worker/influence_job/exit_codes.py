"""The exit codes of `influence`, which are part of its interface.

The Job's podFailurePolicy and scripts read them. The values come from sysexits.h where it has one.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a process of a job ended."""

    DONE = 0
    """The result is complete and stored."""
    INTERNAL = 1
    """An error nobody foresaw; the traceback is shown. A retry may help."""
    PERMANENT = 64
    """No retry can cure it: the input, the task or the store must change first."""
    RETRY = 75
    """Infrastructure was lost or the process was told to stop: run it again and it resumes."""
    INTERRUPTED = 130
    """Ctrl-C at a terminal; what was done is kept."""
