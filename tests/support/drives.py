"""Drivers for tests: `influence drive` with a job document, as the operator's Job starts it."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import preloaded
from dask_processes import free_port
from influence_job.document import TERMINATION_BYTES, JobDocument
from influence_job.progress import Progress
from influence_job.spec import InfluenceJob
from jobs import COMMAND_LINE, INFLUENCE, SUPPORT, Jobs, Run

UID = "7d3c9a52-0000-4000-8000-000000000000"


@dataclass
class Drive(Run):
    """One `influence drive`."""

    progress_port: int = 0
    metrics_port: int = 0

    @property
    def last_words(self) -> Progress:
        """The termination message, which must be valid and short."""
        message = (self.folder / "termination").read_bytes()
        assert len(message) <= TERMINATION_BYTES
        return Progress.model_validate_json(message)

    @property
    def progress(self) -> Progress:
        """What `/progress` answers now."""
        return Progress.model_validate_json(self.get(self.progress_port, "/progress"))

    def get(self, port: int, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return bytes(answer.read())

    def answers(self) -> bool:
        """Whether /healthz does."""
        try:
            return self.get(self.progress_port, "/healthz") == b"ok\n"
        except OSError:
            return False


@dataclass
class Drives:
    """Starts drivers of one job; what still runs at the end is killed with the runs of `jobs`."""

    jobs: Jobs
    tls: Path
    scheduler: str
    environment: dict[str, str] = field(default_factory=dict)
    installed: bool = False
    """Whether to start the installed command, as a pod does, instead of a fork (`preloaded`)."""

    def document(
        self, changes: Mapping[str, Any], *, uid: str = UID, attempt: int = 1, **fields: Any
    ) -> dict[str, Any]:
        """The job document of the traced job with changes to its spec."""
        manifest = yaml.safe_load(self.jobs.manifest(changes).read_text())
        job = InfluenceJob.model_validate(manifest, by_alias=True, by_name=False)
        made = JobDocument(uid=uid, attempt=attempt, scheduler=self.scheduler, job=job)
        return {**made.model_dump(mode="json", by_alias=True), **fields}

    def start(self, document: Any, **environment: str) -> Drive:
        """Starts a driver that reads this document."""
        folder = self.jobs.folder / f"drive-{len(self.jobs.runs)}"
        folder.mkdir()
        (folder / "job.json").write_text(document if isinstance(document, str) else json.dumps(document))
        ports = free_port(), free_port()
        command = [
            *(INFLUENCE, "drive"),
            *("--document", str(folder / "job.json"), "--tls", str(self.tls), "--host", "127.0.0.1"),
            *("--progress-port", str(ports[0]), "--metrics-port", str(ports[1])),
            *("--termination-message", str(folder / "termination")),
        ]
        settings = {
            **os.environ,
            "PYTHONPATH": str(SUPPORT),
            "POD_NAME": "driver-pod",
            "OMP_NUM_THREADS": "1",
            "WRITES_LOG": str(folder / "writes"),
            **self.environment,
            **environment,
        }
        entry = None if self.installed else COMMAND_LINE
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = preloaded.start(entry, command, cwd=folder, env=settings, stdout=out, stderr=err)
        run = Drive(process, folder, progress_port=ports[0], metrics_port=ports[1])
        self.jobs.runs.append(run)
        return run
