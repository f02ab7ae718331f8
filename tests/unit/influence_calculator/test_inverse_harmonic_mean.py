"""DataInf: the mean of each example's inverse, against every inverse formed; what must not matter."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from influence_calculator.maths import inverse_harmonic_mean, region
from influence_calculator.maths.blocks import BlockMode, Relative
from influence_calculator.maths.errors import SingularCurvatureError
from influence_calculator.maths.inverse_harmonic_mean import InverseHarmonicMean
from influence_calculator.maths.method import Fitted, SolverStatus, fit
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.perturbation import perturbations
from model_cases import ATTENTION, CASES, LOGISTIC, MLP, TRANSFORMER, ModelCase
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

CUSTOM = {"ends": ["4.weight", "0.bias"], "middle": ["2.weight"]}


def _fitted(case: ModelCase, method: InverseHarmonicMean, size: int = 5) -> Fitted:
    objective = xy_objective(case.model(), case.loss)
    data = TrainingSet(case.train(), size)
    return method.fitted(objective, fit(method, objective, data), data)


def _gradients(fitted: Fitted, case: ModelCase) -> dict[str, Tensor]:
    return fitted.gradients(xy_objective(case.model(), case.loss), case.test())


def _expected(case: ModelCase, λ: float) -> Tensor:
    explicit = reference(case, "empirical_fisher")
    return explicit.test @ oracle.mean_inverse(explicit.train, λ)


@pytest.mark.parametrize("case", [*CASES, TRANSFORMER, ATTENTION], ids=repr)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_factors_and_influences_are_those_of_the_explicit_inverses(case: ModelCase, λ: float) -> None:
    fitted = _fitted(case, InverseHarmonicMean(λ))
    solved = fitted.solve(_gradients(fitted, case))
    expected = _expected(case, λ)
    oracle.assert_close(solved.left[""], expected, 1e-10)
    scores = region.influences(fitted, solved.left, case.train(), micro_batch=6)
    oracle.assert_close(scores, expected @ reference(case, "empirical_fisher").train.T, 1e-10)
    assert (solved.report.status == SolverStatus.CONVERGED).all()
    assert (solved.report.residual == 0).all()


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_perturbation_is_the_inputs_gradient_of_the_influence(case: ModelCase) -> None:
    fitted = _fitted(case, InverseHarmonicMean(0.1))
    objective = xy_objective(case.model(), case.loss)
    left = fitted.solve(_gradients(fitted, case)).left
    x, y = (part[:5] for part in case.train())
    expected = oracle.perturbations(objective.model, case.loss, _expected(case, 0.1), x, y)
    oracle.assert_close(perturbations(fitted, objective, left, (x, y), 3), expected, 1e-9)


def test_it_is_not_the_inverse_of_the_mean() -> None:
    """Else the tests above would pass for another method."""
    assert oracle.relative_error(_expected(MLP, 0.01), reference(MLP, "empirical_fisher").factors(0.01)) > 0.1


@pytest.mark.parametrize("blocks", [BlockMode.LAYER_WISE, BlockMode.PARAMETER_WISE, CUSTOM])
def test_each_block_takes_its_own_inverses_and_regularization(blocks: Any) -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    layout = InverseHarmonicMean(1.0, blocks).layout(objective)
    λ = {block: 0.02 * (i + 1) for i, block in enumerate(layout.blocks)}
    fitted = _fitted(MLP, InverseHarmonicMean(λ, blocks))
    left = fitted.solve(_gradients(fitted, MLP)).left
    explicit = reference(MLP, "empirical_fisher")
    for block in layout.blocks:
        names = tuple(slot.name for slot in layout.slots_of(block))
        own = oracle.columns_of(objective.model, names)
        inverse = oracle.mean_inverse(explicit.train[:, own], λ[block])
        oracle.assert_close(left[block], explicit.test[:, own] @ inverse, 1e-10)


def test_a_relative_regularization_follows_the_mean_square_of_the_gradients() -> None:
    explicit = reference(MLP, "empirical_fisher")
    λ = 0.1 * float(explicit.train.square().sum(1).mean()) / 60
    fitted = _fitted(MLP, InverseHarmonicMean(Relative(0.1)))
    oracle.assert_close(fitted.solve(_gradients(fitted, MLP)).left[""], _expected(MLP, λ), 1e-10)


@pytest.mark.parametrize("size", [1, 4, 22, 23])
def test_the_number_of_batches_does_not_matter(size: int) -> None:
    """Mistake 1: a sum over batches that each count the same."""
    fitted = _fitted(MLP, InverseHarmonicMean(0.01), size)
    oracle.assert_close(fitted.solve(_gradients(fitted, MLP)).left[""], _expected(MLP, 0.01), 1e-10)


@pytest.mark.parametrize("q", [1, 3])
def test_the_number_of_right_hand_sides_does_not_matter(q: int) -> None:
    """Mistake 1: exactly 1/3 for three right-hand sides."""
    fitted = _fitted(MLP, InverseHarmonicMean(0.01))
    rows = _gradients(fitted, MLP)[""]
    pieces = [fitted.solve({"": piece}).left[""] for piece in rows.split(q)]
    oracle.assert_close(torch.cat(pieces), _expected(MLP, 0.01), 1e-10)


def test_the_order_of_the_examples_does_not_matter() -> None:
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    x, y = MLP.train()
    fitted = InverseHarmonicMean(0.01).fitted(
        xy_objective(MLP.model(), MLP.loss), {}, TrainingSet((x[order], y[order]), 5)
    )
    oracle.assert_close(fitted.solve(_gradients(fitted, MLP)).left[""], _expected(MLP, 0.01), 1e-10)


@pytest.mark.parametrize(("kept", "piece"), [(0, 1), (0, 1 << 25), (6000, 2000)])
def test_memory_does_not_matter(kept: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("training_batches", "inverse_harmonic_mean"):
        monkeypatch.setattr(f"influence_calculator.maths.{module}.KEPT_BYTES", kept)
    monkeypatch.setattr(inverse_harmonic_mean, "PIECE_BYTES", piece)
    fitted = _fitted(MLP, InverseHarmonicMean(0.01))
    for _ in range(2):
        oracle.assert_close(fitted.solve(_gradients(fitted, MLP)).left[""], _expected(MLP, 0.01), 1e-10)


@pytest.mark.parametrize(("kept", "again"), [(1 << 30, 0), (8000, 23 - 15), (0, 23)])
def test_gradients_that_fit_are_taken_once_the_others_at_every_solve(
    kept: int, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept are 23 examples of 40 bytes, and 15 gradients of 480 in pieces of 5."""
    for module in ("training_batches", "inverse_harmonic_mean"):
        monkeypatch.setattr(f"influence_calculator.maths.{module}.KEPT_BYTES", kept)
    monkeypatch.setattr(inverse_harmonic_mean, "PIECE_BYTES", 5 * (480 + 4 * 8 * 30))
    seen: list[int] = []
    original = inverse_harmonic_mean.collected
    monkeypatch.setattr(
        inverse_harmonic_mean,
        "collected",
        lambda objective, batch, layout: (
            seen.append(len(batch[0])),
            original(objective, batch, layout),
        )[1],
    )
    fitted = _fitted(MLP, InverseHarmonicMean(0.01))
    gradients = _gradients(fitted, MLP)
    fitted.solve(gradients)
    assert sum(seen) == 23
    seen.clear()
    fitted.solve(gradients)
    assert abs(sum(seen) - again) <= (5 if 0 < again < 23 else 0)


