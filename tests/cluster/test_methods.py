"""Operations and methods other than the example job's, from `kubectl apply` to this machine's numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr

from cluster import Cluster
from cluster_jobs import STORE, TASK, ClusterJob
from cluster_storage import ClusterStorage

pytestmark = pytest.mark.usefixtures("operator")

INFLUENCE = str(Path(sys.executable).with_name("influence"))
TEST, TRAIN = 30, 120
FEW = {"entrypoint": "gated_digits:few", "arguments": {"train": TRAIN, "test": TEST}}
SMALL = {"task": FEW, "chunks": {"test": 20, "train": 50}, "workers": {"replicas": 1}}
JOBS: dict[str, dict[str, Any]] = {
    "self-influence": SMALL | {"operation": "SelfInfluence", "chunks": {"test": None, "train": 50}},
    "graddot": SMALL | {"method": {"name": "GradDot"}},
    "tracin": SMALL
    | {"method": {"name": "TracIn"}, "task": FEW | {"entrypoint": "gated_digits:in_training"}},
    "trak": SMALL | {"method": {"name": "Trak", "regularization": 0.01, "rank": 64}},
    "logra": SMALL | {"method": {"name": "Logra", "regularization": 0.01, "rank": 8}},
}
"""What each changes in the manifest."""
SHAPES = {"self-influence": (TRAIN,)}


@pytest.fixture
def jobs(cluster: Cluster, namespace: str, storage: ClusterStorage) -> dict[str, ClusterJob]:
    """All of them, each with a worker of its own."""
    return {name: ClusterJob(cluster, namespace, storage.new_bucket(), name) for name in JOBS}


def on_this_machine(job: ClusterJob, changes: dict[str, Any], folder: Path) -> np.ndarray:
    """The result of `influence run` on the same manifest."""
    manifest = job.manifest(**changes)
    del manifest["spec"]["output"]["storageOptions"]  # the bucket's; here a folder takes its place
    (folder / f"{job.name}.yaml").write_text(yaml.safe_dump(manifest))
    local = folder / f"{job.name}.zarr"
    command = [INFLUENCE, "run", f"{job.name}.yaml", "--output", str(local), "--workers", "1"]
    path = os.pathsep.join(filter(None, (str(TASK.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return result(zarr.open_group(local, mode="r"))


def result(stored: zarr.Group) -> np.ndarray:
    name = "self_influences" if "self_influences" in stored else "influences"
    return np.asarray(stored[name])


def test_every_operation_and_method_that_is_not_the_examples_agrees_with_this_machine(
    jobs: dict[str, ClusterJob], tmp_path: Path
) -> None:
    for name, job in jobs.items():
        job.apply(**JOBS[name])
    with ThreadPoolExecutor(2) as threads:
        local = threads.map(lambda name: on_this_machine(jobs[name], JOBS[name], tmp_path), JOBS)
        expected = dict(zip(JOBS, local, strict=True))
    for name, job in jobs.items():
        job.complete()
        found = result(
            zarr.open_group(f"{job.bucket.url}/{STORE}", mode="r", storage_options=job.bucket.options)
        )
        assert found.shape == SHAPES.get(name, (TEST, TRAIN)), name
        assert np.abs(found).max() > 0, name
        assert np.abs(found - expected[name]).max() <= 1e-4 * np.abs(expected[name]).max(), name
        assert job.status["result"]["shape"] == list(found.shape), name
        assert job.counted_failures == 0, name
