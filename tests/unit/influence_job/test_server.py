"""The driver's HTTP: short answers, at once, whoever asks."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import pytest

from dask_processes import free_port
from influence_job.document import PROGRESS_BYTES
from influence_job.driver.reporting import ProgressTracker
from influence_job.errors import PermanentError, Reason
from influence_job.identity import JobIdentity
from influence_job.progress import Progress
from influence_job.server import serving


@pytest.fixture
def tracker() -> ProgressTracker:
    """That of a job with the longest texts there can be."""
    made = ProgressTracker(JobIdentity("uid", 1), lambda _: None)
    for number in range(20):
        made.warn(f"{number}" + "\x01" * 5000)
    made.fail(PermanentError(Reason.INVALID_TASK, "\x02" * 5000))
    made.update(result={"url": "\x03" * 2048})
    return made


@pytest.fixture
def port(tracker: ProgressTracker) -> Iterator[int]:
    """Where it is served."""
    number = free_port()
    with serving(tracker.snapshot, "127.0.0.1", number, None):
        yield number


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return bytes(answer.read())


def test_progress_is_never_longer_than_its_readers_read(port: int) -> None:
    answer = get(port, "/progress")
    assert len(answer) <= PROGRESS_BYTES
    assert Progress.model_validate_json(answer).last_error is not None


def test_clients_that_never_finish_asking_keep_nobody_waiting(port: int) -> None:
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for connection in slow:
        connection.sendall(b"GET /prog")
    assert get(port, "/healthz") == b"ok\n"
    for connection in slow:
        connection.close()
