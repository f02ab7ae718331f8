"""Jobs in mode Perturbation, with every method that a job may name: the library's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray

import queries_task
from influence_calculator import InfluenceMode
from job_methods import METHODS
from jobs import Jobs
from manifests import METHOD_NAMES

TEST = 4


def test_every_method_that_a_job_may_name_is_here() -> None:
    assert set(METHODS) == METHOD_NAMES


@pytest.mark.parametrize("name", METHODS)
def test_a_job_gives_the_librarys_perturbations(name: str, jobs: Jobs, tmp_path: Path) -> None:
    """Whatever chunks test and training examples come in, also such as are not full."""
    fields, model = METHODS[name]
    path, arguments = tmp_path / "result.zarr", {"test": TEST, "double": True}
    changes = {
        "task": {"entrypoint": "queries_task:task", "arguments": arguments},
        "mode": "Perturbation",
        "method": {"name": name, "regularization": None, **fields},
        "chunks": {"test": 3, "train": 40},
    }
    jobs.finish(jobs.manifest(changes), output=path, workers=1)
    task = queries_task.task(**arguments)
    train, test = task.train.read(0, queries_task.TRAIN), task.test.read(0, TEST)
    expected = model(task).fit([train]).influences(*test, *train, InfluenceMode.Perturbation).numpy()
    found = xarray.open_zarr(path, consolidated=False)["influences"]
    assert found.dims == ("test", "train", "feature_0")
    np.testing.assert_allclose(found.values, expected, rtol=1e-7, atol=1e-8 * np.abs(expected).max())
