"""Operation InfluencesByBlock: the part of each block of parameters, and how it is shown."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
import xarray
from torch import Tensor

import checkpoints_task
import traced_task
from influence_calculator import (
    ArnoldiInfluence,
    BlockMode,
    EkfacInfluence,
    GradDotInfluence,
    InfluenceMode,
    LograInfluence,
    SecondOrderMode,
    TracInInfluence,
)
from jobs import INFLUENCE, Jobs
from resuming import kill_and_resume

Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""x and y of the test side, then of the training side."""
TRAIN, TEST = 90, 12
GGN = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
JOB: dict[str, Any] = {
    "task": {"arguments": {"train": TRAIN, "test": TEST}},
    "operation": "InfluencesByBlock",
    "chunks": {"test": 8, "train": 32},
}
SPECTRAL = {
    "name": "Arnoldi",
    "rank": 4,
    "krylovDimension": 12,
    "complement": False,
    "regularization": 0.05,
    "secondOrder": "GeneralizedGaussNewton",
    "blocks": "LayerWise",
}


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y)


def arnoldi(data: Data) -> dict[str, Tensor]:
    model = traced_task.task(train=TRAIN, test=TEST).model
    influence = ArnoldiInfluence(
        model, loss, 0.05, 4, 12, block_structure=BlockMode.LAYER_WISE, second_order_mode=GGN
    )
    return influence.fit([data[2:]]).influences_by_block(*data)


def logra(data: Data) -> dict[str, Tensor]:
    model = traced_task.task(train=TRAIN, test=TEST).model
    return LograInfluence(model, loss, 0.05, 3, 2).fit([data[2:]]).influences_by_block(*data)


def grad_dot(data: Data) -> dict[str, Tensor]:
    model = traced_task.task(train=TRAIN, test=TEST).model
    influence = GradDotInfluence(model, loss, {"last": ["2.bias", "2.weight"], "first": ["0.weight"]})
    return influence.fit([data[2:]]).influences_by_block(*data)


def tracin(data: Data) -> dict[str, Tensor]:
    """Every checkpoint as if there were no other."""
    task = checkpoints_task.task(train=TRAIN, test=TEST)
    return {
        f"checkpoint_{c}": TracInInfluence(task.model, loss, [checkpoint]).fit([data[2:]]).influences(*data)
        for c, checkpoint in enumerate(task.checkpoints)
    }


