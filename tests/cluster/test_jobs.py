"""InfluenceJobs on a real cluster, from `kubectl apply` to the result in the bucket."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr

from cluster import CHECKOUT, Cluster, CommandError
from cluster_jobs import REGIONS, STORE, ClusterJob
from cluster_storage import Bucket

INFLUENCE = str(Path(sys.executable).with_name("influence"))
pytestmark = pytest.mark.usefixtures("operator")

LATE_REGIONS = r"^influences/c/0/(9|1\d)$"
"""What the gate holds back: the regions from the tenth on."""


@pytest.fixture
def job(cluster: Cluster, namespace: str, bucket: Bucket) -> ClusterJob:
    return ClusterJob(cluster, namespace, bucket)


# -- the example, as a user runs it --------------------------------------------------------------


def kustomized(folder: Path, bucket: Bucket, patch: list[dict[str, Any]]) -> None:
    """`examples/digits.yaml` with a patch, as kustomize takes it."""
    shutil.copy(CHECKOUT / "examples/digits.yaml", folder / "digits.yaml")
    options = [
        {"op": "replace", "path": "/spec/output/url", "value": f"{bucket.url}/{STORE}"},
        {"op": "add", "path": "/spec/output/storageOptions", "value": bucket.pod_options},
    ]
    document = {
        "resources": ["digits.yaml"],
        "patches": [{"target": {"kind": "InfluenceJob"}, "patch": yaml.safe_dump(options + patch)}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))


GPU = {
    "op": "replace",
    "path": "/spec/workers/resources",
    "value": {"requests": {"cpu": "100m"}, "limits": {"memory": "2Gi", "nvidia.com/gpu": "1"}},
}
CPU = {"op": "add", "path": "/spec/device", "value": "cpu"}


def test_the_example_runs_on_gpu_nodes_and_agrees_with_this_machine(
    job: ClusterJob, tmp_path: Path, record_property: Any
) -> None:
    """Point 1: two workers that request a GPU each, output to gs://, the same numbers as `influence run`."""
    kustomized(tmp_path, job.bucket, [GPU, CPU])
    begin = time.monotonic()
    job.kubectl("apply", "--kustomize", str(tmp_path))
    job.wait_until(lambda: job.bucket.puts(rf"^{STORE}/influences/c/"), "the first region")
    first = time.monotonic() - begin
    job.complete()
    record_property("seconds_to_first_region", round(first, 1))
    record_property("seconds_to_complete", round(time.monotonic() - begin, 1))

    local = tmp_path / "local.zarr"
    run = [INFLUENCE, "run", str(tmp_path / "digits.yaml"), "--output", str(local), "--workers", "2"]
    subprocess.run(run, check=True, capture_output=True)
    stored = zarr.open_group(f"{job.bucket.url}/{STORE}", mode="r", storage_options=job.bucket.options)
    ours, theirs = (
        np.asarray(stored["influences"]),
        np.asarray(zarr.open_group(local, mode="r")["influences"]),
    )
    assert ours.shape == (300, 1400)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()

    status = job.status
    assert [stage["name"] for stage in status["stages"]] == [
        "Preflight", "Loading", "Fitting", "Factors", "Scores", "Verifying",
    ]  # fmt: skip
    assert all(stage["start"] and stage["end"] for stage in status["stages"])
    assert status["result"] == stored.attrs["influence_operator"]["result"]
    digest = status["result"].pop("digest")
    assert re.fullmatch("[0-9a-f]{32}", digest)
    assert status["result"] == {
        "url": f"{job.bucket.url}/{STORE}", "shape": [300, 1400], "dtype": "float32", "bytes": 300 * 1400 * 4,
    }  # fmt: skip
    assert status["observedGeneration"] == job.get()["metadata"]["generation"]
    assert job.is_true("Complete")
    assert job.is_true("Ready")


def test_workers_without_a_visible_gpu_fail_the_job_within_a_minute(job: ClusterJob, tmp_path: Path) -> None:
    """The same manifest without `device: cpu`: the node advertises GPUs that torch cannot see."""
    kustomized(tmp_path, job.bucket, [GPU])
    job.kubectl("apply", "--kustomize", str(tmp_path))
    failed = job.wait_for("Failed", seconds=60, reason="GpuNotVisible")
    assert "device: cuda" in failed["message"]
    assert job.is_true("Stalled")


# -- kubectl's own verbs -------------------------------------------------------------------------


def test_kubectl_waits_explains_and_shows_columns(job: ClusterJob) -> None:
    job.apply(**job.gate(LATE_REGIONS))
    job.at_gate()
    done = job.wait_until(lambda: running_row(job), "a row that counts regions", 60)
    assert 0 < done < REGIONS
    job.open_gate()
    job.kubectl("wait", "influencejob/digits", "--for=condition=Complete", "--timeout=180s", seconds=200)
    table = job.kubectl("get", "ij", "-o", "wide")
    header, row = table.splitlines()
    assert header.split() == [
        "NAME", "PHASE", "STAGE", "PROGRESS", "ETA", "WORKERS", "AGE", "REASON", "OUTPUT",
    ] or {"PHASE", "STAGE", "PROGRESS", "WORKERS", "REASON", "OUTPUT"} <= set(header.split())  # fmt: skip
    assert "Complete" in row
    assert job.bucket.url in row
    assert "regularization" in job.kubectl("explain", "influencejob.spec.method")
    reasons = [reason for kind, reason in job.events() if kind == "Normal"]
    assert "Complete" in " ".join(reasons)


def running_row(job: ClusterJob) -> int | None:
    """How many rows of the stage a running job's line counts; the merge is one of them."""
    line = job.kubectl("get", "ij", "--no-headers")
    found = re.fullmatch(rf"digits +Running +Scores +(\d+)/{REGIONS + 1} .* 2/2 +\d+\w+\s*", line)
    return int(found[1]) if found else None


