"""Processes that start without importing torch and Dask, two to four seconds of a core each.

They are forked from one process that has imported them (`preloaded_parent`), which is started when first
needed and ends with the tests' process. They differ from a command that a shell starts in who imported and
in that all have one seed of `hash`. So for every kind of thing a command does there is a test of the
installed one, and results of the forked are compared with those of the installed.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from influence_job.dask_settings import THREAD_SETTINGS

SUPPORT = Path(__file__).parent
START_SECONDS = 120.0


@dataclass
class Process:
    """A process, asked as one of `subprocess.Popen`."""

    args: Sequence[str]
    pid: int
    _report: int
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; raises subprocess.TimeoutExpired."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            self.returncode = int(os.read(self._report, 64))
            os.close(self._report)
        return self.returncode


def start(
    entry: str | None,
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdout: BinaryIO,
    stderr: BinaryIO,
    spares: int = 0,
) -> Process | subprocess.Popen[bytes]:
    """Starts a command in a session of its own, with /dev/null to read.

    `entry` ("module:function") is what the command runs, in a process that needs no imports; None starts the
    command itself. `spares` processes that it spawns by `multiprocessing` will need no imports either.
    """
    if entry is None:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    request = {"entry": entry, "argv": list(command), "cwd": str(cwd), "env": dict(env), "spares": spares}
    report, reported = os.pipe()
    descriptors = [stdout.fileno(), stderr.fileno(), reported]
    socket.send_fds(_parent(), [json.dumps(request).encode()], descriptors)
    os.close(reported)
    pid = b""
    while not pid.endswith(b"\n"):
        assert select.select([report], [], [], START_SECONDS)[0], "the preloaded process does not answer"
        byte = os.read(report, 1)
        assert byte, "the preloaded process has ended"
        pid += byte
    return Process(command, int(pid), report)


def output(entry: str, *arguments: object) -> str:
    """What `entry`, a function of a module of this folder, prints; it must return."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = [entry, *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(SUPPORT)}
        code = start(entry, command, cwd=SUPPORT, env=env, stdout=out, stderr=err).wait()
        err.seek(0)
        assert code == 0, err.read().decode()[-2000:]
        out.seek(0)
        return out.read().decode()


@functools.cache
def _parent() -> socket.socket:
    """Where the process that forks takes requests; it ends when this end is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "preloaded_parent.py"), str(theirs.fileno())],
            env={**os.environ, **THREAD_SETTINGS},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the tests
        )
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours
