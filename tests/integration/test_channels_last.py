"""Jobs with convolutions captured with channels last: their bits, and what others make of what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
import zarr

import images_task
import oracle
from influence_calculator import EkfacInfluence
from influence_calculator.maths.memory_format import laid_out
from influence_calculator.maths.objective import xy_objective
from jobs import Jobs

LAMBDA = 0.05
JOB: dict[str, Any] = {
    "task": {"entrypoint": "images_task:task"},
    "method": {"name": "Ekfac", "regularization": LAMBDA},
    "chunks": {"test": 4, "train": 90},
}
FIRST: dict[str, dict[str, Any]] = {
    "factors": {"operation": "Influences"},
    "gradients": {"operation": "TrainingGradients", "chunks": {"test": None, "train": 90}},
}
SECOND: dict[str, dict[str, Any]] = {
    "factors": {"operation": "InfluencesFromFactors"},
    "gradients": {
        "operation": "InfluencesFromGradients",
        "chunks": {"test": 4, "train": None},
    },
}


def _task(view: bool) -> dict[str, Any]:
    return {"task": {**JOB["task"], "arguments": {"view": view}}}


def _run(jobs: Jobs, path: Path, changes: dict[str, Any], workers: int = 1) -> np.ndarray | None:
    jobs.finish(jobs.manifest({**JOB, **changes}), output=path, workers=workers)
    group = zarr.open_group(path, mode="r")
    return group["influences"][:] if "influences" in group else None


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The library's factors of the model in double precision, by gradients of single examples."""
    task = images_task.task()
    model = task.model.double()
    (x_test, y_test), (x, y) = (
        task.test.read(0, images_task.TEST),
        task.train.read(0, images_task.TRAIN),
    )
    fitted = EkfacInfluence(model, True, LAMBDA, seed=0).fit([(x.double(), y)])
    assert {name: rows.by_parameter for name, rows in fitted._fitted._layers.items()} == {
        images_task.TURNED: False,
        images_task.BY_PARAMETER: True,
        "head": False,
    }
    gradients = oracle.example_gradients(model, F.cross_entropy, x.double(), y)
    return (fitted.influence_factors(x_test.double(), y_test) @ gradients.T).numpy()


@pytest.mark.parametrize("view", [True, False])
def test_the_model_that_takes_a_view_is_the_one_that_is_left_alone(view: bool) -> None:
    task = images_task.task(view)
    objective = xy_objective(task.model, F.cross_entropy)
    assert laid_out(objective, lambda: task.train.read(0, 1)).channels_last is not view


def _assert_close(found: np.ndarray | None, expected: np.ndarray) -> None:
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_number_of_workers_does_not_change_a_bit(
    jobs: Jobs, tmp_path: Path, expected: np.ndarray
) -> None:
    one, two = (_run(jobs, tmp_path / f"{n}.zarr", {"operation": "Influences"}, n) for n in (1, 2))
    _assert_close(one, expected)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("stored", FIRST)
@pytest.mark.parametrize("first_takes_a_view", [True, False])
def test_what_is_stored_does_not_depend_on_how_it_was_captured(
    stored: str, first_takes_a_view: bool, jobs: Jobs, tmp_path: Path, expected: np.ndarray
) -> None:
    """One of the two jobs captures with channels last, the other cannot."""
    earlier = tmp_path / "first.zarr"
    _run(jobs, earlier, {**FIRST[stored], **_task(first_takes_a_view)})
    changes = {**SECOND[stored], stored: {"url": str(earlier)}, **_task(not first_takes_a_view)}
    _assert_close(_run(jobs, tmp_path / "second.zarr", changes), expected)
