"""The other operations and the other mode on a real cluster; all other tests here compute influences."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr

from cluster import Cluster
from cluster_jobs import STORE, TASK, ClusterJob
from cluster_storage import Bucket, ClusterStorage

pytestmark = pytest.mark.usefixtures("operator")

INFLUENCE = str(Path(sys.executable).with_name("influence"))
CHECKSUM_BYTES = 4
"""Behind each chunk's float32 numbers."""
ONE = {"replicas": 1}


def test_influences_from_stored_factors_are_those_computed_at_once(
    cluster: Cluster, namespace: str, storage: ClusterStorage, undisturbed: dict[str, bytes]
) -> None:
    """InfluenceFactors, then InfluencesFromFactors: the same scores, without fitting or solving again.

    Stored factors are by parameter and are turned into the method's basis, so bits may differ.
    """
    factors = ClusterJob(cluster, namespace, storage.new_bucket(), "factors")
    factors.apply(operation="InfluenceFactors", workers=ONE).complete()
    made = factors.result()
    assert [path for path in made if path.startswith("factors/0/c/")]
    assert not [path for path in made if path.startswith("influences/")]
    assert factors.status["result"]["shape"][0] == 300

    scores = ClusterJob(cluster, namespace, storage.new_bucket(), "scores")
    source = {"url": f"{factors.bucket.url}/{STORE}"}
    scores.apply(operation="InfluencesFromFactors", factors=source, workers=ONE).complete()
    found, expected = regions(scores.result()), regions(undisturbed)
    assert found.keys() == expected.keys()
    largest = max(np.abs(block).max() for block in expected.values())
    assert max(np.abs(found[path] - expected[path]).max() for path in expected) <= 1e-4 * largest
    assert not scores.bucket.puts(rf"^{STORE}/(factors/\d+/c|fit/correction)/")
    assert [stage["name"] for stage in scores.status["stages"]][-2:] == ["Scores", "Verifying"]


def regions(result: dict[str, bytes]) -> dict[str, np.ndarray]:
    """The matrix by storage object."""
    return {
        path: np.frombuffer(data[:-CHECKSUM_BYTES], np.float32)
        for path, data in result.items()
        if path.startswith("influences/c/")
    }


def test_perturbations_are_those_of_this_machine(
    cluster: Cluster, namespace: str, bucket: Bucket, tmp_path: Path
) -> None:
    """One number per pixel of the training image, for each pair of few examples."""
    few = {"entrypoint": "gated_digits:few", "arguments": {"train": 40, "test": 6, "hidden": 16}}
    changes = {"task": few, "mode": "Perturbation", "chunks": {"test": 3, "train": 20}, "workers": ONE}
    job = ClusterJob(cluster, namespace, bucket).apply(**changes)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.manifest(**changes)))
    local = tmp_path / "local.zarr"
    run = [INFLUENCE, "run", str(tmp_path / "job.yaml"), "--output", str(local), "--workers", "1"]
    subprocess.run(run, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": python_path()})
    theirs = np.asarray(zarr.open_group(local, mode="r")["influences"])
    job.complete()

    root = zarr.open_group(f"{bucket.url}/{STORE}", mode="r", storage_options=bucket.options)
    ours = np.asarray(root["influences"])
    assert ours.shape == (6, 40, 64)
    assert job.status["result"]["shape"] == [6, 40, 64]
    assert np.abs(ours).max() > 0
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def python_path() -> str:
    """Where a process on this machine finds the task that the job's ConfigMap holds."""
    return os.pathsep.join([str(TASK.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
