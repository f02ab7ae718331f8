"""How the driver of an attempt stands: whether it can be read, whether it has ended, with which exit code and
which last words.

The Job's conditions decide, because its controller replaces a pod that was disrupted: that pod's end is not
the attempt's. The last words are the progress document in the pod's termination message; a job's pods run
users' code, so it is parsed, and dropped when it is none or speaks of another job.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from pydantic import BaseModel, Field

from influence_job.exit_codes import ExitCode
from influence_job.progress import CONTRACT_VERSION, Progress
from influence_job.status import AttemptsStatus, ConditionType
from influence_operator.decisions import observed, words
from influence_operator.decisions.reasons import Reason
from influence_operator.decisions.snapshot import Object
from influence_operator.decisions.view import View, of_this_job
from influence_operator.manifests.names import Role

MESSAGE_CHARACTERS = 64 * 1024
"""The kubelet keeps 4 KiB; more than this nobody parses."""
UNREAD_SECONDS = 20.0
"""A ready driver that cannot be read for so long is told of; a single answer may be late."""
_RAN = (("state", "running"), ("state", "terminated"), ("lastState", "terminated"))


class Envelope(BaseModel):
    """What documents of every contract version have."""

    contract_version: int = Field(alias="contractVersion")
    job_uid: str = Field(alias="jobUid", max_length=64)
    attempt: int = Field(ge=0)

    def progress(self) -> Progress:
        """The document of another contract, as far as it can be read for certain."""
        return Progress(contract_version=self.contract_version, job_uid=self.job_uid, attempt=self.attempt)


@dataclass(frozen=True)
class DriverEnd:
    """An attempt's driver that runs no more and will not be replaced."""

    exit_code: int | None
    """None: it cannot be read any more."""
    at: datetime
    words: str = ""
    """The kubelet's or our own, when the driver left none."""
    cause: str = ""
    """Why the kubelet ended its pod, or did not take it: an eviction, a node that was full."""
    ran: bool = True
    """Whether any container of its pod ever did."""
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


def other_contract(progress: Progress) -> str:
    """Why a document is not understood."""
    return (
        f"the driver's image speaks contract version {progress.contract_version}, expected "
        f"{CONTRACT_VERSION} or {CONTRACT_VERSION - 1}; set image to one of this operator's release"
    )


def unread(view: View, attempt: int) -> str:
    """Why the operator cannot read `/progress` of a ready driver; empty while it can, and for some seconds.

    What was told stays told until a document comes, also by a new leader.
    """
    report, pod = view.snapshot.driver, driver_pod(view, attempt)
    if report is None or report.attempt != attempt or not report.problem:
        return ""
    if pod is None or not observed.ready(pod):
        return ""
    stored = view.condition(ConditionType.CLUSTER_READY)
    told = stored is not None and stored.reason == Reason.DRIVER_UNREACHABLE
    if not told and view.seconds_since(report.unread_since) < UNREAD_SECONDS:
        return ""
    return words.sentence(f"the operator cannot read /progress: {report.problem}")


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
            cause=_cause(pod),
            out_of_memory=observed.text(state, "reason") == "OOMKilled",
            progress=_last_words(observed.text(state, "message"), view, attempts.current),
        )
    return _end_without_code(view, pod) if observed.text(pod, "status", "phase") == "Failed" else None


def _end_without_code(view: View, pod: Object) -> DriverEnd | None:
    """The end of a pod that its kubelet ended before the driver ran, or did not take at all."""
    states = [observed.look(c, *at) for c in observed.containers(pod) for at in _RAN]
    ran, cause = any(state is not None for state in states), _cause(pod)
    if ran and not cause:
        return None
    times = [observed.created(pod), *(observed.moment(state, "finishedAt") for state in states)]
    last = max((time for time in times if time), default=view.now)
    said = "" if ran else "no container of the driver's pod ran"
    return DriverEnd(None, min(last, view.now), said, cause, ran)


def _cause(pod: Object) -> str:
    """What the kubelet says of the pod as a whole; nothing of one whose containers ended by themselves."""
    said = (observed.text(pod, "status", "reason"), observed.text(pod, "status", "message"))
    return ": ".join(part for part in (text.strip().rstrip(".") for text in said) if part)


def _last_words(message: str, view: View, attempt: int) -> Progress | None:
    if len(message) > MESSAGE_CHARACTERS:
        return None
    try:
        progress = Progress.model_validate_json(message)
    except ValueError:
        return _of_another_contract(message, view, attempt)
    return of_this_job(progress, view.uid, attempt)


def _of_another_contract(message: str, view: View, attempt: int) -> Progress | None:
    try:
        envelope = Envelope.model_validate_json(message)
    except ValueError:
        return None
    if envelope.contract_version == CONTRACT_VERSION:
        return None
    return of_this_job(envelope.progress(), view.uid, attempt)


def _unreadable(view: View, reason: str, message: str) -> DriverEnd:
    """The Job failed and its pod is gone; its policy's rule tells exit code 64 all the same."""
    code = ExitCode.PERMANENT.value if reason == "PodFailurePolicy" else None
    return DriverEnd(code, view.now, message)


def _lost(view: View, pods: list[Object]) -> DriverEnd | None:
    if not pods or not all(map(view.lost, pods)):
        return None
    said = f"pod {observed.name(pods[0])} has been ending for too long: its node does not answer"
    return DriverEnd(None, view.now, said)
