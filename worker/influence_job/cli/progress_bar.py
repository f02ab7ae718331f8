"""A job's progress on a terminal, drawn from its progress document; plain lines where there is none."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from influence_job.progress import Progress, StageTimes
from influence_job.units import clock

PLAIN_SECONDS = 10.0
"""Between two plain lines of one stage: a log that can be read."""


class ProgressBar:
    """One row per stage. `update` may be called from any thread, and takes documents as they come."""

    def __init__(self, stream: TextIO, console: Console | None = None) -> None:
        self._console = console or Console(file=stream, highlight=False)
        self._lock = threading.Lock()
        self._rows: dict[int, TaskID] = {}
        self._warned: set[str] = set()
        self._told, self._told_at = 0, time.monotonic()
        self._rich = RichProgress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            refresh_per_second=8,
        )
        self._open = False

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._rich.start()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the last state on the terminal."""
        with self._lock:
            if self._open and self._console.is_terminal:
                self._rich.stop()
            self._open = False

    def update(self, progress: Progress) -> None:
        """Draws a document."""
        with self._lock:
            if not self._open:
                return
            for warning in progress.warnings:
                if warning not in self._warned:
                    self._warned.add(warning)
                    self._console.print(Text(f"warning: {warning}"))
            if not progress.stages:
                return
            if self._console.is_terminal:
                self._draw(progress)
            else:
                self._print(progress)

    def _draw(self, progress: Progress) -> None:
        present = len(progress.stages) - 1
        for index, stage in enumerate(progress.stages):
            if index not in self._rows:
                self._rows[index] = self._rich.add_task(stage.name, total=None, text="")
            if stage.end is not None:
                self._rich.update(self._rows[index], total=1, completed=1, text=_ended(stage))
            elif index == present:
                total = progress.regions.total or None
                self._rich.update(
                    self._rows[index], total=total, completed=progress.regions.done, text=describe(progress)
                )

    def _print(self, progress: Progress) -> None:
        """A line for each stage that ended, and one every `PLAIN_SECONDS` for the present one."""
        ended = [stage for stage in progress.stages if stage.end is not None]
        for stage in ended[self._told :]:
            self._console.print(Text(f"{stage.name}: {_ended(stage)}"))
        now = time.monotonic()
        if len(ended) > self._told:
            self._told, self._told_at = len(ended), now
        elif len(ended) < len(progress.stages) and now - self._told_at >= PLAIN_SECONDS:
            self._told_at = now
            self._console.print(Text(f"{progress.stage}: {describe(progress)}"), soft_wrap=True)


def describe(progress: Progress) -> str:
    """The present stage in words: counts, rate, time left, workers, failures."""
    regions = progress.regions
    parts = []
    if regions.total:
        parts.append(f"{regions.done}/{regions.total}")
    if progress.rate:
        rate = progress.rate
        parts.append(f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each")
    if progress.eta_seconds is not None:
        parts.append(f"ETA {clock(progress.eta_seconds)}")
    if progress.workers:
        parts.append(f"{progress.workers} worker{'s' if progress.workers > 1 else ''}")
    if regions.failed:
        parts.append(f"{regions.failed} failed and tried again")
    return "  ".join(parts)


def _ended(stage: StageTimes) -> str:
    if stage.end is None:
        return "ended"
    return f"{(stage.end - stage.start).total_seconds():.1f} s"
