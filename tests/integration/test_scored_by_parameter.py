"""Jobs with EK-FAC whose first layer is scored by parameter: what is stored, and what others make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
import zarr

import oracle
import positions_task
from influence_calculator import EkfacInfluence
from jobs import Jobs

LAMBDA = 0.05
JOB: dict[str, Any] = {
    "task": {"entrypoint": "positions_task:task"},
    "method": {"name": "Ekfac", "regularization": LAMBDA},
    "chunks": {"test": 4, "train": 90},
}
WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "Influences": ({"operation": "Influences"},),
    "InfluencesByBlock": ({"operation": "InfluencesByBlock"},),
    "from factors by parameter": (
        {"operation": "InfluenceFactors", "chunks": {"test": 4, "train": None}},
        {"operation": "InfluencesFromFactors", "factors": {}},
    ),
    "from factors as another job stored them": (
        {"operation": "Influences"},
        {"operation": "InfluencesFromFactors", "factors": {}},
    ),
    "from gradients": (
        {"operation": "TrainingGradients", "chunks": {"test": None, "train": 90}},
        {"operation": "InfluencesFromGradients", "gradients": {}, "chunks": {"test": 4, "train": None}},
    ),
}
"""What is run, one job after another; `factors` and `gradients` are those of the job before."""


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_influences_ends_at_the_product_of_factors_and_gradients(
    name: str, jobs: Jobs, tmp_path: Path
) -> None:
    """The library's factors, which do not depend on how scores are made, by gradients of single examples."""
    before = path = tmp_path / "0.zarr"
    for number, changes in enumerate(WAYS[name]):
        path = tmp_path / f"{number}.zarr"
        given = {key: {"url": str(before)} for key in ("factors", "gradients") if key in changes}
        jobs.finish(jobs.manifest({**JOB, **changes, **given}), output=path, workers=1)
        before = path
    found = zarr.open_group(path, mode="r")["influences"][:]
    if name == "InfluencesByBlock":
        found = found.sum(axis=0)
    np.testing.assert_allclose(found, _expected(), rtol=1e-9, atol=1e-10)


def _expected() -> np.ndarray:
    task = positions_task.task()
    test, train = task.test.read(0, positions_task.TEST), task.train.read(0, positions_task.TRAIN)
    model = EkfacInfluence(task.model, True, LAMBDA, seed=0).fit([train])
    gradients = oracle.example_gradients(task.model, F.cross_entropy, *train)
    return (model.influence_factors(*test) @ gradients.T).numpy()
