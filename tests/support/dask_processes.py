"""Dask's scheduler and workers as the operator runs them: their own processes, under the attempt's TLS.

Commands and environment are those of the pods, but for addresses: a test may kill any of them, and start it
again.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import preloaded
from influence_job.dask_settings import SETTINGS, THREAD_SETTINGS
from influence_operator.cluster.certificates import attempt_material
from influence_operator.manifests.environment import dask_environment
from jobs import SUPPORT, Run, times_written

START_SECONDS = 30.0


def certificate(folder: Path) -> Path:
    """A folder with the TLS material of a new attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    for name, content in attempt_material("test", now, now + timedelta(days=1)).items():
        (folder / name).write_text(content)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


DaskProcess = subprocess.Popen[bytes] | preloaded.Process


class DaskProcesses:
    """A scheduler and workers, each a process that a test may kill and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tls = certificate(folder / "tls")
        self.address = f"tls://127.0.0.1:{free_port()}"
        self._http = free_port()
        self.environment: dict[str, str] = {}
        self.installed = False
        """Whether to start the installed commands, as pods do, instead of forks (`preloaded`)."""
        self.processes: list[DaskProcess] = []

    def scheduler(self) -> DaskProcess:
        """Starts a scheduler at `address`; returns when it answers."""
        process = self._start(
            *("scheduler", "--protocol", "tls", "--host", "127.0.0.1"),
            *("--port", self.address.rpartition(":")[2], "--dashboard-address", f"127.0.0.1:{self._http}"),
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert process.poll() is None, self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)
        return process

    def worker(self, *options: str) -> DaskProcess:
        """Starts a worker, which looks for the scheduler."""
        return self._start(
            *("worker", self.address, "--nthreads", "1", "--nworkers", "1", "--no-nanny", "--no-dashboard"),
            *("--memory-limit", "0", "--local-directory", str(self.folder), *options),
        )

    def retire(self, port: int) -> None:
        """Asks the scheduler to let the worker at `port` go, as a pod's preStop hook does."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._http}/api/v1/retire_workers",
            data=json.dumps({"workers": [f"tls://127.0.0.1:{port}"]}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert str(port) in answer.read().decode()

    def kill(self) -> None:
        """SIGKILL for everything that runs."""
        for process in self.processes:
            process.kill()
            process.wait()

    def times_written(self, root: Path) -> Counter[str]:
        """How often the workers wrote each object of the store at `root`."""
        return times_written(Run(self.processes[-1], self.folder), root)

    def logs(self) -> str:
        """What all processes have said."""
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(self.folder.glob("dask-*.log")))

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/health", timeout=1):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def _start(self, *arguments: str) -> DaskProcess:
        files = {"ca-file": "ca.crt"} | {f"{r}.{p}": f"tls.{end}" for r in ROLES for p, end in PARTS}
        settings = SETTINGS | {"distributed.scheduler.http.routes": ROUTES}
        settings |= {"distributed.comm.require-encryption": True}
        settings |= {f"distributed.comm.tls.{key}": str(self.tls / name) for key, name in files.items()}
        environment = {
            **os.environ,
            "PYTHONPATH": str(SUPPORT),
            "WRITES_LOG": str(self.folder / "writes"),
            **THREAD_SETTINGS,
            **dask_environment(settings),
            **self.environment,
        }
        # A scheduler imports no torch: it is to be seen as small as it is.
        entry = None if self.installed or arguments[0] == "scheduler" else "dask.__main__:main"
        with (self.folder / f"dask-{len(self.processes)}-{arguments[0]}.log").open("wb") as log:
            command = [str(Path(sys.executable).with_name("dask")), *arguments]
            process = preloaded.start(
                entry, command, cwd=self.folder, env=environment, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process


ROUTES = ["distributed.http.scheduler.api", "distributed.http.health"]
ROLES = ("scheduler", "worker", "client")
PARTS = (("cert", "crt"), ("key", "key"))
