"""`influence drive`: one attempt of a job in a cluster, in the driver's pod.

Called by the operator's driver Job, never by people. The process answers at `/progress` before it imports
torch, ends with one of the documented exit codes whatever happens, and leaves the progress document as the
pod's termination message.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click
from pydantic import ValidationError

from influence_job.cli.progress_lines import ProgressLines
from influence_job.document import (
    DIRECTORY,
    FILE,
    METRICS_PORT,
    PROGRESS_PORT,
    TLS_DIRECTORY,
    JobDocument,
)
from influence_job.driver.reporting import ProgressTracker
from influence_job.driver.stop import Stop, stopped_by_signals
from influence_job.errors import InfrastructureError, JobError, PermanentError, Reason, ended_with
from influence_job.exit_codes import ExitCode
from influence_job.identity import JobIdentity
from influence_job.job_file import parse_job
from influence_job.progress import CONTRACT_VERSION
from influence_job.termination import leave
from influence_job.yaml_lines import Document

TERMINATION_LOG = "/dev/termination-log"
LAST_SECONDS = 20.0
"""A process that was told to stop, or is done, ends within this time, whatever hangs in it: less than the
pod's grace period, after which the kubelet kills it without a word."""

_file = click.Path(dir_okay=False, path_type=Path)
_folder = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option(
    "--document",
    type=_file,
    default=f"{DIRECTORY}/{FILE}",
    show_default=True,
    help="What the operator asks for.",
)
@click.option(
    "--tls",
    type=_folder,
    default=TLS_DIRECTORY,
    show_default=True,
    help="Folder with ca.crt, tls.crt and tls.key.",
)
@click.option(
    "--termination-message",
    type=_file,
    default=TERMINATION_LOG,
    show_default=True,
    help="Where the last words go.",
)
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to serve on.")
@click.option(
    "--progress-port",
    type=click.IntRange(0, 65535),
    default=PROGRESS_PORT,
    show_default=True,
    help="Serve /progress and /healthz.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=METRICS_PORT,
    show_default=True,
    help="Serve /metrics.",
)
def drive(
    document: Path, tls: Path, termination_message: Path, host: str, progress_port: int, metrics_port: int
) -> None:
    """Run one attempt of a job in a cluster.

    The operator starts this in the driver's pod; there is no use for it elsewhere. It waits for the
    attempt's scheduler, which needs not be there yet, and exits with one of the codes below.
    """
    from influence_job.server import serving

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    tracker = ProgressTracker(JobIdentity("", 0), ProgressLines())
    end = _End(tracker, termination_message)
    with stopped_by_signals() as stop:
        try:
            with serving(tracker.snapshot, host, progress_port, metrics_port):
                end.watch(stop)
                _drive(document, tls, tracker, stop)
                end.now(ExitCode.DONE)
        except BaseException as error:  # SystemExit of somebody's code, too: it must not look like success
            code = _told(error)
            tracker.fail(ended_with(error))
            end.now(code)


def _drive(path: Path, tls: Path, tracker: ProgressTracker, stop: Stop) -> None:
    raw = _load(path)
    identity = _identity(raw)
    tracker.update(job_uid=identity.uid, attempt=identity.attempt)
    document = _parse(raw, str(path))
    from influence_job.remote import run_remote

    run_remote(document, identity, tls, tracker, stop)


def _load(path: Path) -> dict[str, Any]:
    """The document as it stands in the file.

    Raises:
        PermanentError: there is none, or it is no JSON object.
    """
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PermanentError(
            Reason.INVALID_SPEC, f"{path}: expected the operator's job document: {error}"
        ) from error
    if not isinstance(raw, dict):
        raise PermanentError(Reason.INVALID_SPEC, f"{path}: expected a JSON object, got {str(raw)[:40]!r}")
    return raw


def _identity(raw: dict[str, Any]) -> JobIdentity:
    """Who runs, as far as the document can be read: last words that name no job are nobody's."""
    uid, attempt = raw.get("uid"), raw.get("attempt")
    return JobIdentity(
        uid=uid[:64] if isinstance(uid, str) else "",
        attempt=attempt if isinstance(attempt, int) and attempt >= 0 else 0,
        pod=os.environ.get("POD_NAME") or socket.gethostname(),
    )


def _parse(raw: dict[str, Any], source: str) -> JobDocument:
    """The document, checked.

    Raises:
        PermanentError: ImageIncompatible, or InvalidSpec with every problem.
    """
    version = raw.get("contractVersion")
    if version != CONTRACT_VERSION:
        raise PermanentError(
            Reason.IMAGE_INCOMPATIBLE,
            f"{source}: contractVersion: expected {CONTRACT_VERSION}, got {version!r}; set "
            f"spec.image to one of the operator's release",
        )
    job = parse_job(Document(raw.get("job")), source)
    try:
        return JobDocument.model_validate({**raw, "job": job})
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        ]
        raise PermanentError(Reason.INVALID_SPEC, f"{source}: {'; '.join(problems)}") from error


def _told(error: BaseException) -> ExitCode:
    """The exit code of what ended the attempt, which stands in the log from then on."""
    if isinstance(error, JobError):
        print(f"error: {error.reason}: {error.message}", file=sys.stderr)
        return error.exit_code
    traceback.print_exception(error)
    return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.INTERNAL


class _End:
    """The end of the process: last words and exit code, once, and for certain.

    Not by returning: threads of Dask and of storage clients can hold an interpreter that exits for minutes.
    """

    def __init__(self, tracker: ProgressTracker, termination_message: Path) -> None:
        self._tracker = tracker
        self._path = termination_message
        self._once = threading.Lock()

    def now(self, code: ExitCode) -> NoReturn:
        """Ends the process."""
        self._once.acquire()  # whoever comes second waits for the end
        leave(self._path, self._tracker.snapshot())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def watch(self, stop: Stop) -> None:
        """Ends the process some time after it should have ended by itself."""
        threading.Thread(target=self._watch, args=(stop,), name="end", daemon=True).start()

    def _watch(self, stop: Stop) -> None:
        while not (stop.asked or self._tracker.snapshot().finished):
            time.sleep(1.0)
        time.sleep(LAST_SECONDS)
        if self._tracker.snapshot().finished:
            self.now(ExitCode.DONE)
        message = f"told to stop, and still busy {LAST_SECONDS:.0f} s later"
        self._tracker.fail(InfrastructureError(Reason.TERMINATED, message))
        self.now(ExitCode.RETRY)
