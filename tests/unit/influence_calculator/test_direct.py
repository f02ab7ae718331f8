"""The direct method and the dense curvature, against explicit matrices in float64."""

from __future__ import annotations

import copy
from typing import Any

import curvlinops
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from influence_calculator.maths import direct, region
from influence_calculator.maths.blocks import BlockMode, Relative
from influence_calculator.maths.curvature import SecondOrderMode, curvatures, products
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.errors import NotFiniteError, SingularCurvatureError
from influence_calculator.maths.method import FitState, Fitted, SolverStatus, fit
from influence_calculator.maths.objective import IndexedBatch, micro_batches, xy_objective
from model_cases import LINEAR, LOGISTIC, MLP, ModelCase, linear_regression_curvature
from references import CASES_AND_MODES, REGULARIZATIONS, reference
from training_sets import TrainingSet

MODES = list(SecondOrderMode)


def _fit(case: ModelCase, method: Direct, size: int = 5, dtype: torch.dtype = torch.float64) -> FitState:
    x, y = (values.to(dtype) if values.is_floating_point() else values for values in case.train())
    return fit(method, xy_objective(case.model(dtype), case.loss), TrainingSet((x, y), size))


def _fitted(case: ModelCase, method: Direct, size: int = 5) -> Fitted:
    return method.fitted(xy_objective(case.model(), case.loss), _fit(case, method, size), None)


def _flat_factors(fitted: Fitted, case: ModelCase) -> Tensor:
    gradients = fitted.gradients(xy_objective(case.model(), case.loss), case.test())
    return fitted.layout.flatten(fitted.solve(gradients).left)


@pytest.mark.parametrize(("case", "mode"), CASES_AND_MODES, ids=str)
def test_factors_and_influences_are_those_of_the_explicit_matrix(
    case: ModelCase, mode: SecondOrderMode
) -> None:
    expected = reference(case, mode)
    objective = xy_objective(case.model(), case.loss)
    state = _fit(case, Direct(second_order=mode))
    for λ in REGULARIZATIONS:
        # Another λ needs no new pass over the data.
        fitted = Direct(λ, second_order=mode).fitted(objective, state, None)
        left = fitted.solve(fitted.gradients(objective, case.test())).left
        oracle.assert_close(fitted.layout.flatten(left), expected.factors(λ), expected.bound(λ))
        scores = region.influences(fitted, left, case.train(), micro_batch=6)
        oracle.assert_close(scores, expected.influences(λ), expected.bound(λ))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("λ", REGULARIZATIONS)
def test_float32_stays_within_its_bound(mode: SecondOrderMode, λ: float) -> None:
    expected = reference(MLP, mode)
    method = Direct(λ, second_order=mode)
    objective = xy_objective(MLP.model(torch.float32), MLP.loss)
    fitted = method.fitted(objective, _fit(MLP, method, dtype=torch.float32), None)
    x, y = MLP.test()
    left = fitted.solve(fitted.gradients(objective, (x.float(), y))).left[""]
    assert left.dtype is torch.float32
    oracle.assert_close(left, expected.factors(λ), expected.bound(λ, torch.float32))


def test_linear_regression_has_the_closed_form() -> None:
    matrix = _fit(LINEAR, Direct())["curvature"][""]["matrix"]
    oracle.assert_close(matrix, linear_regression_curvature(LINEAR.train()[0], LINEAR.targets), 1e-12)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        (SecondOrderMode.HESSIAN, "HessianLinearOperator"),
        (SecondOrderMode.EMPIRICAL_FISHER, "EFLinearOperator"),
        (SecondOrderMode.GENERALIZED_GAUSS_NEWTON, "GGNLinearOperator"),
    ],
)
def test_the_matrix_agrees_with_curvlinops(mode: SecondOrderMode, kind: str) -> None:
    model = MLP.model()
    operator = getattr(curvlinops, kind)(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [MLP.train()]
    )
    expected = (operator @ torch.eye(operator.shape[0], dtype=torch.float64)).detach()
    oracle.assert_close(_fit(MLP, Direct(second_order=mode))["curvature"][""]["matrix"], expected, 1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 22, 23])
