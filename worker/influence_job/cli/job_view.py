"""A job of a cluster on a terminal: a line when its phase changes, a progress bar per attempt."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from influence_job.cli.progress_bar import ProgressBar
from influence_job.exit_codes import ExitCode
from influence_job.progress import Progress, Regions, StageTimes
from influence_job.status import Condition, ConditionType, InfluenceJobStatus, Phase

Job = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    code: ExitCode
    text: str


class JobView:
    """Draws each state of a job that `show` is given."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console = Console(file=stream, highlight=False)
        self._bar: ProgressBar | None = None
        self._attempt = 0
        self._headline = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the last state on the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def show(self, job: Job) -> None:
        """Draws a state."""
        status = read_status(job)
        attempt = status.attempts.current if status.attempts else 0
        if attempt != self._attempt:
            self.close()  # the stages begin anew, below those of the last attempt
            self._attempt = attempt
        headline = _headline(status)
        if headline != self._headline:
            self._headline = headline
            self._console.print(Text(f"{job['metadata']['name']}: {headline}"), soft_wrap=True)
        if status.stages:
            if self._bar is None:
                self._bar = ProgressBar(self._stream, self._console).__enter__()
            self._bar.update(_progress(job, status))


def read_status(job: Job) -> InfluenceJobStatus:
    """The status, without the parts that this version cannot read."""
    raw = dict(job.get("status") or {})
    while True:
        try:
            return InfluenceJobStatus.model_validate(raw)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                raw.pop(str(details["loc"][0]), None)


def ended(job: Job, status: InfluenceJobStatus, *, deleted: bool) -> Outcome | None:
    """How the job ended; None while it may still move. A state of an older generation decides nothing."""
    url = job["spec"]["output"]["url"]
    if deleted:
        return Outcome(ExitCode.PERMANENT, f"deleted; what it stored is still at {url}")
    if status.observed_generation < job["metadata"]["generation"]:
        return None
    if _holding(status, ConditionType.COMPLETE):
        result = status.result
        size = " × ".join(map(str, result.shape)) if result and result.shape else "the result"
        dtype = f" {result.dtype}" if result and result.dtype else ""
        where = result.url if result else url
        return Outcome(ExitCode.DONE, f"complete: {size}{dtype} in {where}\nnext: influence show {where}")
    failed = _holding(status, ConditionType.FAILED)
    if failed:
        return Outcome(ExitCode.PERMANENT, f"failed: {_words(failed)}")
    return None


def _headline(status: InfluenceJobStatus) -> str:
    """The phase, and while it does not run why."""
    phase = str(status.phase or "not yet seen by the operator")
    if status.phase in (Phase.COMPLETE, Phase.FAILED):
        return phase  # the outcome says the rest
    cause = (
        _holding(status, ConditionType.STALLED)
        or _holding(status, ConditionType.CLUSTER_READY, "False")
        or _holding(status, ConditionType.READY, "False")
    )
    return f"{phase}  {_words(cause)}" if cause else phase


def _words(condition: Condition) -> str:
    return _printable(f"{condition.reason}: {condition.message}")


def _printable(text: str) -> str:
    """Without what moves a terminal's cursor: a job's pods run anybody's code, and this repeats its words."""
    return "".join(character if character.isprintable() else " " for character in text)


def _holding(status: InfluenceJobStatus, kind: ConditionType, value: str = "True") -> Condition | None:
    return next((c for c in status.conditions if c.type == kind and c.status == value), None)


def _progress(job: Job, status: InfluenceJobStatus) -> Progress:
    """The progress document of which the status is an extract."""
    progress = status.progress
    return Progress(
        job_uid=job["metadata"]["uid"],
        attempt=status.attempts.current if status.attempts else 0,
        stage=status.stage or status.stages[-1].name,
        stages=[StageTimes(name=s.name, start=s.start, end=s.end) for s in status.stages],
        regions=Regions(done=progress.done, total=progress.total, failed=progress.failed)
        if progress
        else Regions(),
        rate=progress.rate if progress else None,
        eta_seconds=progress.eta_seconds if progress else None,
        workers=status.workers.ready if status.workers else 0,
        warnings=[_printable(warning) for warning in status.warnings],
    )
