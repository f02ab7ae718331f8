"""How the driver of an attempt stands: whether it has ended, with which exit code and which last words.

The Job's conditions decide, because its controller replaces a pod that was disrupted: that pod's end is not
the attempt's. The last words are the progress document in the pod's termination message; a job's pods run
users' code, so it is parsed, and dropped when it is none or speaks of another job.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from influence_job.exit_codes import ExitCode
from influence_job.progress import CONTRACT_VERSION, Progress
from influence_job.status import AttemptsStatus
from influence_operator.decisions import observed
from influence_operator.decisions.snapshot import Object
from influence_operator.decisions.view import View, of_this_job
from influence_operator.manifests.names import Role

MESSAGE_CHARACTERS = 64 * 1024
"""The kubelet keeps 4 KiB; more than this nobody parses."""


@dataclass(frozen=True)
class DriverEnd:
    """An attempt's driver that runs no more and will not be replaced."""

    exit_code: int | None
    """None: it cannot be read any more."""
    at: datetime
    words: str = ""
    """The kubelet's or our own, when the driver left none."""
    out_of_memory: bool = False
    progress: Progress | None = None
    """What it left in its termination message."""


def driver_end(view: View, attempts: AttemptsStatus) -> DriverEnd | None:
    """How the driver of the present attempt ended; None while it runs, or is still to be made."""
    job = view.driver_job(attempts.current)
    if job is None:
        return DriverEnd(None, view.now, "the driver's Job is gone") if attempts.driver else None
    pods = view.pods(attempts.current, Role.DRIVER)
    ends = [end for pod in pods if (end := _pod_end(view, attempts, pod))]
    last = max(ends, key=lambda end: end.at, default=None)
    if observed.holds(job, "Complete") or observed.holds(job, "SuccessCriteriaMet"):
        return replace(last or DriverEnd(0, view.now), exit_code=ExitCode.DONE.value)
    failed = observed.condition(job, "Failed") or observed.condition(job, "FailureTarget")
    if observed.text(failed, "status") == "True":
        return last or _unreadable(view, observed.text(failed, "reason"), observed.text(failed, "message"))
    if last and last.exit_code in (ExitCode.DONE, ExitCode.PERMANENT):
        return last  # the Job's controller will say the same in a moment
    return _lost(view, [pod for pod in pods if not observed.ended(pod)])


def driver_pod(view: View, attempt: int) -> Object | None:
    """The pod in which the driver runs or will run, if it is to stay."""
    pods = view.pods(attempt, Role.DRIVER)
    alive = [pod for pod in pods if not observed.ended(pod) and not observed.being_deleted(pod)]
    return alive[0] if alive else None


def understood(progress: Progress) -> bool:
    """Whether this operator knows the document's contract: its own, and the one before."""
    return progress.contract_version in (CONTRACT_VERSION, CONTRACT_VERSION - 1)


def recorded(progress: Progress) -> int:
    """Ledger rows that the attempt wrote; of a driver that does not count them, those that are done."""
    count = progress.regions.done if progress.recorded is None else progress.recorded
    return min(count, 2**53)


def _pod_end(view: View, attempts: AttemptsStatus, pod: Object) -> DriverEnd | None:
    for container in observed.entries(pod, "status", "containerStatuses"):
        state = observed.look(container, "state", "terminated")
        code = observed.whole(state, "exitCode")
        if observed.text(container, "name") != Role.DRIVER.value or code is None or abs(code) > 255:
            continue
        finished = observed.moment(state, "finishedAt") or view.now
        return DriverEnd(
            exit_code=code,
            at=min(finished, view.now),
            words=observed.text(state, "message"),
            out_of_memory=observed.text(state, "reason") == "OOMKilled",
            progress=_last_words(observed.text(state, "message"), view, attempts.current),
        )
    return None


def _last_words(message: str, view: View, attempt: int) -> Progress | None:
    if len(message) > MESSAGE_CHARACTERS:
        return None
    try:
        return of_this_job(Progress.model_validate_json(message), view.uid, attempt)
    except ValueError:
        return None


def _unreadable(view: View, reason: str, message: str) -> DriverEnd:
    """The Job failed and its pod is gone; its policy's rule tells exit code 64 all the same."""
    code = ExitCode.PERMANENT.value if reason == "PodFailurePolicy" else None
    return DriverEnd(code, view.now, message)


def _lost(view: View, pods: list[Object]) -> DriverEnd | None:
    if not pods or not all(map(view.lost, pods)):
        return None
    words = f"pod {observed.name(pods[0])} has been ending for too long: its node does not answer"
    return DriverEnd(None, view.now, words)