METHODS: dict[str, tuple[dict[str, Any], Callable[[Data], dict[str, Tensor]]]] = {
    "Arnoldi by coordinates": ({"method": SPECTRAL}, arnoldi),
    "Logra": ({"method": {"name": "Logra", "rank": 3, "seed": 2, "regularization": 0.05}}, logra),
    "GradDot": (
        {
            "method": {
                "name": "GradDot",
                "regularization": None,
                "blocks": "Custom",
                "customBlocks": {"last": ["2.bias", "2.weight"], "first": ["0.weight"]},
            }
        },
        grad_dot,
    ),
    "TracIn": (
        {
            "method": {"name": "TracIn", "regularization": None},
            "task": {"entrypoint": "checkpoints_task:task", "arguments": {"train": TRAIN, "test": TEST}},
        },
        tracin,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_job_gives_the_librarys_influences_by_block(name: str, jobs: Jobs, tmp_path: Path) -> None:
    changes, of_the_library = METHODS[name]
    path = tmp_path / "result.zarr"
    run = jobs.finish(jobs.manifest({**JOB, **changes}), "--json", output=path)
    task = traced_task.task(train=TRAIN, test=TEST)
    expected = of_the_library((*task.test.read(0, TEST), *task.train.read(0, TRAIN)))
    blocks = list(expected)
    opened = xarray.open_zarr(path, consolidated=False)
    scores = opened["influences"]
    assert scores.dims == ("block", "test", "train")
    assert [str(block) for block in opened["block"].values] == blocks
    for block in blocks:
        np.testing.assert_allclose(
            scores.sel(block=block).values, expected[block].numpy(), rtol=2e-3, atol=1e-4
        )
    assert json.loads(run.stdout)["result"]["shape"] == [len(blocks), TEST, TRAIN]


def test_the_parts_sum_to_the_influences_of_the_same_job(jobs: Jobs, tmp_path: Path) -> None:
    """With EK-FAC; and what is ranked, counted and shown is the sum."""
    parts, whole = tmp_path / "parts.zarr", tmp_path / "whole.zarr"
    jobs.finish(jobs.manifest({**JOB, "output": {"verify": "All"}}), output=parts)
    jobs.finish(jobs.manifest({**JOB, "operation": "Influences"}), output=whole)
    by_block, plain = (xarray.open_zarr(path, consolidated=False) for path in (parts, whole))
    found = by_block["influences"]
    assert float(np.abs(found).min("block").max()) > 0.01 * float(np.abs(found).max())
    np.testing.assert_allclose(found.sum("block").values, plain["influences"].values, rtol=1e-5, atol=1e-6)
    for statistic in ("most_helpful_score", "most_harmful_score", "score_mean", "score_std", "score_max"):
        np.testing.assert_allclose(by_block[statistic], plain[statistic], rtol=1e-4, atol=1e-6)
    shown = subprocess.run([INFLUENCE, "show", str(parts)], capture_output=True, text=True, check=True)
    text = " ".join(shown.stdout.split())
    assert "InfluencesByBlock (Up), complete" in text
    assert f'{TEST} test × {TRAIN} training examples × 2 blocks ("0", "2"), 53 parameters' in text
    assert "It is the sum over the blocks" in text


def test_perturbations_have_parts_too(jobs: Jobs, tmp_path: Path) -> None:
    """What is ranked and counted is the length of the sum over the blocks."""
    path = tmp_path / "moved.zarr"
    changes = {**JOB, "mode": "Perturbation", "output": {"verify": "All"}}
    run = jobs.finish(jobs.manifest(changes), "--json", output=path)
    task = traced_task.task(train=TRAIN, test=TEST)
    test, train = task.test.read(0, TEST), task.train.read(0, TRAIN)
    model = EkfacInfluence(task.model, update_diagonal=True, regularization=0.05).fit([train])
    expected = model.influences_by_block(*test, *train, mode=InfluenceMode.Perturbation)
    found = xarray.open_zarr(path, consolidated=False)
    assert found["influences"].dims == ("block", "test", "train", "feature_0")
    assert json.loads(run.stdout)["result"]["shape"] == [2, TEST, TRAIN, traced_task.FEATURES]
    for block, part in expected.items():
        moved = found["influences"].sel(block=block).values
        np.testing.assert_allclose(moved, part.numpy(), rtol=2e-3, atol=1e-4)
    lengths = np.linalg.norm(model.influences(*test, *train, InfluenceMode.Perturbation).numpy(), axis=2)
    np.testing.assert_allclose(found["most_helpful_score"][:, 0], lengths.max(1), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(found["score_mean"], lengths.mean(1), rtol=2e-3, atol=1e-4)
    shown = subprocess.run([INFLUENCE, "show", str(path)], capture_output=True, text=True, check=True)
    text = " ".join(shown.stdout.split())
    assert "InfluencesByBlock (Perturbation), complete" in text
    assert "The gradient is the sum over the blocks" in text


def test_a_killed_job_computes_what_was_in_flight_and_nothing_else(jobs: Jobs, tmp_path: Path) -> None:
    kill_and_resume(jobs, tmp_path, JOB)


def test_the_plan_counts_every_block(jobs: Jobs) -> None:
    planned = jobs.plan(jobs.manifest(JOB))
    assert planned.returncode == 0, planned.stderr
    text = " ".join(planned.stdout.split())
    assert "InfluencesByBlock (Up) with Ekfac" in text
    assert f"3 regions of {TEST} × 32 examples × 2 blocks" in text
    assert f"result 2 × {TEST} × {TRAIN} of float32" in text
