"""Operation SelfInfluence: the diagonal of the influences, in chunks, through kills, and how it is shown."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
import xarray
from torch import Tensor

import checkpoints_task
import stored
import traced_task
from influence_calculator import (
    ArnoldiInfluence,
    CgInfluence,
    InfluenceFunctionModel,
    SecondOrderMode,
    TracInInfluence,
)
from jobs import INFLUENCE, Barrier, Jobs, times_written
from resuming import kill_and_resume

TRAIN = 90
GGN = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
CURVATURE = {"regularization": 0.05, "secondOrder": "GeneralizedGaussNewton"}
JOB: dict[str, Any] = {
    "task": {"arguments": {"train": TRAIN, "test": 8}},
    "operation": "SelfInfluence",
    "chunks": {"train": 16, "test": None},
}
SUMMING = {"entrypoint": "checkpoints_task:task", "arguments": {"train": TRAIN, "test": 8, "measured": True}}
"""With a measurement of test examples, which is no matter here."""


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y)


def tracin() -> InfluenceFunctionModel[Any, Any]:
    task = checkpoints_task.task(train=TRAIN)
    return TracInInfluence(task.model, loss, task.checkpoints)


def arnoldi() -> InfluenceFunctionModel[Any, Any]:
    model = traced_task.task(train=TRAIN, test=8).model
    return ArnoldiInfluence(model, loss, 0.05, 4, 12, second_order_mode=GGN)


METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "Cg": (
        {"method": {"name": "Cg", "rtol": 1e-5, **CURVATURE}},
        lambda: CgInfluence(
            traced_task.task(train=TRAIN, test=8).model, loss, 0.05, 1e-5, 0.0, second_order_mode=GGN
        ),
    ),
    "Arnoldi by coordinates": (
        {"method": {"name": "Arnoldi", "rank": 4, "krylovDimension": 12, "complement": False, **CURVATURE}},
        arnoldi,
    ),
    "TracIn": ({"method": {"name": "TracIn", "regularization": None}, "task": SUMMING}, tracin),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_job_gives_the_diagonal_of_the_librarys_influences(name: str, jobs: Jobs, tmp_path: Path) -> None:
    changes, model = METHODS[name]
    path = tmp_path / "result.zarr"
    run = jobs.finish(jobs.manifest({**JOB, **changes}), "--json", output=path)
    x, y = traced_task.task(train=TRAIN, test=8).train.read(0, TRAIN)
    expected = model().fit([(x, y)]).influences(x, y, x, y).diagonal().numpy()
    opened = xarray.open_zarr(path, consolidated=False)
    assert opened["self_influences"].dims == ("train",)
    np.testing.assert_allclose(opened["self_influences"].values, expected, rtol=2e-3, atol=1e-4)
    np.testing.assert_array_equal(opened["train_label"].values, y.numpy())
    assert {name for name in opened.variables if "test" in opened[name].dims} == set()
    document = json.loads(run.stdout)
    assert document["solver"]["converged"] == TRAIN
    assert document["result"]["shape"] == [TRAIN]


def test_a_killed_job_computes_what_was_in_flight_and_nothing_else(jobs: Jobs, tmp_path: Path) -> None:
    path = kill_and_resume(jobs, tmp_path, JOB, "self", "^self_influences/c/", 6)
    shown = subprocess.run(
        [INFLUENCE, "show", str(path), "--json", "--top", "3"], capture_output=True, text=True, check=True
    )
    document = json.loads(shown.stdout)
    assert document["ledger"] == {"done": document["ledger"]["done"], "total": {"self": 6}}
    values = xarray.open_zarr(path, consolidated=False)["self_influences"].values
    found = [(ranked["train"], ranked["score"]) for ranked in document["selfInfluences"]]
    assert found == [(int(i), float(values[i])) for i in np.argsort(-values, kind="stable")[:3]]
    assert document["scores"]["maximum"] == values.max()


@pytest.mark.parametrize("products", ["Local", "Distributed"])
def test_chunks_that_rot_before_they_are_verified_are_computed_again(
    products: str, jobs: Jobs, tmp_path: Path
) -> None:
    """Also where passes solved them, of which nothing is left."""
    method = {"name": "Cg", "rtol": 1e-2, **CURVATURE, "products": products}
    manifest = jobs.manifest({**JOB, "method": method, "output": {"verify": "All"}})
    path, whole = tmp_path / "result.zarr", tmp_path / "whole.zarr"
    jobs.finish(manifest, output=whole)
    run = jobs.start(manifest, "--json", output=path, barrier=Barrier("enter", "before", "Verifying"))
    run.wait_for_barrier()
    flipped, lost = (path / "self_influences" / "c" / chunk for chunk in ("1", "4"))
    stored.rot(flipped, lost)
    run.open_barrier()
    assert run.wait().code == 0, run.stderr
    written = {n: times for n, times in times_written(run, path).items() if n.startswith("self_influences/c")}
    assert {name for name, times in written.items() if times > 1} == {
        "self_influences/c/1",
        "self_influences/c/4",
    }
    assert any("2 chunks of self-influences" in said for said in json.loads(run.stdout)["warnings"])
    assert stored.differing(*(stored.result(stored.open_store(place)) for place in (path, whole))) == []


def test_the_plan_has_chunks_of_training_examples_and_no_test_side(jobs: Jobs) -> None:
    planned = jobs.plan(jobs.manifest({**JOB, "chunks": None}))
    assert planned.returncode == 0, planned.stderr
    text = " ".join(planned.stdout.split())
    assert "SelfInfluence (Up) with Ekfac" in text
    assert f"examples {TRAIN} training;" in text
    assert "(2 to fit, 1 to score)" in text
    assert f"result {TRAIN} of float32" in text
    assert "Factors" not in text
