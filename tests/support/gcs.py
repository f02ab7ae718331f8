"""A Google Cloud Storage emulator for tests: fake-gcs-server, which enforces preconditions.

Not a mock: a server of its own process, in memory, that answers the JSON API. It knows no permissions
and never fails; `faulty_proxy` stands before it for that.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "v1.56.1"
MODULE = f"github.com/fsouza/fake-gcs-server@{VERSION}"
START_SECONDS = 20.0


@dataclass(frozen=True)
class GcsEmulator:
    """A running emulator."""

    endpoint: str
    """`http://host:port`."""

    def new_bucket(self) -> str:
        """Makes an empty bucket and returns its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        request = urllib.request.Request(
            f"{self.endpoint}/storage/v1/b?project=test",
            data=json.dumps({"name": name}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10):
            return name

    def storage_options(self, endpoint: str | None = None) -> dict[str, Any]:
        """`output.storageOptions` that lead here, or to a proxy before it."""
        return {"endpoint_url": endpoint or self.endpoint, "token": "anon", "project": "test"}


def server_binary() -> Path:
    """The emulator's executable, built from its Go module when the cache has none.

    Raises:
        RuntimeError: it is not there and cannot be built.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "influence-tests"
    binary = cache / "bin" / "fake-gcs-server"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several pytest processes may start at once
        if not binary.exists():
            _build(binary)
    return binary


def _build(binary: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise RuntimeError(
            f"{binary} is missing and there is no Go toolchain to build it: install Go >= 1.24, or put "
            f"fake-gcs-server {VERSION} there"
        )
    built = subprocess.run(
        [go, "install", "-trimpath", MODULE],
        # Without C it is one static file, which is an image of its own in the test cluster.
        env=os.environ | {"GOBIN": str(binary.parent), "CGO_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode != 0:
        raise RuntimeError(f"go install {MODULE} failed:\n{built.stderr[-2000:]}")


@contextmanager
def running_emulator() -> Iterator[GcsEmulator]:
    """An emulator in a process group of its own, so that tests may kill theirs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    process = subprocess.Popen(
        [
            str(server_binary()),
            *("-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)),
            *("-public-host", address, "-external-url", f"http://{address}", "-log-level", "error"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        emulator = GcsEmulator(f"http://{address}")
        _wait_until_ready(emulator, process)
        yield emulator
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_until_ready(emulator: GcsEmulator, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"fake-gcs-server ended with {process.returncode} before it answered")
        try:
            with urllib.request.urlopen(f"{emulator.endpoint}/storage/v1/b?project=test", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"fake-gcs-server did not answer within {START_SECONDS:g} s")