def test_float32_stays_near_float64() -> None:
    objective = xy_objective(MLP.model(torch.float32), MLP.loss)
    x, y = MLP.train()
    fitted = InverseHarmonicMean(0.01).fitted(objective, {}, TrainingSet((x.float(), y), 5))
    x, y = MLP.test()
    left = fitted.solve(fitted.gradients(objective, (x.float(), y))).left[""]
    assert left.dtype is torch.float32
    oracle.assert_close(left, _expected(MLP, 0.01), 1e-4)


def test_a_gradient_that_is_not_finite_concerns_its_row_only() -> None:
    fitted = _fitted(MLP, InverseHarmonicMean(0.01, BlockMode.LAYER_WISE))
    gradients = _gradients(fitted, MLP)
    expected = fitted.solve(gradients).left
    gradients["2"][1, 3] = torch.inf
    solved = fitted.solve(gradients)
    others = [0, 2, 3, 4, 5, 6]
    for block, rows in solved.left.items():
        oracle.assert_close(rows[others], expected[block][others], 1e-12)
    assert solved.left["2"][1].isnan().all()
    assert solved.report.status.tolist() == [0, SolverStatus.NOT_FINITE, 0, 0, 0, 0, 0]
    assert solved.report.residual[1].isnan()


def test_training_data_that_is_not_finite_shows_in_every_row() -> None:
    x, y = LOGISTIC.train()
    x[3] = torch.nan
    objective = xy_objective(LOGISTIC.model(), LOGISTIC.loss)
    fitted = InverseHarmonicMean(0.1).fitted(objective, {}, TrainingSet((x, y), 5))
    solved = fitted.solve(_gradients(fitted, LOGISTIC))
    assert (solved.report.status == SolverStatus.NOT_FINITE).all()
    assert solved.left[""].isnan().all()


@pytest.mark.parametrize("given", [0.0, {"0": 0.1, "2": 0.0, "4": 1.0}, Relative(0.0), -1.0])
def test_without_a_regularization_there_is_no_inverse(given: Any) -> None:
    with pytest.raises(ValueError, match=r"regularization: expected .*, got (0\.0|-1\.0)"):
        InverseHarmonicMean(given, BlockMode.LAYER_WISE)


def test_a_relative_regularization_of_nothing_is_refused() -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    state = {"trace": {"": {"trace": torch.zeros(())}}}
    with pytest.raises(SingularCurvatureError, match="all its gradients are zero"):
        InverseHarmonicMean(Relative(0.1)).fitted(objective, state, TrainingSet(MLP.train(), 5))


def test_the_training_data_is_asked_for() -> None:
    with pytest.raises(ValueError, match="data: InverseHarmonicMean differentiates the training set"):
        InverseHarmonicMean(0.1).fitted(xy_objective(MLP.model(), MLP.loss), {}, None)


def test_a_method_travels_by_pickle() -> None:
    method = InverseHarmonicMean(Relative(0.1), {"a": ["0.bias"]})
    assert pickle.loads(pickle.dumps(method)) == method
