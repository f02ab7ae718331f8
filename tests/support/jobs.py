"""Whole jobs for tests: a manifest in a folder, `influence run` in a process group of its own.

Nothing runs in the test's process, so whatever a test kills is what a user could lose. Processes are forked
from one that has imported torch (`preloaded`), unless a test asks for the installed command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import yaml

import preloaded
from influence_job.progress import Stage

SUPPORT = Path(__file__).parent
TIMEOUT_SECONDS = 120.0
INFLUENCE = str(Path(sys.executable).with_name("influence"))
COMMAND_LINE = "influence_job.cli:main"
"""What the installed command calls."""
SETTINGS = {
    "PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_NUM_THREADS": "1",
}
"""Environment of every process: where the tasks of the tests are found, and one thread."""

STAGES = [stage for stage in Stage if stage is not Stage.GRADIENTS]
"""Of a job that scores the examples it reads."""

BASE: dict[str, Any] = {
    "apiVersion": "influence-operator.dev/v1alpha1",
    "kind": "InfluenceJob",
    "metadata": {"name": "traced"},
    "spec": {
        "task": {"entrypoint": "traced_task:task"},
        "method": {"name": "Ekfac", "regularization": 0.05},
        "device": "cpu",
        "chunks": {"test": 8, "train": 32},
        "output": {"url": "unused"},
    },
}


@dataclass(frozen=True)
class Barrier:
    """A place where a run waits; see `barriers`."""

    function: str
    when: str
    pattern: str
    hit: int = 1

    def __str__(self) -> str:
        return f"{self.hit}. {self.function} of {self.pattern}, {self.when}"


@dataclass
class Run:
    """One `influence run`."""

    process: subprocess.Popen[bytes] | preloaded.Process
    folder: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll()

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> Run:
        """Waits for the end of the driver."""
        self.process.wait(timeout)
        return self

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = TIMEOUT_SECONDS) -> None:
        """Waits for a condition; fails when the run ends or time passes before it holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.code is None, f"the run ended with {self.code} before {what}:\n{self.stderr}"
            assert time.monotonic() < deadline, f"{timeout:.0f} s without {what}:\n{self.stderr}"
            time.sleep(0.005)

    def wait_for_barrier(self) -> None:
        """Waits until a process of the run stands at its barrier."""
        self.wait_until((self.folder / "reached").exists, "the barrier was reached")

    def open_barrier(self) -> None:
        """Lets the run go on."""
        (self.folder / "go").touch()

    def kill(self) -> None:
        """SIGKILL for the whole process group; returns when nothing of it runs any more."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait(30)
        deadline = time.monotonic() + 30
        while any(_belongs(process, self.process.pid) for process in psutil.process_iter()):
            assert time.monotonic() < deadline, "processes of the run survived SIGKILL"
            time.sleep(0.01)

    @property
    def workers(self) -> list[psutil.Process]:
        """Dask's workers of an installed command."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    @property
    def writes(self) -> list[str]:
        """Every file that the run put into place, by rename or link, in order."""
        return [path for event, path in self._events() if event != "os.remove"]

    def _events(self) -> list[tuple[str, str]]:
        log = self.folder / "writes"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(event, path) for event, _, path in (line.partition(" ") for line in lines)]


def _belongs(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


@dataclass
class Jobs:
    """Makes manifests below `folder` and runs them; `close` ends whatever still runs."""

    folder: Path
    runs: list[Run] = field(default_factory=list)
    installed: bool = False
    """All are runs of the installed command: torch for GPUs starts threads, which a fork would lack."""

    def manifest(self, changes: Mapping[str, Any] | None = None) -> Path:
        """A job file: `BASE` with changes to its spec, merged key by key; None takes a key out."""
        document = deepcopy(BASE)
        _merge(document["spec"], changes or {})
        path = self.folder / f"job-{len(list(self.folder.glob('job-*')))}.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    def start(
        self,
        manifest: Path,
        *options: str,
        output: str | Path | None = None,
        workers: int | None = 2,
        barrier: Barrier | None = None,
        pace: float | None = None,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        installed: bool = False,
    ) -> Run:
        """Starts `influence run`: the installed command if so told, or if it is below a command `prefix`."""
        installed = installed or self.installed
        folder = self.folder / f"run-{len(self.runs)}"
        folder.mkdir()
        settings = {
            **SETTINGS,
            "WRITES_LOG": str(folder / "writes"),
            **({} if pace is None else {"BARRIER_PACE": str(pace)}),
            **(env or {}),
        }
        if barrier is not None:
            text = f"{barrier.function} {barrier.when} {barrier.hit} {barrier.pattern}"
            settings |= {"BARRIER": text, "BARRIER_FOLDER": str(folder)}
        command = [*prefix, INFLUENCE, "run", str(manifest), *options]
        command += [] if output is None else ["--output", str(output)]
        command += [] if workers is None else ["--workers", str(workers)]
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = self._process(
                command,
                settings,
                out,
                err,
                spares=workers or 0,
                installed=installed or self.installed or bool(prefix),
            )
        run = Run(process, folder)
        self.runs.append(run)
        return run

    def run(self, manifest: Path, *options: str, timeout: float = TIMEOUT_SECONDS, **settings: Any) -> Run:
        """Runs to the end, whatever that is."""
        return self.start(manifest, *options, **settings).wait(timeout)

    def finish(self, manifest: Path, *options: str, **settings: Any) -> Run:
        """Runs to the end, which must be good."""
        run = self.run(manifest, *options, **settings)
        assert run.code == 0, f"exit code {run.code}:\n{run.stderr}"
        return run

    def plan(
        self, manifest: Path, *options: str, installed: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """`influence plan`, to its end."""
        command = [INFLUENCE, "plan", str(manifest), *options]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = self._process(command, SETTINGS, out, err, installed=installed)
            code = process.wait(TIMEOUT_SECONDS)
            said = [file.seek(0) or file.read().decode() for file in (out, err)]
        return subprocess.CompletedProcess(command, code, *said)

    def _process(
        self,
        command: Sequence[str],
        settings: Mapping[str, str],
        out: BinaryIO,
        err: BinaryIO,
        *,
        spares: int = 0,
        installed: bool,
    ) -> subprocess.Popen[bytes] | preloaded.Process:
        return preloaded.start(
            None if installed else COMMAND_LINE,
            command,
            cwd=self.folder,
            env={**os.environ, **settings},
            stdout=out,
            stderr=err,
            spares=spares,
        )

    def close(self) -> None:
        """Ends every run that a test left."""
        for run in self.runs:
            run.kill()


def _merge(document: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if value is None:
            document.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            document[key] = value


def times_written(run: Run, root: str | Path) -> Counter[str]:
    """How often a run wrote each object of the store at `root`."""
    inside = f"{Path(root)}/"
    return Counter(path.removeprefix(inside) for path in run.writes if path.startswith(inside))
