"""Jobs in mode Perturbation, with every method that a job may name: the library's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from influence_calculator import InfluenceMode
from job_methods import METHODS, job_and_library
from jobs import Jobs
from manifests import METHOD_NAMES


def test_every_method_that_a_job_may_name_is_here() -> None:
    assert set(METHODS) == METHOD_NAMES


@pytest.mark.parametrize("name", METHODS)
def test_a_job_gives_the_librarys_perturbations(name: str, jobs: Jobs, tmp_path: Path) -> None:
    """Whatever chunks test and training examples come in, also such as are not full."""
    path = tmp_path / "result.zarr"
    found, expected = job_and_library(name, InfluenceMode.Perturbation, jobs, path, "cpu", workers=1)
    assert found.dims == ("test", "train", "feature_0")
    np.testing.assert_allclose(found.values, expected, rtol=1e-7, atol=1e-8 * np.abs(expected).max())
