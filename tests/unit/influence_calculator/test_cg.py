"""Conjugate gradients: the numbers, how each right-hand side ends, what must not matter."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from influence_calculator.maths import region, training_batches
from influence_calculator.maths.blocks import BlockMode, Relative
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.conjugate_gradients import Stopping, conjugate_gradients
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.method import Fitted, SolverStatus, fit
from influence_calculator.maths.objective import IndexedBatch, xy_objective
from influence_calculator.maths.preconditioners import JacobiPreconditioner, NystroemPreconditioner
from influence_calculator.maths.training_batches import joined
from model_cases import LOGISTIC, MLP, ModelCase
from references import CASES_AND_MODES, REGULARIZATIONS, reference
from training_sets import TrainingSet

MODES = list(SecondOrderMode)
PRECONDITIONERS = [None, JacobiPreconditioner(2), NystroemPreconditioner(8)]


def _fitted(case: ModelCase, method: Cg, size: int = 5) -> Fitted:
    objective = xy_objective(case.model(), case.loss)
    data = TrainingSet(case.train(), size)
    return method.fitted(objective, fit(method, objective, data), data)


def _gradients(fitted: Fitted, case: ModelCase) -> dict[str, Tensor]:
    return fitted.gradients(xy_objective(case.model(), case.loss), case.test())


@pytest.mark.parametrize(("case", "mode"), CASES_AND_MODES, ids=str)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_factors_and_influences_are_those_of_the_explicit_matrix(
    case: ModelCase, mode: SecondOrderMode, λ: float
) -> None:
    expected = reference(case, mode)
    fitted = _fitted(case, Cg(λ, rtol=1e-10, second_order=mode))
    solved = fitted.solve(_gradients(fitted, case))
    assert (solved.report.status == SolverStatus.CONVERGED).all()
    oracle.assert_close(solved.left[""], expected.factors(λ), expected.bound(λ))
    scores = region.influences(fitted, solved.left, case.train(), micro_batch=6)
    oracle.assert_close(scores, expected.influences(λ), expected.bound(λ))


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=["none", "jacobi", "nystroem"])
@pytest.mark.parametrize("mode", MODES)
def test_a_preconditioner_changes_iterations_never_the_answer(
    mode: SecondOrderMode, preconditioner: Any
) -> None:
    expected = reference(MLP, mode)
    fitted = _fitted(MLP, Cg(0.01, rtol=1e-10, second_order=mode, preconditioner=preconditioner))
    solved = fitted.solve(_gradients(fitted, MLP))
    assert (solved.report.status == SolverStatus.CONVERGED).all()
    oracle.assert_close(solved.left[""], expected.factors(0.01), expected.bound(0.01))


def test_the_reported_residual_is_the_true_one_and_within_the_tolerance() -> None:
    expected = reference(MLP, "hessian")
    for rtol in (1e-2, 1e-10):
        fitted = _fitted(MLP, Cg(0.01, rtol=rtol))
        gradients = _gradients(fitted, MLP)
        solved = fitted.solve(gradients)
        matrix = expected.curvature + 0.01 * torch.eye(60, dtype=torch.float64)
        remainder = (gradients[""] - solved.left[""] @ matrix).norm(dim=1) / gradients[""].norm(dim=1)
        assert torch.allclose(solved.report.residual, remainder, rtol=1e-3, atol=1e-13)
        assert (solved.report.residual <= rtol).all()


def test_each_right_hand_side_converges_on_its_own_norm() -> None:
    """Mistake 2: norms along the wrong dimension, and `rtol²`: one large row then decides for all."""
    matrix = torch.diag(torch.linspace(0.01, 1, 40, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 40, dtype=torch.float64, generator=generator)
    rows *= torch.tensor([1e-12, 1e-6, 1.0, 1e6, 1e12], dtype=torch.float64)[:, None]
    solution, report = conjugate_gradients(lambda v: v @ matrix, rows, Stopping(1e-8, 0.0, 400))
    remainder = (rows - solution @ matrix).norm(dim=1) / rows.norm(dim=1)
    assert (report.status == SolverStatus.CONVERGED).all()
    assert (remainder <= 1.001e-8).all()


def test_answers_are_linear_in_the_gradient() -> None:
    """With atol 0 a confident example's tiny gradient is solved like any other; float32 squares underflow."""
    matrix = torch.diag(torch.linspace(0.1, 1, 20))
    row = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    stopping = Stopping(1e-5, 0.0, 100)
    large, _ = conjugate_gradients(lambda v: v @ matrix, row, stopping)
    tiny, report = conjugate_gradients(lambda v: v @ matrix, row * 2.0**-90, stopping)
    assert report.status.tolist() == [SolverStatus.CONVERGED]
    assert torch.equal(tiny * 2.0**90, large)


