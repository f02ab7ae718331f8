"""What a running job tells over HTTP, and how it stops when told to."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import stored
from influence_job.progress import Progress, Stage
from jobs import STAGES, Barrier, Jobs, Run

PACE = 0.15
SCORING = Barrier("put", "before", "^influences/c/", 7)


def test_progress_health_and_metrics_are_served_while_a_job_runs(jobs: Jobs, tmp_path: Path) -> None:
    """The document is the contract's; /metrics is Prometheus' text on its own port."""
    progress, metrics = _free_port(), _free_port()
    ports = ("--progress-port", str(progress), "--metrics-port", str(metrics))
    run = jobs.start(
        jobs.manifest(), *ports, output=tmp_path / "result.zarr", pace=PACE, barrier=SCORING, installed=True
    )
    run.wait_for_barrier()
    assert _get(progress, "/healthz").decode().strip() == "ok"
    document = Progress.model_validate_json(_get(progress, "/progress"))
    raw = json.loads(_get(progress, "/progress"))
    assert raw["contractVersion"] == 1
    assert document.stage is Stage.SCORES
    assert [stage.name for stage in document.stages] == STAGES[:5]
    assert all(stage.end is not None for stage in document.stages[:-1])
    assert document.regions.total >= 20
    assert document.regions.done < document.regions.total
    assert document.workers_needed
    assert not document.finished
    assert document.job_uid
    text = _get(metrics, "/metrics").decode()
    assert f'influence_job_info{{stage="Scores",uid="{document.job_uid}"}} 1.0' in text
    assert f'influence_regions{{state="total"}} {float(document.regions.total)}' in text
    done = re.search(r'influence_regions\{state="done"\} (\S+)', text)
    assert done
    assert document.regions.done <= float(done[1]) < document.regions.total
    assert "influence_workers 2.0" in text
    assert "influence_finished 0.0" in text
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _get(progress, "/elsewhere")
    run.open_barrier()
    assert run.wait().code == 0, run.stderr


@pytest.mark.parametrize("barrier", [SCORING, Barrier("read", "before", "", 3)], ids=["Scores", "Fitting"])
def test_sigterm_flushes_the_ledger_and_ends_with_75(
    barrier: Barrier, jobs: Jobs, tmp_path: Path, resume: Callable[..., Run]
) -> None:
    """As Kubernetes stops a pod: never exit code 0, and the rerun resumes."""
    path = tmp_path / "result.zarr"
    run = jobs.start(jobs.manifest(), output=path, pace=PACE, barrier=barrier, installed=barrier is SCORING)
    run.wait_for_barrier()
    os.kill(run.process.pid, signal.SIGTERM)
    run.open_barrier()
    assert run.wait(30).code == 75
    assert "Terminated" in run.stderr
    assert "Traceback" not in run.stderr
    assert stored.held(stored.open_store(path)) or barrier is not SCORING
    resume(path)


def test_ctrl_c_ends_with_130_and_loses_nothing(
    jobs: Jobs, tmp_path: Path, resume: Callable[..., Run]
) -> None:
    """A terminal sends SIGINT to the whole process group, workers included."""
    path = tmp_path / "result.zarr"
    run = jobs.start(jobs.manifest(), output=path, pace=PACE, barrier=SCORING, installed=True)
    run.wait_for_barrier()
    os.killpg(run.process.pid, signal.SIGINT)
    run.open_barrier()
    assert run.wait(30).code == 130
    assert "run it again" in run.stderr
    assert "Traceback" not in run.stderr
    resume(path)


def test_a_worker_that_dies_costs_what_it_had_in_flight(
    jobs: Jobs, tmp_path: Path, undisturbed: object
) -> None:
    """The driver goes on with the others, and with the one that replaces it."""
    path = tmp_path / "result.zarr"
    run = jobs.start(jobs.manifest(), output=path, pace=PACE, barrier=SCORING, installed=True)
    run.wait_for_barrier()
    workers = run.workers
    assert len(workers) == 2
    workers[0].kill()
    run.open_barrier()
    assert run.wait().code == 0, run.stderr
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return bytes(answer.read())
