"""`influence drive` as the operator's Job starts it: a job document, TLS, a scheduler that comes later."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client
from distributed.security import Security

import stored
from dask_processes import DaskProcesses, certificate
from drives import UID, Drive, Drives
from faulty_proxy import FaultyProxy
from gcs import GcsEmulator
from influence_job.errors import Reason
from influence_job.exit_codes import ExitCode
from influence_job.progress import Stage
from jobs import STAGES, SUPPORT

PACE = "0.15"
TORCH_BYTES = 150 << 20
"""A scheduler that imported torch holds several times as much; one that did not, half."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the result goes."""
    return tmp_path / "result.zarr"


def output(path: Path) -> dict[str, Any]:
    return {"output": {"url": str(path)}}


def wait_for_preflight(run: Drive) -> None:
    """Until the driver asks for workers."""
    run.wait_until(run.answers, "an answer")
    run.wait_until(lambda: run.progress.workers_needed, "a driver that asks for workers")


def ended(run: Drive, code: ExitCode, reason: Reason) -> str:
    """Waits for the end, which must be this one; the last error's message."""
    assert run.wait().code == code, run.stderr
    words = run.last_words
    assert (words.job_uid, words.attempt) == (UID, 1)
    assert not words.finished
    assert words.last_error is not None
    assert words.last_error.reason == reason
    return words.last_error.message


def test_a_job_is_driven_from_preflight_to_its_last_words(
    drives: Drives, dask: DaskProcesses, path: Path, undisturbed: Any
) -> None:
    """Bit for bit what `influence run` computes; the commands are those of the pods."""
    drives.installed = dask.installed = True
    run = drives.start(drives.document(output(path)))
    wait_for_preflight(run)
    assert run.progress.stage is Stage.PREFLIGHT
    assert b"Preflight" in run.get(run.metrics_port, "/metrics")
    scheduler = dask.scheduler()
    dask.worker(), dask.worker()
    assert run.wait().code == ExitCode.DONE, run.stderr
    words = run.last_words
    assert words.finished
    assert [stage.name for stage in words.stages] == STAGES
    assert all(stage.end is not None for stage in words.stages)
    assert (words.job_uid, words.attempt) == (UID, 1)
    assert words.recorded == len(stored.held(stored.open_store(path)))
    assert words.result is not None
    assert words.result["url"] == str(path)
    assert [line.split()[-1] for line in run.stderr.splitlines()[:6]] == STAGES
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []
    assert psutil.Process(scheduler.pid).memory_info().rss < TORCH_BYTES


def test_a_finished_job_ends_without_a_scheduler(drives: Drives, finished_copy: Path) -> None:
    """Nobody asks for a GPU; the message says what was not compared."""
    before = stored.result(stored.open_store(finished_copy))
    run = drives.start(drives.document(output(finished_copy)))
    assert run.wait().code == ExitCode.DONE, run.stderr
    words = run.last_words
    assert words.finished
    assert not words.workers_needed
    assert words.result is not None
    assert any("without loading the model" in warning for warning in words.warnings)
    assert stored.result(stored.open_store(finished_copy)) == before


def test_a_scheduler_whose_name_means_nothing_yet_is_waited_for(drives: Drives, path: Path) -> None:
    """A Service that is still to be made; a minute is no limit. Meanwhile a stop is obeyed."""
    drives.scheduler = "tls://job-7d3c9-1-scheduler.nowhere.invalid:8786"
    run = drives.start(drives.document(output(path)), INFLUENCE_SCHEDULER_GRACE_SECONDS="1")
    wait_for_preflight(run)
    time.sleep(8)
    assert run.code is None, run.stderr
    assert run.progress.last_error is None
    os.kill(run.process.pid, signal.SIGTERM)
    run.wait(10)
    ended(run, ExitCode.RETRY, Reason.TERMINATED)


