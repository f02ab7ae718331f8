"""Jobs with EK-FAC whose model uses an embedding's weight by hand: loading finds out for all workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

import tokens_task
from influence_calculator import EkfacInfluence
from jobs import Jobs

TRAIN, TEST = 90, 12
TASK: dict[str, Any] = {
    "entrypoint": "tokens_task:task",
    "arguments": {"train": TRAIN, "test": TEST, "tied": True},
}
METHOD: dict[str, Any] = {"name": "Ekfac", "regularization": 0.05}
JOB: dict[str, Any] = {"task": TASK, "chunks": {"test": 8, "train": 32}}


@pytest.mark.parametrize("unsupported", ["Diagonal", "Exclude"])
def test_a_job_treats_the_weight_as_the_user_says(unsupported: str, jobs: Jobs, tmp_path: Path) -> None:
    path = tmp_path / "tied.zarr"
    jobs.finish(jobs.manifest({**JOB, "method": {**METHOD, "unsupported": unsupported}}), output=path)
    task = tokens_task.task(TRAIN, TEST, tied=True)
    test, train = (source.read(0, len(source))["ids"] for source in (task.test, task.train))
    model = EkfacInfluence(
        task.model,
        update_diagonal=True,
        regularization=0.05,
        loss=tokens_task.loss_of_ids,
        unsupported=unsupported.lower(),
    ).fit([(train, train)])
    assert ("embedding" in model.block_names) == (unsupported == "Diagonal")
    expected = model.influences(test, test, train, train).numpy()
    found = xarray.open_zarr(path, consolidated=False)["influences"].values
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_the_plan_refuses_it_by_name_where_nothing_is_said(jobs: Jobs) -> None:
    planned = jobs.plan(jobs.manifest({**JOB, "method": METHOD}))
    assert planned.returncode == 64
    assert "embedding.weight (Embedding, used by hand too)" in " ".join(planned.stderr.split())
