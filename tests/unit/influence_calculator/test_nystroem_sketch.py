"""The Nyström method against its formula with explicit matrices in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from influence_calculator import NystroemSketchInfluence
from influence_calculator.maths import preconditioners, region
from influence_calculator.maths.blocks import BlockMode, Relative
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.errors import NotFiniteError, SingularCurvatureError
from influence_calculator.maths.method import FitState, Fitted, SolverStatus, fit
from influence_calculator.maths.nystroem_sketch import NystroemSketch
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.perturbation import perturbations
from influence_calculator.maths.seeded_rows import generator, orthonormal_rows
from model_cases import CASES, LINEAR, LOGISTIC, MLP, TRANSFORMER, ModelCase
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

HESSIAN, GAUSS_NEWTON = SecondOrderMode.HESSIAN, SecondOrderMode.GENERALIZED_GAUSS_NEWTON
FULL_RANK = 200
POSITIVE = [
    (case, mode)
    for case in (*CASES, TRANSFORMER)
    for mode in SecondOrderMode
    if mode is not HESSIAN or case in (LINEAR, LOGISTIC)
]
"""Convex models have positive Hessians, the other matrices are positive by themselves."""


def fit_case(case: ModelCase, method: NystroemSketch, size: int = 5) -> FitState:
    return fit(method, xy_objective(case.model(), case.loss), TrainingSet(case.train(), size))


def fitted_case(case: ModelCase, method: NystroemSketch, state: FitState | None = None) -> Fitted:
    objective = xy_objective(case.model(), case.loss)
    return method.fitted(objective, state if state is not None else fit_case(case, method), None)


def left_of(fitted: Fitted, case: ModelCase) -> dict[str, Tensor]:
    return fitted.solve(fitted.gradients(xy_objective(case.model(), case.loss), case.test())).left


def sketched(curvature: Tensor, rank: int, seed: int, block: str = "") -> Tensor:
    """`HΩ (ΩᵀHΩ)^+ ΩᵀH`."""
    rows = orthonormal_rows(rank, len(curvature), generator(seed, block), curvature)
    product = rows @ curvature
    return product.T @ torch.linalg.pinv(product @ rows.T, hermitian=True, rtol=1e-12) @ product


@pytest.mark.parametrize(("case", "mode"), POSITIVE, ids=repr)
def test_at_full_rank_it_is_the_direct_solve(case: ModelCase, mode: SecondOrderMode) -> None:
    expected = reference(case, mode)
    assert oracle.smallest_eigenvalue(expected.curvature) >= -1e-9
    method = NystroemSketch(1.0, FULL_RANK, second_order=mode)
    state = fit_case(case, method)
    for λ in REGULARIZATIONS:
        # Another λ needs no new pass over the data.
        fitted = fitted_case(case, replace(method, regularization=λ), state)
        left = left_of(fitted, case)
        oracle.assert_close(fitted.layout.flatten(left), expected.factors(λ), expected.bound(λ))
        scores = region.influences(fitted, left, case.train(), micro_batch=6)
        oracle.assert_close(scores, expected.influences(λ), expected.bound(λ))
        assert fitted.notes == ()
        if case.vocabulary is None:
            x, y = (part[:3] for part in case.train())
            moved = perturbations(fitted, xy_objective(case.model(), case.loss), left, (x, y), 2)
            explicit = oracle.perturbations(case.model(), case.loss, expected.factors(λ), x, y)
            oracle.assert_close(moved, explicit, expected.bound(λ))


@pytest.mark.parametrize("mode", [GAUSS_NEWTON, SecondOrderMode.EMPIRICAL_FISHER])
@pytest.mark.parametrize("rank", [1, 6, 20])
def test_of_low_rank_it_is_its_formula(mode: SecondOrderMode, rank: int) -> None:
    expected = reference(MLP, mode)
    curvature = sketched(expected.curvature, rank, seed=4)
    left = left_of(fitted_case(MLP, NystroemSketch(0.1, rank, second_order=mode, seed=4)), MLP)[""]
    oracle.assert_close(left, oracle.factors(curvature, 0.1, expected.test), 1e-6)
    assert oracle.relative_error(left, expected.factors(0.1)) > 1e-5


@pytest.mark.parametrize(
    "blocks",
    [BlockMode.LAYER_WISE, BlockMode.PARAMETER_WISE, {"a": ["4.weight", "0.bias"], "b": ["2.weight"]}],
)
def test_blocks_have_their_own_sketches(blocks: Any) -> None:
    expected = reference(MLP, GAUSS_NEWTON)
    fitted = fitted_case(MLP, NystroemSketch(0.1, 4, blocks, GAUSS_NEWTON))
    left = left_of(fitted, MLP)
    for block in fitted.layout.blocks:
        names = tuple(slot.name for slot in fitted.layout.slots_of(block))
        own = oracle.columns_of(MLP.model(), names)
        matrix = expected.curvature[own[:, None], own]
        curvature = sketched(matrix, min(4, len(own)), 0, block)
        oracle.assert_close(left[block], oracle.factors(curvature, 0.1, expected.test[:, own]), 1e-6)


def test_each_block_takes_its_own_regularization_and_a_relative_one_follows_the_trace() -> None:
    blocks = {"first": ["0.weight", "0.bias"], "rest": ["2.weight", "4.weight", "4.bias"]}
    method = NystroemSketch(0.1, 4, blocks, GAUSS_NEWTON)
    both = left_of(fitted_case(MLP, replace(method, regularization={"first": 0.5, "rest": 0.1})), MLP)
    for block, λ in (("first", 0.5), ("rest", 0.1)):
        same = left_of(fitted_case(MLP, replace(method, regularization=λ)), MLP)[block]
        assert torch.equal(both[block], same)
    curvature = reference(MLP, GAUSS_NEWTON).curvature
    left = left_of(fitted_case(MLP, replace(method, regularization=Relative(0.3))), MLP)
    for block, names in blocks.items():
        own = oracle.columns_of(MLP.model(), tuple(names))
        λ = 0.3 * float(curvature.diagonal()[own].mean())
        same = left_of(fitted_case(MLP, replace(method, regularization=λ)), MLP)[block]
        oracle.assert_close(left[block], same, 1e-9)


@pytest.mark.parametrize("mode", list(SecondOrderMode))
def test_batches_and_their_order_do_not_matter(mode: SecondOrderMode) -> None:
    """Mistake 1: with 23 examples, batches of 22 leave a last batch of one."""
    method = NystroemSketch(0.1, 6, second_order=mode)
    expected = left_of(fitted_case(MLP, method), MLP)[""]
    order = torch.randperm(23, generator=torch.Generator().manual_seed(5))
    x, y = MLP.train()
    objective = xy_objective(MLP.model(), MLP.loss)
    states = [fit_case(MLP, method, size) for size in (1, 22, 23)]
    states.append(fit(method, objective, TrainingSet((x[order], y[order]), 4)))
    for state in states:
        oracle.assert_close(left_of(fitted_case(MLP, method, state), MLP)[""], expected, 1e-7)


def test_influences_are_symmetric() -> None:
    fitted = fitted_case(MLP, NystroemSketch(0.1, 6))
    objective = xy_objective(MLP.model(), MLP.loss)
    a, b = MLP.test(), MLP.train()
    solved = [fitted.solve(fitted.gradients(objective, side)).left for side in (a, b)]
    oracle.assert_close(fitted.score(solved[0], b), fitted.score(solved[1], a).T, 1e-10)


@pytest.mark.parametrize(("times", "status"), [(0.5, SolverStatus.INDEFINITE), (1.1, SolverStatus.CONVERGED)])
def test_an_indefinite_hessian_is_told(times: float, status: SolverStatus) -> None:
    """Where λ makes it positive too: the sketch takes for 0 what is negative, at full rank as well."""
    smallest = oracle.smallest_eigenvalue(reference(MLP, HESSIAN).curvature)
    λ = -smallest * times
    method = NystroemSketch(λ, FULL_RANK)
    fitted = fitted_case(MLP, method)
    (note,) = fitted.notes
    assert float(note.split("an eigenvalue of about ")[1].split(",")[0]) == pytest.approx(smallest, rel=0.1)
    assert "the sketch takes negative curvature for 0" in note
    solved = fitted.solve(fitted.gradients(xy_objective(MLP.model(), MLP.loss), MLP.test()))
    assert solved.report.status.tolist() == [status] * 7
    error = oracle.relative_error(solved.left[""], reference(MLP, HESSIAN).factors(λ))
    assert error > 0.01, "else there would be nothing to tell"


def test_matrices_that_are_positive_are_not_probed() -> None:
    assert len(NystroemSketch(0.1, 6, second_order=GAUSS_NEWTON).passes()) == 1
    assert len(NystroemSketch(0.1, 6).passes()) > 1


@pytest.mark.parametrize("λ", [0.0, None])
def test_no_regularization_is_refused_with_the_cure(λ: float | None) -> None:
    with pytest.raises(ValueError, match=r"regularization: expected numbers above 0, got 0.0: outside of"):
        NystroemSketch(λ, 6)


def test_a_relative_regularization_without_a_positive_trace_is_refused() -> None:
    method = NystroemSketch(Relative(0.1), 3, second_order=GAUSS_NEWTON)
    state = {name: dict(units) for name, units in fit_case(LINEAR, method).items()}
    state["trace"][""] = {"trace": torch.tensor(-1.0)}
    with pytest.raises(SingularCurvatureError, match="expected λ > 0, got 0"):
        fitted_case(LINEAR, method, state)


@pytest.mark.parametrize("rank", [0, 1.5, True, 10**9])
def test_a_rank_of_nothing_or_without_end_is_refused(rank: Any) -> None:
    expected = "at most 100000" if rank == 10**9 else "a whole number of at least 1"
    with pytest.raises(ValueError, match=f"rank: expected {expected}, got {rank!r}"):
        NystroemSketch(0.1, rank)


def test_float32_keeps_the_directions_of_a_wide_model() -> None:
    """What counts as rounding does not grow with the number of parameters."""
    torch.manual_seed(0)
    network = nn.Linear(100_000, 2).double()
    x = torch.randn(16, 100_000, dtype=torch.float64) / 100_000**0.5
    x = x * torch.logspace(0, -1, 16, dtype=torch.float64)[:, None]
    y = torch.arange(16) % 2
    found = []
    for dtype in (torch.float64, torch.float32):
        model = NystroemSketchInfluence(
            copy.deepcopy(network).to(dtype),
            F.cross_entropy,
            0.01,
            rank=8,
            second_order_mode=SecondOrderMode.GENERALIZED_GAUSS_NEWTON,
        )
        found.append(model.fit([(x.to(dtype), y)]).influences(x[:4].to(dtype), y[:4], x.to(dtype), y))
    oracle.assert_close(found[1].double(), found[0], 1e-3)


def test_its_directions_are_drawn_once_for_all_batches_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more to end it: they are as many numbers as the sketch, made orthonormal on the CPU."""
    drawn = []

    def counted(*arguments: Any) -> Tensor:
        drawn.append(arguments)
        return orthonormal_rows(*arguments)

    monkeypatch.setattr(preconditioners, "orthonormal_rows", counted)
    method = NystroemSketch(0.1, 4, blocks=BlockMode.LAYER_WISE, second_order=GAUSS_NEWTON)
    fit(method, xy_objective(MLP.model(), MLP.loss), TrainingSet(MLP.train(), 5))
    assert len(drawn) == 2 * 3


@pytest.mark.parametrize("mode", SecondOrderMode)
def test_a_training_example_that_is_not_finite_is_said_to_spoil_a_sketch_and_a_preconditioner(
    mode: SecondOrderMode,
) -> None:
    x, y = MLP.train()
    x = x.clone()
    x[4] = torch.nan
    objective = xy_objective(MLP.model(), MLP.loss)
    preconditioned = Cg(0.1, second_order=mode, preconditioner=preconditioners.NystroemPreconditioner(5))
    for method in (NystroemSketch(0.1, 5, second_order=mode), preconditioned):
        with pytest.raises(NotFiniteError, match=r"block ''.*a training example"):
            fit(method, objective, TrainingSet((x, y), 5))