def test_a_client_without_the_attempts_certificate_is_refused(
    drives: Drives, dask: DaskProcesses, path: Path, tmp_path: Path
) -> None:
    """Nor does a driver with another attempt's get work done here, or end the job."""
    dask.scheduler()
    dask.worker()
    with pytest.raises(OSError, match=r"Timed out|closed"):
        Client(dask.address.replace("tls", "tcp"), timeout=3, set_as_default=False)
    other = certificate(tmp_path / "other")
    security = Security(
        require_encryption=True,
        tls_ca_file=str(other / "ca.crt"),
        tls_client_cert=str(other / "tls.crt"),
        tls_client_key=str(other / "tls.key"),
    )
    with pytest.raises(OSError, match="TLS certificate does not match"):
        Client(dask.address, security=security, timeout=3, set_as_default=False)
    drives.tls = other
    run = drives.start(drives.document(output(path)))
    wait_for_preflight(run)
    time.sleep(6)
    assert run.code is None, run.stderr
    assert run.progress.stage is Stage.PREFLIGHT
    assert "Receive client" not in dask.logs()


def test_sigterm_flushes_the_ledger_and_leaves_last_words(
    drives: Drives, dask: DaskProcesses, path: Path, resume: Any
) -> None:
    dask.environment["BARRIER_PACE"] = PACE
    dask.scheduler()
    dask.worker(), dask.worker()
    run = drives.start(drives.document(output(path)))
    run.wait_until(run.answers, "an answer")
    run.wait_until(lambda: run.progress.stage is Stage.SCORES, "Scores")
    run.wait_until(lambda: run.progress.regions.done >= 2, "two regions")
    done = run.progress.regions.done
    os.kill(run.process.pid, signal.SIGTERM)
    run.wait(15)
    ended(run, ExitCode.RETRY, Reason.TERMINATED)
    assert run.last_words.recorded
    rows = stored.held(stored.open_store(path))
    assert sum(kind == "region" for kind, _ in rows) >= done
    assert len(rows) == run.last_words.recorded
    resume(path)


def test_a_driver_that_hangs_in_its_storage_obeys_sigterm_all_the_same(
    drives: Drives, gcs: GcsEmulator, faulty_gcs: FaultyProxy, gcs_bucket: str
) -> None:
    """Storage is asked again for ten minutes; the kubelet waits half a minute, then kills without a word."""
    faulty_gcs.go_down()
    changes = {
        "output": {
            "url": f"gs://{gcs_bucket}/x.zarr",
            "storageOptions": gcs.storage_options(faulty_gcs.url),
        }
    }
    run = drives.start(drives.document(changes))
    run.wait_until(run.answers, "an answer")
    run.wait_until(lambda: bool(faulty_gcs.log), "a request")
    os.kill(run.process.pid, signal.SIGTERM)
    run.wait(28)
    assert "still busy" in ended(run, ExitCode.RETRY, Reason.TERMINATED)


