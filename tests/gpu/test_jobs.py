"""Jobs on a GPU: the numbers of a processor, the same bits again, also after kills; `make test-gpu`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr

import jobs as local_jobs
import stored
from influence_calculator import InfluenceMode
from job_methods import METHODS, job_and_library
from jobs import Barrier, Jobs
from resuming import count, kill_and_resume

EXAMPLE = Path(__file__).parents[2] / "examples/digits.yaml"


def run(folder: Path, device: str, **changes: object) -> Path:
    """A digits job on this machine; the folder of its store."""
    document = yaml.safe_load(EXAMPLE.read_text())
    output = folder / f"{device}-{len(list(folder.iterdir()))}.zarr"
    document["spec"] |= {"device": device, "output": {"url": str(output)}, **changes}
    (folder / "job.yaml").write_text(yaml.safe_dump(document))
    command = [str(Path(sys.executable).with_name("influence")), "run", str(folder / "job.yaml")]
    subprocess.run([*command, "--workers", "1"], check=True, timeout=local_jobs.TIMEOUT_SECONDS)
    return output


def scores(store: Path) -> np.ndarray:
    values: np.ndarray = np.asarray(zarr.open_group(store, mode="r")["influences"])
    return values


def test_a_job_on_a_gpu_agrees_with_one_on_a_cpu(tmp_path: Path) -> None:
    on_gpu, on_cpu = scores(run(tmp_path, "cuda")), scores(run(tmp_path, "cpu"))
    assert np.linalg.norm(on_gpu - on_cpu) <= 1e-2 * np.linalg.norm(on_cpu)


def test_a_job_on_a_gpu_gives_the_same_bits_twice(tmp_path: Path) -> None:
    with stored.open_store(run(tmp_path, "cuda")) as one, stored.open_store(run(tmp_path, "cuda")) as two:
        assert stored.differing(stored.result(one), stored.result(two)) == []


@pytest.mark.parametrize("precision", ["TF32", "BFloat16"])
def test_lower_precision_keeps_the_ranking(tmp_path: Path, precision: str) -> None:
    exact, quick = scores(run(tmp_path, "cuda")), scores(run(tmp_path, "cuda", precision=precision))
    assert np.corrcoef(exact.ravel(), quick.ravel())[0, 1] >= 0.95


@pytest.mark.parametrize("mode", InfluenceMode, ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", METHODS)
def test_a_job_gives_the_librarys_numbers(name: str, mode: InfluenceMode, jobs: Jobs, tmp_path: Path) -> None:
    """Of every method, in float64, against the library on a processor."""
    path = tmp_path / "result.zarr"
    found, expected = job_and_library(name, mode, jobs, path, "cuda", workers=2)
    np.testing.assert_allclose(found.values, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_same_bits_twice(name: str, jobs: Jobs, tmp_path: Path) -> None:
    """By one worker and by two."""
    fields, _ = METHODS[name]
    changes = {
        "task": {"entrypoint": "queries_task:task"},
        "method": {"name": name, "regularization": None, **fields},
        "device": "cuda",
    }
    for workers in (1, 2):
        jobs.finish(jobs.manifest(changes), output=tmp_path / f"{workers}.zarr", workers=workers)
    with stored.open_store(tmp_path / "1.zarr") as one, stored.open_store(tmp_path / "2.zarr") as two:
        assert stored.differing(stored.result(one), stored.result(two)) == []


def test_a_killed_job_goes_on_with_the_same_bits(jobs: Jobs, tmp_path: Path) -> None:
    kill_and_resume(jobs, tmp_path, {"device": "cuda"})


def test_what_a_gpu_began_a_processor_does_not_go_on_with(jobs: Jobs, tmp_path: Path) -> None:
    path = tmp_path / "begun.zarr"
    barrier = Barrier("put", "before", "^influences/c/0/", 3)
    run = jobs.start(jobs.manifest({"device": "cuda"}), output=path, pace=0.6, barrier=barrier)
    run.wait_for_barrier()
    run.wait_until(lambda: count(stored.held(stored.open_store(path)))["region"] > 0, "a flush")
    run.kill()
    other = jobs.run(jobs.manifest({"device": "cpu"}), output=path)
    assert other.code not in (0, None)
    assert "NVIDIA" in other.stderr or "device" in other.stderr


def test_a_gpu_that_is_too_small_is_told_with_the_field_that_helps(jobs: Jobs, tmp_path: Path) -> None:
    """The plan takes a GPU for larger than it is, unless the job says otherwise."""
    changes = {
        "task": {"entrypoint": "small_gpu_task:task"},
        "method": {"name": "GradDot", "regularization": None},
        "chunks": {"test": 8, "train": 640},
        "device": "cuda",
    }
    run = jobs.run(jobs.manifest(changes), output=tmp_path / "small.zarr", workers=1)
    assert run.code != 0
    assert "out of memory" in run.stderr
    assert "workers.deviceMemory" in run.stderr
    told = {**changes, "workers": {"deviceMemory": "1Gi"}}
    jobs.finish(jobs.manifest(told), output=tmp_path / "told.zarr", workers=1)