def test_an_average_weighs_examples_not_batches(mode: SecondOrderMode, size: int) -> None:
    """Mistake 1: with 23 examples, batches of 22 leave a last batch of one."""
    matrix = _fit(MLP, Direct(second_order=mode), size)["curvature"][""]["matrix"]
    oracle.assert_close(matrix, reference(MLP, mode).curvature, 1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("q", [1, 3])
def test_products_do_not_depend_on_the_number_of_vectors_or_of_batches(mode: SecondOrderMode, q: int) -> None:
    """Mistake 1: exactly 1/3 for three right-hand sides, and sums that count batches."""
    objective = xy_objective(MLP.model(), MLP.loss)
    layout = Direct().layout(objective)
    expected = reference(MLP, mode).curvature
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(q, layout.width, dtype=torch.float64, generator=generator)
    total = torch.zeros_like(vectors)
    for piece in micro_batches(IndexedBatch(0, MLP.train()), 4):
        total += products(mode, objective, layout, piece.batch, {"": vectors})[""]
    oracle.assert_close(total / 23, vectors @ expected, 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_a_bounded_workspace_changes_nothing(mode: SecondOrderMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence_calculator.maths.directional.WORKSPACE_BYTES", {"cpu": 1, "cuda": 1})
    matrix = _fit(LOGISTIC, Direct(second_order=mode))["curvature"][""]["matrix"]
    oracle.assert_close(matrix, reference(LOGISTIC, mode).curvature, 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_traces_are_those_of_the_matrix(mode: SecondOrderMode) -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    layout = Direct(blocks=BlockMode.LAYER_WISE).layout(objective)
    expected = reference(MLP, mode).curvature
    for block, curvature in curvatures(mode, objective, layout, MLP.train()):
        names = tuple(slot.name for slot in layout.slots_of(block))
        own = oracle.columns_of(objective.model, names)
        assert float(curvature.trace()) / 23 == pytest.approx(
            float(expected.diagonal()[own].sum()), rel=1e-10
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "blocks",
    [
        BlockMode.LAYER_WISE,
        BlockMode.PARAMETER_WISE,
        {"ends": ["4.weight", "0.bias"], "middle": ["2.weight"]},
    ],
    ids=["layer-wise", "parameter-wise", "custom"],
)
def test_blocks_solve_with_the_curvature_between_them_zero(mode: SecondOrderMode, blocks: Any) -> None:
    expected = reference(MLP, mode)
    fitted = _fitted(MLP, Direct(0.1, blocks, mode))
    model = MLP.model()
    columns = [
        oracle.columns_of(model, tuple(slot.name for slot in fitted.layout.slots_of(block)))
        for block in fitted.layout.blocks
    ]
    treated = torch.cat(columns).sort().values
    block_diagonal = oracle.block_diagonal(expected.curvature, columns)
    solved = oracle.factors(block_diagonal, 0.1, expected.test)[:, treated]
    oracle.assert_close(_flat_factors(fitted, MLP), solved, expected.bound(0.1))


def test_each_block_takes_its_own_regularization() -> None:
    blocks = {"first": ["0.weight", "0.bias"], "rest": ["2.weight", "4.weight", "4.bias"]}
    one = _fitted(MLP, Direct({"first": 0.5, "rest": 0.1}, blocks))
    gradients = one.gradients(xy_objective(MLP.model(), MLP.loss), MLP.test())
    both = one.solve(gradients).left
    for block, λ in (("first", 0.5), ("rest", 0.1)):
        same = _fitted(MLP, Direct(λ, blocks)).solve(gradients).left
        assert torch.equal(both[block], same[block])


def test_a_relative_regularization_follows_the_trace() -> None:
    expected = reference(LINEAR, "hessian")
    λ = 0.3 * float(expected.curvature.trace()) / 10
    oracle.assert_close(
        _flat_factors(_fitted(LINEAR, Direct(Relative(0.3))), LINEAR), expected.factors(λ), 1e-9
    )


def test_an_indefinite_matrix_is_solved_by_lu() -> None:
    λ = 1e-4
    curvature = reference(MLP, "hessian").curvature
    assert oracle.smallest_eigenvalue(curvature) < -2 * λ
    expected = oracle.factors(curvature, λ, reference(MLP, "hessian").test)
    limit = 100 * oracle.condition_number(curvature, λ) * torch.finfo(torch.float64).eps
    oracle.assert_close(_flat_factors(_fitted(MLP, Direct(λ)), MLP), expected, max(1e-6, limit))


@pytest.mark.parametrize("λ", [1e-4, 0.1], ids=["LU", "Cholesky"])
def test_a_block_is_factorized_once_however_often_it_solves(
    λ: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistake 7: LU factored anew at every call."""
    calls: list[str] = []
    for name in ("cholesky_ex", "lu_factor_ex"):
        original = getattr(torch.linalg, name)
        monkeypatch.setattr(
            direct.torch.linalg, name, lambda *a, name=name, f=original: (calls.append(name), f(*a))[1]
        )
    monkeypatch.setattr(direct.torch.linalg, "solve", None)
    fitted = _fitted(MLP, Direct(λ))
    factorizations = list(calls)
    for _ in range(3):
        _flat_factors(fitted, MLP)
    assert calls == factorizations
    assert factorizations == (["cholesky_ex"] if λ == 0.1 else ["cholesky_ex", "lu_factor_ex"])


def test_negative_eigenvalues_of_the_output_hessian_are_clipped_and_counted() -> None:
    def saddle(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs[:, 0] ** 2 - outputs[:, 1] ** 2 + 0 * y).sum()

    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    method = Direct(0.1, BlockMode.PARAMETER_WISE, SecondOrderMode.GENERALIZED_GAUSS_NEWTON)
    objective = xy_objective(model, saddle)
    state = fit(method, objective, TrainingSet((x, y), 2))
    expected = oracle.generalized_gauss_newton(model, saddle, x, y)
    oracle.assert_close(state["curvature"]["weight"]["matrix"], expected[:6, :6], 1e-10)
    assert [int(block["clipped"]) for block in state["curvature"].values()] == [5, 5]
    (note,) = method.fitted(objective, state).notes
    assert "5 negative eigenvalues of its second derivatives" in note


def test_cross_entropy_clips_nothing() -> None:
    method = Direct(second_order=SecondOrderMode.GENERALIZED_GAUSS_NEWTON)
    assert int(_fit(MLP, method)["curvature"][""]["clipped"]) == 0
    assert _fitted(MLP, Direct(0.1, second_order=SecondOrderMode.GENERALIZED_GAUSS_NEWTON)).notes == ()


def test_a_test_gradient_that_is_not_finite_concerns_its_row_only() -> None:
    fitted = _fitted(MLP, Direct(0.1, BlockMode.LAYER_WISE))
    gradients = fitted.gradients(xy_objective(MLP.model(), MLP.loss), MLP.test())
    expected = fitted.solve(gradients)
    broken = copy.deepcopy(gradients)
    broken["2"][3, 1] = torch.nan
    solved = fitted.solve(broken)
    others = [i for i in range(7) if i != 3]
    for block in fitted.layout.blocks:
        oracle.assert_close(solved.left[block][others], expected.left[block][others], 1e-12)
    assert solved.left["2"][3].isnan().all()
    assert solved.report.status.tolist() == [
        SolverStatus.NOT_FINITE if i == 3 else SolverStatus.CONVERGED for i in range(7)
    ]


def test_nothing_to_invert_is_refused_with_the_cure() -> None:
    # A class that is never right and a bias per class leave a direction without curvature: all logits shift.
    x = torch.zeros(3, 4, dtype=torch.float64)
    objective = xy_objective(nn.Linear(4, 3).double(), F.cross_entropy)
    state = fit(Direct(), objective, TrainingSet((x, torch.zeros(3, dtype=torch.long)), 2))
    with pytest.raises(SingularCurvatureError, match="larger regularization"):
        Direct(0.0).fitted(objective, state, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", [-0.9, -0.6, 0.6, 0.9])
@pytest.mark.parametrize("symmetric", [True, False], ids=["Cholesky", "LU"])
def test_a_well_conditioned_matrix_is_inverted_whatever_its_scale(
    dtype: torch.dtype, exponent: float, symmetric: bool
) -> None:
    """Squares of its entries are above the largest number of its dtype, or below the smallest."""
    scale = float(torch.finfo(dtype).max) ** exponent
    A = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = A.T @ A / 30
    solver = direct.DenseSolver("", (scale * matrix).to(dtype), 0.1 * scale, symmetric=symmetric)
    solved, _ = solver.solve(scale * torch.eye(5, dtype=dtype))
    expected = torch.linalg.inv(matrix + 0.1 * torch.eye(5, dtype=torch.float64))
    oracle.assert_close(solved, expected, 1e-4 if dtype is torch.float32 else 1e-12)


@pytest.mark.parametrize("exponent", [-0.8, 0.0, 0.8])
def test_a_singular_one_is_refused_whatever_its_scale(exponent: float) -> None:
    scale = float(torch.finfo(torch.float32).max) ** exponent
    A = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(SingularCurvatureError, match="larger regularization"):
        direct.DenseSolver("", (scale * A.T @ A).float(), 0.0)


def test_columns_are_measured_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    monkeypatch.setattr(direct, "SCALED_ELEMENTS", 3)
    longest = direct._longest_column(matrix, 2.0)
    assert longest == pytest.approx(float(torch.linalg.vector_norm(matrix[:, 3])) / 2)


def test_a_training_example_that_is_not_finite_is_named_as_the_cause() -> None:
    x, y = LINEAR.train()
    x[4] = torch.nan
    objective = xy_objective(LINEAR.model(), LINEAR.loss)
    state = fit(Direct(0.1), objective, TrainingSet((x, y), 5))
    with pytest.raises(NotFiniteError, match="a training example"):
        Direct(0.1).fitted(objective, state, None)


@pytest.mark.parametrize(
    "state", [{}, {"curvature": {"": {"matrix": torch.eye(3)}}}], ids=["none", "another"]
)
def test_a_state_that_lacks_what_is_needed_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"expected 'matrix' \[10, 10\] of block ''"):
        Direct(0.1).fitted(xy_objective(LINEAR.model(), LINEAR.loss), state, None)


def test_ranges_summed_in_order_give_what_one_pass_gives() -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    x, y = MLP.train()
    whole = TrainingSet((x, y), 4)
    ranges = [TrainingSet((x[a:b], y[a:b]), 4) for a, b in ((0, 8), (8, 16), (16, 23))]
    one = fit(Direct(), objective, whole)["curvature"][""]["matrix"]
    several = fit(Direct(), objective, whole, ranges)["curvature"][""]["matrix"]
    oracle.assert_close(several, one, 1e-12)
