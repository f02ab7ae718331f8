"""Progress as lines of a log: what `kubectl logs` shows of a driver."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from influence_job.progress import Progress, Stage
from influence_job.units import clock

EVERY_SECONDS = 30.0


class ProgressLines:
    """Called with every new document; prints stages, warnings, and now and then how far it is."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._warnings = 0
        self._told = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            for warning in progress.warnings[self._warnings :]:
                self._print(f"warning: {warning}")
            self._warnings = len(progress.warnings)
            if progress.stages and progress.stage is not self._stage:
                self._stage = progress.stage
                self._print(str(progress.stage))
            elif time.monotonic() - self._told > EVERY_SECONDS:
                self._print(_how_far(progress))

    def _print(self, line: str) -> None:
        self._told = time.monotonic()
        print(f"{time.strftime('%H:%M:%S')} {line}", file=self._stream, flush=True)


def _how_far(progress: Progress) -> str:
    regions = progress.regions
    line = f"{progress.stage} {regions.done}/{regions.total}, {progress.workers} workers"
    if progress.eta_seconds is not None:
        line += f", {clock(progress.eta_seconds)} to go"
    return line