def test_a_running_job_is_scaled_up_and_down(job: ClusterJob) -> None:
    job.apply(workers={"replicas": 1}, **job.gate(LATE_REGIONS))
    job.at_gate()
    job.kubectl("scale", "influencejob/digits", "--replicas=3")
    job.wait_until(lambda: len(job.running("worker")) == 3, "three workers")
    job.wait_until(lambda: job.status["workers"]["ready"] == 3, "three workers in the status", 30)
    job.kubectl("scale", "influencejob/digits", "--replicas=1")
    job.wait_until(lambda: len(job.pods("worker")) == 1, "one worker left")
    job.open_gate()
    job.complete()
    assert job.counted_failures == 0
    assert job.attempt == 1


def test_a_suspended_job_keeps_what_is_done_and_goes_on_when_resumed(job: ClusterJob) -> None:
    job.apply(**job.gate(LATE_REGIONS))
    held = job.half_done()
    job.patch(suspend=True)
    job.wait_until(lambda: job.is_true("Suspended"), "condition Suspended", 90)
    assert not job.pods()
    assert job.status["phase"] == "Suspended"
    job.open_gate()
    job.patch(suspend=False)
    job.complete()
    assert set(job.writes_of(held).values()) == {1}
    assert job.counted_failures == 0


def test_a_job_created_suspended_starts_nothing(job: ClusterJob) -> None:
    job.apply(suspend=True)
    job.wait_until(lambda: job.is_true("Suspended"), "condition Suspended", 30)
    assert not job.children("pods,jobs,daskclusters")
    job.patch(suspend=False)
    job.complete()


def test_a_deleted_job_leaves_its_result_and_nothing_else(job: ClusterJob) -> None:
    job.apply().complete()
    before = job.result()
    job.delete()
    job.wait_until(job.gone, "everything of the job gone", 60)
    assert job.result() == before
    assert len([path for path in before if path.startswith("influences/c/")]) == REGIONS


def test_a_running_job_can_be_deleted(job: ClusterJob) -> None:
    job.apply(**job.gate(LATE_REGIONS))
    job.at_gate()
    job.delete()
    job.wait_until(job.gone, "everything of the job gone", 90)


def test_applying_a_finished_job_again_starts_no_worker_and_computes_nothing(job: ClusterJob) -> None:
    """The driver's preflight is all that runs: nobody ever made a scheduler or a worker for the new UID."""
    job.apply().complete()
    first, held, before = job.uid, job.held(), job.result()
    assert roles_made(job, first) == {"", "scheduler", "default-worker"}
    job.delete()
    job.apply().complete(60)
    assert job.uid != first
    assert [stage["name"] for stage in job.status["stages"]] == ["Preflight"]
    assert roles_made(job, job.uid) == {""}
    assert job.result() == before
    assert set(job.writes_of(held).values()) == {1}


def roles_made(job: ClusterJob, uid: str) -> set[str]:
    """What Events tell was made for a UID: the suffixes of its first attempt's names, "" for the driver."""
    found = job.cluster.get("events", namespace=job.namespace)
    name = re.compile(rf"{job.name}-{uid[:5]}-1(?:-(scheduler|default-worker))?(?:-.*)?")
    matches = [name.fullmatch(event["involvedObject"]["name"]) for event in found]
    return {match[1] or "" for match in matches if match}


def test_a_job_deleted_and_created_at_once_is_a_new_one(job: ClusterJob) -> None:
    job.apply(**job.gate(LATE_REGIONS))
    job.at_gate()
    old = job.uid
    job.delete(wait=False)
    job.wait_until(lambda: _absent(job), "the object gone", 30)
    job.open_gate()
    job.apply(**job.gate(LATE_REGIONS))
    job.complete()
    assert job.uid != old
    job.wait_until(
        lambda: all(
            child["metadata"]["labels"]["influence-operator.dev/job-uid"] == job.uid
            for child in job.children("jobs,daskclusters,pods")
        ),
        "the old job's children gone",
        60,
    )


def _absent(job: ClusterJob) -> bool:
    try:
        job.get()
    except CommandError as error:
        return "NotFound" in error.output
    return False


def test_what_determines_the_numbers_cannot_be_changed(job: ClusterJob) -> None:
    job.apply(suspend=True)
    with pytest.raises(CommandError, match="immutable"):
        job.patch(method={"regularization": 0.5})
    with pytest.raises(CommandError, match="immutable"):
        job.patch(chunks={"train": 50})


def test_the_operator_never_writes_to_the_users_object(job: ClusterJob) -> None:
    """GitOps: no finalizer, annotation, label or spec field that the user did not write."""
    manifest = job.manifest()
    job.apply().complete()
    found = job.get()
    assert "finalizers" not in found["metadata"]
    assert "annotations" not in found["metadata"]
    assert "labels" not in found["metadata"]
    owners = json.loads(job.kubectl("get", "influencejob", job.name, "-o", "json", "--show-managed-fields"))[
        "metadata"
    ]["managedFields"]
    ours = [entry for entry in owners if entry["manager"] == "influence-operator"]
    assert ours, "the operator writes the status under its own name"
    assert {entry.get("subresource") for entry in ours} == {"status"}
    assert found["spec"]["task"] == manifest["spec"]["task"]


def test_kubectl_and_watch_agree(job: ClusterJob) -> None:
    """`influence watch` follows a job to its end."""
    job.apply()
    done = subprocess.run(
        [str(Path(sys.executable).with_name("influence")), "watch", job.name, "-n", job.namespace, "--json"],
        env={
            "KUBECONFIG": str(job.cluster.kubeconfig),
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Complete" in done.stdout.splitlines()[-1]