def test_a_bucket_gets_the_same_bits(
    drives: Drives,
    dask: DaskProcesses,
    gcs: GcsEmulator,
    gcs_bucket: str,
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody has to know the variable that keeps gcsfs from stalling at an emulator."""
    monkeypatch.delenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")
    url, options = f"gs://{gcs_bucket}/x.zarr", gcs.storage_options()
    dask.scheduler()
    dask.worker(), dask.worker()
    run = drives.start(drives.document({"output": {"url": url, "storageOptions": options}}))
    assert run.wait(60).code == ExitCode.DONE, run.stderr
    assert stored.differing(stored.result(stored.open_store(url, options)), undisturbed.result) == []


def test_a_task_that_raises_ends_with_64_and_the_exceptions_last_line(
    drives: Drives, dask: DaskProcesses, path: Path
) -> None:
    dask.scheduler()
    dask.worker()
    changes = {"task": {"entrypoint": "broken_task:raises"}}
    run = drives.start(drives.document(output(path) | changes))
    message = ended(run, ExitCode.PERMANENT, Reason.INVALID_TASK)
    assert message.endswith("FileNotFoundError: no checkpoint at /models/last.pt")
    assert "broken_task:raises" in message


def test_an_enormous_message_is_cut_and_stays_readable(
    drives: Drives, dask: DaskProcesses, path: Path
) -> None:
    dask.scheduler()
    dask.worker()
    changes = {"task": {"entrypoint": "broken_task:raises_at_length"}}
    run = drives.start(drives.document(output(path) | changes))
    message = ended(run, ExitCode.PERMANENT, Reason.INVALID_TASK)
    assert message.endswith("Gewichte fehlen: größe 𝄞")


@pytest.mark.parametrize("task", ["broken_task:leaves", "broken_import:task"])
def test_code_that_exits_with_0_is_no_success(
    task: str, drives: Drives, dask: DaskProcesses, path: Path, tmp_path: Path
) -> None:
    """In the entry point, on a worker; in its module, in the driver."""
    (tmp_path / "broken_import.py").write_text("import sys\nsys.exit(0)\n")
    dask.scheduler()
    dask.worker()
    pythonpath = os.pathsep.join([str(tmp_path), str(SUPPORT)])
    run = drives.start(drives.document(output(path) | {"task": {"entrypoint": task}}), PYTHONPATH=pythonpath)
    assert "SystemExit: 0" in ended(run, ExitCode.PERMANENT, Reason.INVALID_TASK)


def test_a_worker_that_sees_no_gpu_ends_the_job_with_that_reason(
    drives: Drives, dask: DaskProcesses, path: Path
) -> None:
    """It never computes on its processor instead."""
    dask.environment["CUDA_VISIBLE_DEVICES"] = ""
    dask.scheduler()
    dask.worker()
    run = drives.start(drives.document(output(path) | {"device": "cuda"}))
    assert "nvidia.com/gpu" in ended(run, ExitCode.PERMANENT, Reason.GPU_NOT_VISIBLE)


def test_a_later_attempt_of_the_job_takes_the_store_over(
    drives: Drives, dask: DaskProcesses, path: Path, undisturbed: Any
) -> None:
    """Whether or not the earlier driver's node still answers: one finishes, the other stops."""
    dask.environment["BARRIER_PACE"] = "1"
    dask.scheduler()
    dask.worker(), dask.worker()
    first = drives.start(drives.document(output(path)))
    first.wait_until(lambda: (path / "influences").exists(), "a store with arrays")
    second = drives.start(drives.document(output(path), attempt=2))
    message = ended(first, ExitCode.RETRY, Reason.SUPERSEDED)
    assert "attempt 2" in message
    assert second.wait().code == ExitCode.DONE, second.stderr
    assert second.last_words.attempt == 2
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []


def test_another_jobs_claim_ends_a_driver_that_still_waits_for_its_scheduler(
    drives: Drives, path: Path
) -> None:
    first = drives.start(drives.document(output(path)))
    wait_for_preflight(first)
    other = drives.start(drives.document(output(path), uid="another"))
    assert "driver-pod" in ended(first, ExitCode.PERMANENT, Reason.STORE_CLAIMED)
    assert other.code is None


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"contractVersion": 2}, Reason.IMAGE_INCOMPATIBLE, "expected 1, got 2; set spec.image"),
        ({"scheduler": "tcp://somewhere:8786"}, Reason.INVALID_SPEC, "expected an address tls://"),
        ({"scheduler": 8786}, Reason.INVALID_SPEC, "scheduler: Input should be a valid string"),
        ({"job": {"spec": {}}}, Reason.INVALID_SPEC, "required, but absent"),
    ],
)
def test_a_document_that_the_image_cannot_follow_is_refused_with_64(
    changes: dict[str, Any], reason: Reason, words: str, drives: Drives, path: Path
) -> None:
    """The last words name the job, or the operator would take them for somebody else's."""
    run = drives.start(drives.document(output(path), **changes))
    assert words in ended(run, ExitCode.PERMANENT, reason)
    assert not path.exists()


@pytest.mark.parametrize("document", ["", "[]", "\x00"])
def test_a_document_that_is_none_leaves_last_words_of_nobody(document: str, drives: Drives) -> None:
    run = drives.start(document)
    assert run.wait().code == ExitCode.PERMANENT, run.stderr
    assert run.last_words.last_error is not None
    assert "job.json: expected" in run.last_words.last_error.message


def test_a_missing_certificate_is_named(drives: Drives, path: Path, tmp_path: Path) -> None:
    drives.tls = tmp_path
    run = drives.start(drives.document(output(path)))
    assert "ca.crt" in ended(run, ExitCode.PERMANENT, Reason.INVALID_SPEC)