def test_an_absolute_tolerance_answers_zero_for_small_gradients() -> None:
    matrix = torch.diag(torch.linspace(0.1, 1, 20, dtype=torch.float64))
    rows = torch.ones(2, 20, dtype=torch.float64) * torch.tensor([[1e-8], [1.0]], dtype=torch.float64)
    solution, report = conjugate_gradients(lambda v: v @ matrix, rows, Stopping(1e-4, 1e-6, 100))
    assert solution[0].eq(0).all()
    assert report.iterations[0] == 0
    assert report.iterations[1] > 0


def test_float32_converges_where_pydvl_never_ends() -> None:
    """Mistake 2, on a model of 1 000 parameters: rtol 1e-4 in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))
    objective = xy_objective(model, F.cross_entropy)
    method = Cg(0.1, second_order=SecondOrderMode.GENERALIZED_GAUSS_NEWTON)
    fitted = method.fitted(objective, {}, TrainingSet((x, y), 10))
    solved = fitted.solve(fitted.gradients(objective, (x[:8], y[:8])))
    assert (solved.report.status == SolverStatus.CONVERGED).all()
    assert solved.report.iterations.max() < 100
    matrix = oracle.generalized_gauss_newton(model, F.cross_entropy, x, y)
    expected = oracle.factors(matrix, 0.1, oracle.example_gradients(model, F.cross_entropy, x[:8], y[:8]))
    oracle.assert_close(solved.left[""], expected, 1e-4 * oracle.condition_number(matrix, 0.1))


def test_a_zero_right_hand_side_is_converged_with_zero() -> None:
    fitted = _fitted(MLP, Cg(0.01))
    gradients = _gradients(fitted, MLP)
    gradients[""][2] = 0
    solved = fitted.solve(gradients)
    assert solved.left[""][2].eq(0).all()
    assert solved.report.status[2] == SolverStatus.CONVERGED
    assert solved.report.iterations[2] == 0
    assert solved.report.residual[2] == 0


def test_a_right_hand_side_that_runs_out_of_iterations_says_so() -> None:
    fitted = _fitted(MLP, Cg(0.01, rtol=1e-10, maxiter=3))
    report = fitted.solve(_gradients(fitted, MLP)).report
    assert (report.status == SolverStatus.MAX_ITERATIONS).all()
    assert (report.iterations == 3).all()
    assert (report.residual > 1e-10).all()


def test_a_tolerance_below_rounding_ends_instead_of_running_on() -> None:
    matrix = torch.diag(torch.logspace(-4, 0, 30))
    row = torch.ones(1, 30)
    solution, report = conjugate_gradients(lambda v: v @ matrix, row, Stopping(1e-12, 0.0, 100_000))
    assert report.status.tolist() == [SolverStatus.MAX_ITERATIONS]
    assert report.iterations[0] < 1000
    assert torch.allclose(solution, row / matrix.diagonal(), rtol=1e-2)


def test_an_indefinite_curvature_keeps_the_last_iterate_and_says_so() -> None:
    diagonal = torch.tensor([4.0, 3.0, -1.0], dtype=torch.float64)
    rows = torch.tensor([[1.0, 1.0, 0.01], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    solution, report = conjugate_gradients(lambda v: v * diagonal, rows, Stopping(1e-10, 0.0, 50))
    assert report.status.tolist() == [
        SolverStatus.INDEFINITE,
        SolverStatus.INDEFINITE,
        SolverStatus.CONVERGED,
    ]
    assert solution.isfinite().all()
    assert solution[0].norm() > 0
    assert solution[1].eq(0).all()
    oracle.assert_close(solution[2], rows[2] / diagonal, 1e-10)


@pytest.mark.parametrize("simultaneous", [True, False])
def test_a_gradient_that_is_not_finite_concerns_its_row_only(simultaneous: bool) -> None:
    fitted = _fitted(MLP, Cg(0.01, rtol=1e-8, simultaneous=simultaneous))
    gradients = _gradients(fitted, MLP)
    expected = fitted.solve({"": gradients[""].clone()}).left[""]
    gradients[""][1, 5] = torch.inf
    solved = fitted.solve(gradients)
    others = [0, 2, 3, 4, 5, 6]
    oracle.assert_close(solved.left[""][others], expected[others], 1e-6)
    assert solved.left[""][1].isnan().all()
    assert solved.report.status.tolist() == [0, SolverStatus.NOT_FINITE, 0, 0, 0, 0, 0]


def test_training_data_that_is_not_finite_shows_in_every_row() -> None:
    x, y = LOGISTIC.train()
    x[3] = torch.nan
    objective = xy_objective(LOGISTIC.model(), LOGISTIC.loss)
    fitted = Cg(0.1).fitted(objective, {}, TrainingSet((x, y), 5))
    solved = fitted.solve(_gradients(fitted, LOGISTIC))
    assert (solved.report.status == SolverStatus.NOT_FINITE).all()
    assert solved.left[""].isnan().all()


def test_one_after_another_gives_the_numbers_of_all_at_once() -> None:
    together = _fitted(MLP, Cg(0.01, rtol=1e-10))
    alone = _fitted(MLP, Cg(0.01, rtol=1e-10, simultaneous=False))
    a, b = (fitted.solve(_gradients(fitted, MLP)) for fitted in (together, alone))
    oracle.assert_close(a.left[""], b.left[""], 1e-7)
    assert (a.report.iterations - b.report.iterations).abs().max() <= 2


@pytest.mark.parametrize("mode", MODES)
def test_neither_batches_nor_their_number_nor_memory_matter(
    mode: SecondOrderMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference(MLP, mode)
    for size, kept in ((1, 1 << 30), (22, 1 << 30), (22, 0), (4, 2000)):
        monkeypatch.setattr(training_batches, "KEPT_BYTES", kept)
        monkeypatch.setattr("influence_calculator.maths.training_products.KEPT_BYTES", kept)
        fitted = _fitted(MLP, Cg(0.1, rtol=1e-10, second_order=mode), size)
        left = fitted.solve(_gradients(fitted, MLP)).left[""]
        oracle.assert_close(left, expected.factors(0.1), expected.bound(0.1))


def test_a_training_set_that_fits_is_read_once() -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    data = TrainingSet(MLP.train(), 5)
    fitted = Cg(0.1).fitted(objective, {}, data)
    for _ in range(2):
        fitted.solve(_gradients(fitted, MLP))
    assert data.passes == 1


def test_a_training_set_that_does_not_fit_is_read_in_every_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never held as a whole."""
    monkeypatch.setattr(training_batches, "KEPT_BYTES", 500)
    objective = xy_objective(MLP.model(), MLP.loss)
    data = TrainingSet(MLP.train(), 5)
    fitted = Cg(0.1, maxiter=4, rtol=1e-12).fitted(objective, {}, data)
    fitted.solve(_gradients(fitted, MLP))
    assert data.passes > 4


