"""What the end of an attempt means: is the job done or failed, may another attempt follow, does it count.

Exit code 0 is the result, 64 what no retry can cure. 75, infrastructure lost, counts against `backoffLimit`
only if the attempt recorded no region, and so does an exit code that cannot be read any more, unless no
container of the pod ever ran; every other failure counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from influence_job.exit_codes import ExitCode
from influence_job.progress import Problem, Progress
from influence_operator.decisions import driver, words
from influence_operator.decisions.driver import DriverEnd
from influence_operator.decisions.reasons import Reason


class Verdict(Enum):
    """What follows from an attempt's end."""

    COMPLETE = "complete"
    FAILED = "failed"
    """No further attempt, whatever `backoffLimit` says."""
    AGAIN = "again"
    """Another attempt, unless too many failures were counted."""
    STOPPED = "stopped"
    """Ended on purpose; another attempt may start without delay."""


@dataclass(frozen=True)
class Ending:
    """The end of an attempt, or of a job between two attempts."""

    verdict: Verdict
    reason: str
    message: str
    at: datetime
    counted: bool = False
    exit_code: int | None = None


def judge(end: DriverEnd, recorded: int) -> Ending:
    """What a driver's end means.

    Args:
        end: the end.
        recorded: ledger rows that the attempt is known to have written.
    """
    problem = _problem(end.progress) if end.progress else None
    match end.exit_code:
        case ExitCode.DONE:
            return Ending(Verdict.COMPLETE, Reason.COMPLETE, "the result is stored", end.at, exit_code=0)
        case ExitCode.PERMANENT:
            verdict, counted, otherwise = Verdict.FAILED, False, Reason.PERMANENT_ERROR
        case ExitCode.RETRY | None:
            counted = recorded == 0 and end.ran
            verdict, otherwise = Verdict.AGAIN, Reason.DRIVER_LOST
        case _:
            verdict, counted, otherwise = Verdict.AGAIN, True, Reason.DRIVER_FAILED
    if end.out_of_memory:
        problem = Problem(
            reason=Reason.OUT_OF_MEMORY,
            message="the driver was killed at its memory limit; raise driver.resources.limits.memory",
        )
    reason = words.reason_or(problem.reason, otherwise) if problem else otherwise
    said = problem.message if problem else _without_problem(end)
    message = words.sentence(f"{end.cause}; {said}" if end.cause else said)
    return Ending(verdict, reason, message, end.at, counted, end.exit_code)


def _problem(progress: Progress) -> Problem | None:
    if not driver.understood(progress):
        return Problem(reason=Reason.IMAGE_INCOMPATIBLE, message=driver.other_contract(progress))
    return progress.last_error


def _without_problem(end: DriverEnd) -> str:
    if end.exit_code is None:
        return end.words or "the driver's exit code cannot be read any more"
    said = f": {end.words}" if end.words and end.progress is None else ""
    return f"the driver ended with exit code {end.exit_code}{said}"
