"""The linear datamodeling score where it is known, and the data that the benchmark scores methods with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import retraining
import torch
import torch.nn.functional as F
from datamodeling import agreement, datamodeling_score
from numpy.typing import NDArray

from influence_job.examples import digits

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def ridge() -> tuple[Array, NDArray[np.bool_], Array]:
    """Exact influences `[T, N]`, subsets `[K, N]` and retrained losses `[K, T]` of a ridge regression."""
    generator = np.random.default_rng(0)
    count, width, penalty = 400, 4, 1e-3
    x, x_test = generator.normal(size=(count, width)), generator.normal(size=(30, width))
    truth = generator.normal(size=width)
    y, y_test = x @ truth + generator.normal(size=count), x_test @ truth + generator.normal(size=30)

    def fitted(rows: NDArray[np.bool_]) -> Array:
        curvature = x[rows].T @ x[rows] / rows.sum() + penalty * np.eye(width)
        return np.linalg.solve(curvature, x[rows].T @ y[rows] / rows.sum())

    masks = np.zeros((100, count), np.bool_)
    for mask in masks:
        mask[generator.permutation(count)[: count // 2]] = True
    losses = np.stack([0.5 * (x_test @ fitted(mask) - y_test) ** 2 for mask in masks])
    solution = fitted(np.ones(count, np.bool_))
    by_train = (x @ solution - y)[:, None] * x
    by_test = (x_test @ solution - y_test)[:, None] * x_test
    influences = by_test @ np.linalg.solve(x.T @ x / count + penalty * np.eye(width), by_train.T)
    return influences, masks, losses


def test_exact_influences_of_a_ridge_regression_score_near_1(ridge) -> None:
    assert datamodeling_score(*ridge).mean > 0.9


def test_influences_of_the_opposite_sign_score_the_opposite(ridge) -> None:
    influences, masks, losses = ridge
    right, wrong = datamodeling_score(*ridge), datamodeling_score(-influences, masks, losses)
    assert wrong.mean == pytest.approx(-right.mean)


def test_influences_of_other_training_examples_score_about_0(ridge) -> None:
    influences, masks, losses = ridge
    permuted = influences[:, np.random.default_rng(1).permutation(influences.shape[1])]
    score = datamodeling_score(permuted, masks, losses)
    assert abs(score.mean) < 4 * score.error
    assert score.error < 0.15


def test_a_column_that_predicts_nothing_counts_0() -> None:
    steps = np.arange(10.0)
    score = agreement(np.stack([steps, np.ones(10)], axis=1), np.stack([steps**3, steps], axis=1))
    assert score.mean == pytest.approx(0.5)


def test_models_trained_side_by_side_are_those_that_the_example_trains() -> None:
    task = digits.task(epochs=2, seed=3)
    train, test = task.train.read(0, digits.TRAIN), task.test.read(0, digits.TEST)
    with torch.no_grad():
        expected = F.cross_entropy(task.model(test[0]), test[1], reduction="none")
    everything = torch.arange(digits.TRAIN).expand(2, -1)
    found = retraining.retrained_losses(train, test, everything, 3, replace(retraining.Training(), epochs=2))
    torch.testing.assert_close(found, expected.expand(2, -1), rtol=1e-4, atol=1e-5)


def test_the_stored_data_is_that_of_the_program() -> None:
    plan = retraining.Plan()
    masks, losses = retraining.load()
    assert losses.shape == (plan.subsets, len(plan.seeds), plan.test)
    assert losses.dtype == np.float32
    assert np.isfinite(losses).all()
    expected = torch.zeros(plan.subsets, plan.train, dtype=torch.bool)
    expected.scatter_(1, retraining.subsets(plan), value=True)
    np.testing.assert_array_equal(masks, expected.numpy())
    assert (masks.sum(axis=1) == plan.train // 2).all()
    assert len(masks) >= 100


def test_data_made_with_other_settings_is_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "retrained.npz"
    masks, losses = retraining.load()
    monkeypatch.setattr(retraining, "MOMENTUM", 0.8)
    retraining.save(path, masks, losses)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"made with .*'momentum': 0\.8"):
        retraining.load(path)
