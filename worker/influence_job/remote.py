"""A job in a cluster: the same driver as on one machine, with scheduler and workers in other pods.

`run_remote` is what `influence drive` calls. It speaks to the scheduler of the attempt and to nobody else:
both sides show a certificate that the attempt's own authority signed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
from distributed import Client
from distributed.security import Security
from distributed.utils import LoopRunner

from influence_job.dask_settings import SETTINGS
from influence_job.document import JobDocument
from influence_job.driver.connection import NoSchedulerError
from influence_job.driver.reporting import ProgressTracker
from influence_job.driver.run import run
from influence_job.driver.stop import Stop
from influence_job.errors import PermanentError, Reason
from influence_job.identity import JobIdentity
from influence_job.progress import Progress

CONNECT_SECONDS = 5.0
"""One try to reach the scheduler; a stop is obeyed between two."""


def run_remote(
    document: JobDocument, identity: JobIdentity, tls: Path, tracker: ProgressTracker, stop: Stop
) -> Progress:
    """Runs one attempt of the document's job and returns its last progress document.

    Args:
        document: what the operator asks for.
        identity: who runs, as the claim on the store records it.
        tls: the folder with the attempt's `ca.crt`, `tls.crt` and `tls.key`.
        tracker: the progress document, which others serve.
        stop: asked by a signal handler.

    Raises:
        JobError: with the reason and the exit code.
    """
    security = _security(document.scheduler, tls)
    dask.config.set(SETTINGS)
    with _connecting(document.scheduler, security) as connect:
        return run(document.job, identity, connect, tracker, stop, trust_finished=True)


def _security(address: str, tls: Path) -> Security:
    """What the client shows and asks for.

    Raises:
        PermanentError: the scheduler is to be spoken to in the open, or a file is missing.
    """
    if not address.startswith("tls://"):
        raise PermanentError(
            Reason.INVALID_SPEC,
            f"scheduler: expected an address tls://host:port, got {address!r}; whoever answers in the open "
            f"could run code here",
        )
    files = {name: tls / name for name in ("ca.crt", "tls.crt", "tls.key")}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise PermanentError(
            Reason.INVALID_SPEC,
            f"expected the attempt's certificate, found no {', '.join(missing)}; mount the "
            f"attempt's Secret there",
        )
    return Security(
        require_encryption=True,
        tls_ca_file=str(files["ca.crt"]),
        tls_client_cert=str(files["tls.crt"]),
        tls_client_key=str(files["tls.key"]),
    )


@contextmanager
def _connecting(address: str, security: Security) -> Iterator[Callable[[], Client]]:
    """A function that connects once to the scheduler at `address`."""
    # One loop for all clients: each that finds no scheduler would leave the thread of its own behind.
    runner = LoopRunner()
    runner.start()

    def connect() -> Client:
        try:
            return Client(
                address, security=security, timeout=CONNECT_SECONDS, loop=runner.loop, set_as_default=False
            )
        except (OSError, TimeoutError) as error:  # a name that does not resolve yet is one, too
            raise NoSchedulerError(str(error)) from error

    try:
        yield connect
    finally:
        runner.stop()
