"""Jobs that sum over checkpoints: the library's numbers, and stores that know which states made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
import xarray
import zarr

import checkpoints_task
from influence_calculator import TracInInfluence
from jobs import Jobs

JOB: dict[str, Any] = {
    "task": {"entrypoint": "checkpoints_task:task"},
    "method": {"name": "TracIn", "regularization": None},
    "chunks": {"test": 4, "train": 16},
}


def in_memory() -> np.ndarray:
    """The library's answer for the same task."""
    task = checkpoints_task.task()
    model = TracInInfluence(task.model, F.cross_entropy, task.checkpoints)
    test, train = task.test.read(0, 8), task.train.read(0, 96)
    return model.fit([train]).influences(*test, *train).numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_job_gives_the_librarys_sum_over_the_checkpoints(jobs: Jobs, tmp_path: Path) -> None:
    path = tmp_path / "result.zarr"
    run = jobs.finish(jobs.manifest(JOB), "--json", output=path)
    assert_close(xarray.open_zarr(path, consolidated=False)["influences"].values, in_memory())
    factors = zarr.open_group(path / "factors", mode="r")
    blocks = [factors[str(i)].attrs["block"] for i in range(2)]
    assert blocks == ["checkpoint_0", "checkpoint_1"]
    assert json.loads(run.stdout)["solver"]["converged"] == 8


def test_a_store_made_with_another_learning_rate_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    """The checkpoints are part of what the numbers depend on, as the model is."""
    path = tmp_path / "result.zarr"
    jobs.finish(jobs.manifest(JOB), output=path)
    run = jobs.run(jobs.manifest(JOB), output=path, env={"CHECKPOINTS_RATE": "1.5"})
    assert run.code == 64
    assert "model: the store was made with" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"rates": []}, "InfluenceTask.checkpoints: expected at least one, got none"),
        ({"shape_of": "0.bias"}, "InfluenceTask.checkpoints[1]: expected every parameter and buffer"),
    ],
    ids=["none", "another shape"],
)
def test_checkpoints_that_are_missing_or_wrong_are_refused_by_the_plan(
    arguments: dict[str, Any], told: str, jobs: Jobs
) -> None:
    planned = jobs.plan(jobs.manifest({**JOB, "task": {**JOB["task"], "arguments": arguments}}))
    assert planned.returncode == 64
    assert told in planned.stderr


def test_the_plan_counts_the_checkpoints(jobs: Jobs) -> None:
    documents = []
    for method in ("GradDot", "TracIn"):
        planned = jobs.plan(
            jobs.manifest({**JOB, "method": {"name": method, "regularization": None}}), "--json"
        )
        documents.append(json.loads(planned.stdout))
    one, two = documents
    assert list(two["blocks"].values()) == 2 * list(one["blocks"].values())
    assert two["factorBytes"] == 2 * one["factorBytes"]
    assert two["gflop"]["Scores"] == pytest.approx(2 * one["gflop"]["Scores"])
    copies = two["memory"]["Loading"]["device"] - one["memory"]["Loading"]["device"]
    assert copies >= 2 * 4 * sum(one["blocks"].values()), "two states beside the model"
    assert one["fitPasses"] == two["fitPasses"] == 0
