"""An S3 emulator for tests: moto's server, which honours `If-None-Match: *`.

A server of its own process, in memory. moto looks for an object and then writes it, where S3 does both in
one step, so requests enter it one at a time: that makes a create-only write atomic here too. It asks for
no valid credentials and never fails.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

HOST = "127.0.0.1"
START_SECONDS = 60.0


@dataclass(frozen=True)
class S3Emulator:
    """A running emulator."""

    endpoint: str
    """`http://host:port`."""

    def new_bucket(self) -> str:
        """Makes an empty bucket and returns its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=10):
            return name

    def storage_options(self) -> dict[str, Any]:
        """`output.storageOptions` that lead here."""
        return {"endpoint_url": self.endpoint, "key": "any", "secret": "any"}


@contextmanager
def running_emulator() -> Iterator[S3Emulator]:
    """An emulator in a process group of its own, so that tests may kill theirs."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, __file__, str(port)],
        env=os.environ | {"PYTHONSAFEPATH": "1"},  # this folder is no place to import from
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        emulator = S3Emulator(f"http://{HOST}:{port}")
        _wait_until_ready(emulator, process)
        yield emulator
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_until_ready(emulator: S3Emulator, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"moto's server ended with {process.returncode} before it answered")
        try:
            with urllib.request.urlopen(f"{emulator.endpoint}/moto-api/", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"moto's server did not answer within {START_SECONDS:g} s")


def _serve(port: int) -> None:
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)
    one_at_a_time = threading.Lock()

    def entered(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with one_at_a_time:
            return list(app(environ, start_response))

    make_server(HOST, port, entered, threaded=True, request_handler=MotoRequestHandler).serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