def test_over_blocks_a_row_has_the_worst_end_the_most_iterations_and_the_largest_residual() -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    fitted = _fitted(MLP, Cg(0.01, rtol=1e-8, maxiter=12, blocks=BlockMode.LAYER_WISE))
    gradients = fitted.gradients(objective, MLP.test())
    report = fitted.solve(gradients).report
    alone = [fitted.solvers[block].solve(gradients[block])[1] for block in fitted.layout.blocks]
    for name in ("status", "iterations", "residual"):
        values = torch.stack([getattr(own, name) for own in alone])
        assert not torch.equal(values.amin(0), values.amax(0)), "all blocks end alike"
        assert torch.equal(getattr(report, name), values.amax(0))


@pytest.mark.parametrize(
    "blocks", [BlockMode.LAYER_WISE, {"some": ["2.weight", "4.bias"], "one": ["0.bias"]}]
)
@pytest.mark.parametrize("mode", MODES)
def test_blocks_are_solved_as_the_direct_method_solves_them(mode: SecondOrderMode, blocks: Any) -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    data = TrainingSet(MLP.train(), 5)
    dense = Direct(0.05, blocks, mode)
    expected = dense.fitted(objective, fit(dense, objective, data), None)
    fitted = _fitted(MLP, Cg(0.05, rtol=1e-10, blocks=blocks, second_order=mode))
    solved = fitted.solve(_gradients(fitted, MLP))
    for block, factors in expected.solve(_gradients(expected, MLP)).left.items():
        oracle.assert_close(solved.left[block], factors, 1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_a_relative_regularization_follows_the_exact_trace(mode: SecondOrderMode) -> None:
    expected = reference(MLP, mode)
    λ = 0.5 * float(expected.curvature.trace()) / 60
    fitted = _fitted(MLP, Cg(Relative(0.5), rtol=1e-10, second_order=mode))
    oracle.assert_close(
        fitted.solve(_gradients(fitted, MLP)).left[""], expected.factors(λ), expected.bound(λ)
    )


def test_a_preconditioners_fit_does_not_depend_on_batches() -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    for preconditioner in PRECONDITIONERS[1:]:
        method = Cg(0.1, preconditioner=preconditioner)
        whole, pieces = (fit(method, objective, TrainingSet(MLP.train(), size)) for size in (23, 4))
        (step,) = method.passes()
        for name, value in whole[step.name][""].items():
            oracle.assert_close(pieces[step.name][""][name].abs(), value.abs(), 1e-6)


def test_jacobi_with_many_samples_estimates_the_diagonal() -> None:
    method = Cg(0.1, preconditioner=JacobiPreconditioner(2000), second_order=SecondOrderMode.EMPIRICAL_FISHER)
    objective = xy_objective(MLP.model(), MLP.loss)
    diagonal = fit(method, objective, TrainingSet(MLP.train(), 5))["jacobi"][""]["diagonal"]
    oracle.assert_close(diagonal, reference(MLP, "empirical_fisher").curvature.diagonal(), 0.2)


def test_a_nystroem_preconditioner_of_the_full_rank_solves_in_a_few_iterations() -> None:
    method = Cg(
        0.01,
        rtol=1e-10,
        preconditioner=NystroemPreconditioner(60),
        second_order=SecondOrderMode.GENERALIZED_GAUSS_NEWTON,
    )
    fitted = _fitted(MLP, method)
    report = fitted.solve(_gradients(fitted, MLP)).report
    assert (report.status == SolverStatus.CONVERGED).all()
    assert report.iterations.max() <= 4


def test_joined_batches_hold_the_same_examples_and_keep_other_shapes_apart() -> None:
    short, long = torch.arange(6.0).reshape(6, 1), torch.ones(3, 2)
    batches = [IndexedBatch(0, (short[:2],)), IndexedBatch(2, (short[2:4],)), IndexedBatch(4, (short[4:],))]
    batches.append(IndexedBatch(6, (long,)))
    groups = list(joined(batches, 4))
    assert [group.start for group in groups] == [0, 4, 6]
    assert torch.equal(torch.cat([group.batch[0] for group in groups[:2]]), short)


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        (Cg(0.1), None, "data: conjugate gradients go over the training set again"),
        (Cg(Relative(0.1)), TrainingSet(MLP.train(), 5), "'trace'"),
        (Cg(0.1, preconditioner=JacobiPreconditioner()), TrainingSet(MLP.train(), 5), "preconditioner"),
    ],
)
def test_what_solving_needs_is_asked_for(method: Cg, data: TrainingSet | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method.fitted(xy_objective(MLP.model(), MLP.loss), {}, data)


@pytest.mark.parametrize("options", [{"rtol": -1.0}, {"atol": float("nan")}, {"maxiter": 0}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Cg(0.1, **options)


def test_a_method_travels_by_pickle() -> None:
    method = Cg(Relative(0.1), preconditioner=NystroemPreconditioner(3), blocks={"a": ["0.bias"]})
    assert pickle.loads(pickle.dumps(method)) == method


def test_jacobi_takes_the_modulus_of_a_diagonal_that_may_be_negative() -> None:
    """Of an indefinite Hessian, and of an estimate by few signs."""
    precondition = JacobiPreconditioner().rows({"diagonal": torch.tensor([-2.0, 1.0])}, 0.5)
    assert torch.allclose(precondition(torch.ones(1, 2)), torch.tensor([[1 / 2.5, 1 / 1.5]]))


def test_batches_of_other_dtypes_are_kept_apart() -> None:
    """Joined, integers would be rounded to floats, or floats cast."""
    whole, half = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)
    found = list(joined([IndexedBatch(0, (whole,)), IndexedBatch(2, (half,))], 8))
    assert [batch[0].dtype for _, batch in found] == [torch.float32, torch.float64]
