"""LiSSA: the numbers, how each right-hand side ends, what must not matter, and what is only noise."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import islice, pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from influence_calculator import DirectInfluence, LissaInfluence
from influence_calculator.maths import mini_batches, training_batches
from influence_calculator.maths.blocks import BlockMode, Relative
from influence_calculator.maths.conjugate_gradients import Stopping
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.extreme_eigenvalues import extreme_eigenvalues
from influence_calculator.maths.lissa import Lissa
from influence_calculator.maths.method import Fitted, Solved, SolverReport, SolverStatus, fit
from influence_calculator.maths.mini_batches import MiniBatches, in_parts
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.perturbation import perturbations
from influence_calculator.maths.region import influences
from influence_calculator.maths.stochastic_recursion import recursion
from influence_calculator.maths.training_batches import TrainingBatches
from model_cases import ATTENTION, CASES, LINEAR, LOGISTIC, MLP, TRANSFORMER, ModelCase
from references import REGULARIZATIONS, reference
from training_sets import TrainingSet

MODES = list(SecondOrderMode)
HESSIAN, FISHER, GAUSS_NEWTON = MODES

LIGHT = replace(TRANSFORMER, name="transformer of a light penalty", penalty=3e-4)
BRIEF = replace(TRANSFORMER, name="transformer trained briefly", steps=5)
"""TRANSFORMER's own Hessian and Gauss-Newton matrix have eigenvalues of hundreds, and LiSSA takes as many
steps; these have 27 and less than 1."""
EXACT_STEPS = [
    *product(CASES, MODES, REGULARIZATIONS),
    *product((TRANSFORMER, ATTENTION), [FISHER], REGULARIZATIONS),
    *product([BRIEF], [GAUSS_NEWTON], REGULARIZATIONS),
    (LIGHT, HESSIAN, 1.0),
]
STEPS_OVER_PARTS = [
    *product((LINEAR, LOGISTIC), [FISHER], (1e-1, 0.5, 1.0)),
    (LOGISTIC, FISHER, 1e-2),
    *product([MLP], [GAUSS_NEWTON], (1e-2, 1e-1, 1.0)),
]


def _fitted(case: ModelCase, method: Lissa, size: int = 5) -> Fitted:
    objective = xy_objective(case.model(), case.loss)
    data = TrainingSet(case.train(), size)
    return method.fitted(objective, fit(method, objective, data), data)


def _gradients(fitted: Fitted, case: ModelCase) -> dict[str, Tensor]:
    return fitted.gradients(xy_objective(case.model(), case.loss), case.test())


def _solved(case: ModelCase, method: Lissa, size: int = 5) -> Solved:
    fitted = _fitted(case, method, size)
    return fitted.solve(_gradients(fitted, case))


def _scale(case: ModelCase, mode: str, λ: float) -> float:
    """Somewhat more than half of the largest eigenvalue: about as fast as it gets."""
    return 0.55 * (float(torch.linalg.eigvalsh(reference(case, mode).curvature)[-1]) + λ)


def _exact(case: ModelCase, λ: float, mode: SecondOrderMode, **changes: Any) -> Lissa:
    options = {"regularization": λ, "scale": _scale(case, mode, λ), "rtol": 1e-10, "maxiter": 10_000}
    return Lissa(**{**options, "second_order": mode, **changes})


@pytest.mark.parametrize(("case", "mode", "λ"), EXACT_STEPS, ids=str)
def test_steps_over_all_examples_give_the_factors_and_influences_of_the_explicit_matrix(
    case: ModelCase, mode: SecondOrderMode, λ: float
) -> None:
    expected = reference(case, mode)
    fitted = _fitted(case, _exact(case, λ, mode))
    solved = fitted.solve(_gradients(fitted, case))
    assert (solved.report.status == SolverStatus.CONVERGED).all()
    assert (solved.report.residual <= 1e-10).all()
    assert solved.report.notes == ()
    oracle.assert_close(solved.left[""], expected.factors(λ), expected.bound(λ))
    scores = influences(fitted, solved.left, case.train(), micro_batch=6)
    oracle.assert_close(scores, expected.influences(λ), expected.bound(λ))


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_perturbation_is_the_inputs_gradient_of_the_influence(case: ModelCase) -> None:
    mode = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
    fitted = _fitted(case, _exact(case, 0.1, mode))
    objective = xy_objective(case.model(), case.loss)
    left = fitted.solve(_gradients(fitted, case)).left
    x, y = (part[:5] for part in case.train())
    factors, bound = reference(case, mode).factors(0.1), reference(case, mode).bound(0.1)
    expected = oracle.perturbations(objective.model, case.loss, factors, x, y)
    oracle.assert_close(perturbations(fitted, objective, left, (x, y), 3), expected, bound)


@pytest.mark.parametrize(("case", "mode", "λ"), STEPS_OVER_PARTS, ids=str)
@pytest.mark.parametrize("size", [5, 22])
def test_steps_over_parts_are_right_on_average(
    case: ModelCase, mode: SecondOrderMode, λ: float, size: int
) -> None:
    """Within the standard error over seeds. Mistake 1: 22 of 23 examples leave a part of one."""
    # A step takes a tenth of a millisecond with the Fisher matrix and several with the other.
    seeds, steadied = (32 if λ > 1e-2 else 16, 10) if mode is FISHER else (8, 5)
    scale = steadied * _scale(case, mode, λ)
    # What is left of the start is e^-8 of it, little beside the noise.
    method = Lissa(λ, maxiter=int(8 * scale / λ), scale=scale, rtol=0.0, batch_size=size, second_order=mode)
    objective = xy_objective(case.model(), case.loss)
    data = TrainingSet(case.train(), 23)
    rows = []
    for seed in range(seeds):
        fitted = replace(method, seed=seed).fitted(objective, {}, data)
        rows.append(fitted.solve({"": reference(case, mode).test[:2]}).left[""].flatten())
    answers = torch.stack(rows)
    error = (answers.mean(0) - reference(case, mode).factors(λ)[:2].flatten()).norm()
    standard_error = (answers.var(0) / seeds).sum().sqrt()
    assert 0 < standard_error < 0.05 * answers.mean(0).norm()
    assert error < 2 * standard_error


class TestRecursion:
    """The recursion alone, on matrices that are written down."""

    def test_the_residual_is_the_true_one_and_each_row_ends_on_its_own_norm(self):
        """Mistake 2."""
        matrix = torch.diag(torch.linspace(0.1, 1, 40, dtype=torch.float64))
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(5, 40, dtype=torch.float64, generator=generator)
        rows *= torch.tensor([1e-12, 1e-6, 1.0, 1e6, 1e12], dtype=torch.float64)[:, None]
        solution, report = recursion(lambda v: v @ matrix, rows, Stopping(1e-8, 0.0, 400), 0.6)
        remainder = (rows - solution @ matrix).norm(dim=1) / rows.norm(dim=1)
        assert (report.status == SolverStatus.CONVERGED).all()
        assert (remainder <= 1e-8).all()
        assert torch.allclose(report.residual, remainder, rtol=1e-3)

    def test_answers_are_linear_in_the_gradient(self):
        matrix = torch.diag(torch.linspace(0.1, 1, 20))
        row = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
        large, _ = recursion(lambda v: v @ matrix, row, Stopping(1e-5, 0.0, 300), 0.6)
        tiny, report = recursion(lambda v: v @ matrix, row * 2.0**-90, Stopping(1e-5, 0.0, 300), 0.6)
        assert report.status.tolist() == [SolverStatus.CONVERGED]
        assert torch.equal(tiny * 2.0**90, large)

    def test_an_absolute_tolerance_answers_zero_for_small_gradients(self):
        rows = torch.ones(2, 20, dtype=torch.float64) * torch.tensor([[1e-8], [1.0]], dtype=torch.float64)
        solution, report = recursion(lambda v: v, rows, Stopping(1e-4, 1e-6, 100), 0.6)
        assert solution[0].eq(0).all()
        assert report.iterations[0] == 0
        assert report.iterations[1] > 0

    def test_a_zero_row_is_converged_with_zero(self):
        solution, report = recursion(lambda v: v, torch.zeros(1, 3), Stopping(1e-4, 0.0, 10), 1.0)
        assert solution.eq(0).all()
        assert (int(report.status[0]), int(report.iterations[0]), float(report.residual[0])) == (0, 0, 0)

    def test_a_row_that_runs_out_of_steps_keeps_its_last_iterate_and_says_so(self):
        matrix = torch.diag(torch.tensor([0.01, 1.0], dtype=torch.float64))
        rows = torch.ones(1, 2, dtype=torch.float64)
        solution, report = recursion(lambda v: v @ matrix, rows, Stopping(1e-10, 0.0, 3), 1.0)
        assert report.status.tolist() == [SolverStatus.MAX_ITERATIONS]
        assert report.iterations.tolist() == [3]
        assert torch.allclose(solution, torch.tensor([[3 * 0.99, 1.0]], dtype=torch.float64), rtol=1e-2)
        assert float(report.residual[0]) == pytest.approx(0.99**3 / 2**0.5)

    @pytest.mark.parametrize("smallest", [-1.0, -1e-2, -1e-6])
    def test_what_grows_ends_without_an_answer_and_the_others_with_theirs(self, smallest: float):
        """Long before it overflows, however slowly it grows."""
        diagonal = torch.tensor([4.0, 3.0, smallest], dtype=torch.float64)
        rows = torch.tensor([[1.0, 1.0, 0.01], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
        maxiter = int(20 / abs(smallest)) + 100 if smallest < -1e-3 else 2000
        solution, report = recursion(lambda v: v * diagonal, rows, Stopping(1e-10, 0.0, maxiter), 5.0)
        lost = SolverStatus.NOT_FINITE if smallest < -1e-3 else SolverStatus.MAX_ITERATIONS
        assert report.status.tolist() == [lost, lost, SolverStatus.CONVERGED]
        assert solution[:2].isnan().all() == (lost is SolverStatus.NOT_FINITE)
        oracle.assert_close(solution[2], rows[2] / diagonal, 1e-9)

    def test_a_scale_that_is_too_small_ends_after_a_few_steps(self):
        matrix = torch.diag(torch.linspace(1, 100, 10))
        solution, report = recursion(lambda v: v @ matrix, torch.ones(1, 10), Stopping(1e-4, 0.0, 1000), 10.0)
        assert report.status.tolist() == [SolverStatus.NOT_FINITE]
        assert report.iterations[0] < 10
        assert solution.isnan().all()

    def test_a_tolerance_below_rounding_is_no_growth(self):
        """Residuals of a few ulps, of which some are twice what others were."""
        generator = torch.Generator().manual_seed(1)
        basis = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
        matrix = basis * torch.tensor([0.9, 1.0, 1.1]) @ basis.T
        rows = torch.randn(200, 3, generator=generator)
        solution, report = recursion(lambda v: v @ matrix, rows, Stopping(0.0, 0.0, 500), 1.0)
        assert not (report.status == SolverStatus.NOT_FINITE).any()
        assert (report.status == SolverStatus.MAX_ITERATIONS).any()
        assert (report.residual < 100 * torch.finfo(torch.float32).eps).all()
        assert torch.allclose(solution, torch.linalg.solve(matrix, rows.T).T, rtol=1e-3, atol=1e-3)

    def test_infinity_ends_as_not_finite(self):
        solution, report = recursion(lambda v: v * torch.inf, torch.ones(1, 2), Stopping(1e-4, 0.0, 9), 1.0)
        assert report.status.tolist() == [SolverStatus.NOT_FINITE]
        assert solution.isnan().all()


class TestParts:
    """The random parts of the training set."""

    def test_every_step_draws_anew_from_a_set_that_is_read_once(self):
        """Mistake 7: a loader restarted at every step, in order, gives its first batch again and again."""
        objective = xy_objective(MLP.model(), MLP.loss)
        data = TrainingSet(MLP.train(), 4)
        parts = MiniBatches(TrainingBatches(objective, data), 5, seed=3)
        starts = [part[0].start for part in islice(parts.endless(), 1000)]
        assert parts.count == 5
        for start in (0, 5, 10, 15, 20):
            assert 150 < starts.count(start) < 250
        assert len({*pairwise(starts)}) == 25, "a part follows every other, itself too"
        assert starts == [part[0].start for part in islice(parts.endless(), 1000)]
        assert data.passes == 1

    def test_a_set_that_is_not_kept_leaves_a_buffer_in_another_order(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(training_batches, "KEPT_BYTES", 0)
        monkeypatch.setattr(mini_batches, "BUFFER_BYTES", 4 * 2 * 40)
        objective = xy_objective(MLP.model(), MLP.loss)
        data = TrainingSet(MLP.train(), 4)
        parts = MiniBatches(TrainingBatches(objective, data), 2, seed=0)
        before = data.passes
        starts = [part[0].start for part in islice(parts.endless(), 24)]
        assert sorted(starts[:12]) == list(range(0, 24, 2)) == sorted(starts[12:])
        assert starts[:12] != sorted(starts[:12]) != starts[12:] != starts[:12]
        assert data.passes - before <= 4, "two passes, not one per step"

    @pytest.mark.parametrize("size", [1, 5, 7, 23, 40])
    def test_parts_hold_all_examples_in_order_whatever_batches_they_come_in(self, size: int):
        x, y = MLP.train()
        for batch in (1, 4, 23):
            parts = list(in_parts(TrainingSet((x, y), batch).batches(), size))
            lengths = [sum(len(piece.batch[0]) for piece in part) for part in parts]
            assert lengths == [size] * (23 // size) + [23 % size] * (23 % size > 0)
            assert torch.equal(torch.cat([piece.batch[0] for part in parts for piece in part]), x)
            assert parts[-1][0].start == sum(lengths[:-1])


@pytest.mark.parametrize("batch_size", [None, 5])
def test_neither_the_loaders_batches_nor_memory_matter(
    batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Lissa(0.1, maxiter=30, scale=5.0, rtol=0.0, batch_size=batch_size)
    expected = _solved(MLP, method).left[""]
    for size in (1, 22):
        oracle.assert_close(_solved(MLP, method, size).left[""], expected, 1e-10)
    monkeypatch.setattr("influence_calculator.maths.training_products.KEPT_BYTES", 2000)
    oracle.assert_close(_solved(MLP, method, 4).left[""], expected, 1e-10)
    if batch_size is None:
        monkeypatch.setattr(training_batches, "KEPT_BYTES", 0)
        oracle.assert_close(_solved(MLP, method, 4).left[""], expected, 1e-10)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_row_does_not_depend_on_the_rows_beside_it(batch_size: int | None) -> None:
    fitted = _fitted(MLP, Lissa(0.1, maxiter=160, scale=5.0, rtol=0.1, batch_size=batch_size))
    rows = _gradients(fitted, MLP)[""]
    together = fitted.solve({"": rows})
    ends = {*zip(together.report.status.tolist(), together.report.iterations.tolist(), strict=True)}
    assert len(ends) > 1, "all rows end alike"
    for piece in (1, 3):
        alone = [fitted.solve({"": part}) for part in rows.split(piece)]
        oracle.assert_close(torch.cat([one.left[""] for one in alone]), together.left[""], 1e-10)
        for name in ("status", "iterations"):
            ended = torch.cat([getattr(one.report, name) for one in alone])
            assert torch.equal(ended, getattr(together.report, name))


def test_the_order_of_the_examples_does_not_matter_to_steps_over_all() -> None:
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    x, y = MLP.train()
    method = Lissa(0.1, maxiter=100, scale=1.0, rtol=0.0)
    fitted = method.fitted(xy_objective(MLP.model(), MLP.loss), {}, TrainingSet((x[order], y[order]), 5))
    left = fitted.solve(_gradients(fitted, MLP)).left[""]
    oracle.assert_close(left, _solved(MLP, method).left[""], 1e-10)


def test_a_seed_decides_the_answer() -> None:
    first, again, other = (
        _solved(MLP, Lissa(0.1, maxiter=50, scale=5.0, batch_size=5, seed=seed)).left[""]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-4)


def test_steps_over_parts_can_converge_and_say_so() -> None:
    report = _solved(MLP, Lissa(1.0, maxiter=4000, scale=40.0, rtol=0.05, batch_size=5)).report
    assert (report.status == SolverStatus.CONVERGED).all()
    assert (report.residual <= 0.05).all()
    assert set(report.iterations.tolist()) <= {5 * 2**k for k in range(10)}, "after 1, 2, 4, ... epochs"


def test_a_part_of_all_examples_takes_exact_steps() -> None:
    """Of more than all examples too."""
    methods = (Lissa(0.1, scale=1.0, rtol=1e-8, batch_size=size) for size in (None, 23, 1000))
    first, *others = (_solved(MLP, method) for method in methods)
    for other in others:
        assert torch.equal(other.left[""], first.left[""])


def test_dampening_adds_its_product_with_the_scale_to_the_regularization() -> None:
    expected = reference(MLP, "hessian").factors(0.1 + 0.05 * 2.0)
    solved = _solved(MLP, Lissa(0.1, dampen=0.05, scale=2.0, rtol=1e-10))
    oracle.assert_close(solved.left[""], expected, 1e-8)


@pytest.mark.parametrize(
    "blocks",
    [
        BlockMode.LAYER_WISE,
        BlockMode.PARAMETER_WISE,
        {"some": ["2.weight", "4.bias"], "one": ["0.bias"]},
    ],
    ids=["layer-wise", "parameter-wise", "custom"],
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("relative", [False, True])
def test_blocks_are_solved_as_the_direct_method_solves_them(
    mode: SecondOrderMode, blocks: Any, relative: bool
) -> None:
    objective = xy_objective(MLP.model(), MLP.loss)
    names = Direct(1.0, blocks).layout(objective).blocks
    λ: Any = Relative(2.0) if relative else {name: 0.05 * (i + 2) for i, name in enumerate(names)}
    data = TrainingSet(MLP.train(), 5)
    dense = Direct(λ, blocks, mode)
    expected = dense.fitted(objective, fit(dense, objective, data), None)
    scale = 1.0
    if mode is SecondOrderMode.EMPIRICAL_FISHER:  # a small one, and so is λ in proportion to it
        scale = 0.05 if relative else 0.3
    solved = _solved(MLP, _exact(MLP, 0.3, mode, regularization=λ, blocks=blocks, scale=scale))
    assert (solved.report.status == SolverStatus.CONVERGED).all()
    for block, factors in expected.solve(_gradients(expected, MLP)).left.items():
        oracle.assert_close(solved.left[block], factors, 1e-7)


class TestNotes:
    """What the solver found to be in its way, with a cure that works."""

    def test_an_indefinite_hessian_is_told_with_the_regularization_that_does(self):
        λ = 1e-4
        assert oracle.smallest_eigenvalue(reference(MLP, "hessian").curvature) < -10 * λ
        (sentence,) = _solved(MLP, Lissa(λ, scale=1.0, maxiter=3)).report.notes
        assert "LiSSA needs a positive curvature" in sentence
        enough = float(sentence.split("a regularization of ")[1].split(" ")[0])
        assert enough < 0.01
        assert oracle.smallest_eigenvalue(reference(MLP, "hessian").curvature) + enough > 0
        assert _solved(MLP, Lissa(enough, scale=1.0, maxiter=3)).report.notes == ()

    def test_each_block_of_a_hessian_is_looked_at_and_named(self):
        blocks = {"first": ["0.weight", "0.bias"], "rest": ["2.weight", "4.weight", "4.bias"]}
        notes = _solved(MLP, Lissa(0.0, scale=2.0, maxiter=3, blocks=blocks)).report.notes
        assert [sentence.split(":")[0] for sentence in notes] == ["block 'first'", "block 'rest'"]

    def test_a_positive_hessian_is_left_alone(self):
        assert _solved(LINEAR, Lissa(0.0, maxiter=3)).report.notes == ()

    @pytest.mark.parametrize("mode", MODES)
    def test_a_scale_that_is_too_small_is_told_with_the_one_that_does(self, mode: SecondOrderMode):
        lost = _solved(LINEAR, Lissa(0.1, scale=0.3, second_order=mode))
        assert (lost.report.status == SolverStatus.NOT_FINITE).all()
        assert lost.left[""].isnan().all()
        (sentence,) = lost.report.notes
        enough = float(sentence.split("a scale of ")[1].split(" ")[0])
        better = _solved(LINEAR, Lissa(0.1, scale=enough, second_order=mode)).report
        assert (better.status == SolverStatus.CONVERGED).all()

    def test_the_ends_of_a_spectrum_are_found_from_products(self):
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64)).Q
        values = torch.cat([torch.tensor([-0.3, 40.0]), torch.linspace(0, 3, 298)]).double()
        matrix = (basis * values) @ basis.T
        found = extreme_eigenvalues(lambda v: v @ matrix, matrix[0])
        assert found is not None
        assert found.smallest == pytest.approx(-0.3, abs=1e-3)
        assert found.largest == pytest.approx(40, abs=1e-3)

    def test_a_spectrum_of_one_value_ends_early(self):
        products: list[int] = []
        like = torch.zeros(50, dtype=torch.float64)
        found = extreme_eigenvalues(lambda v: (products.append(1), 3 * v)[1], like)
        assert found is not None
        assert len(products) <= 2
        assert (found.smallest, found.largest) == (pytest.approx(3), pytest.approx(3))


def test_a_gradient_that_is_not_finite_concerns_its_row_only() -> None:
    fitted = _fitted(MLP, Lissa(0.1, scale=1.0))
    gradients = _gradients(fitted, MLP)
    expected = fitted.solve(gradients).left[""]
    broken = gradients[""].clone()
    broken[1, 5] = torch.inf
    solved = fitted.solve({"": broken})
    others = [0, 2, 3, 4, 5, 6]
    oracle.assert_close(solved.left[""][others], expected[others], 1e-10)
    assert solved.left[""][1].isnan().all()
    assert solved.report.status.tolist() == [0, SolverStatus.NOT_FINITE, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("batch_size", [None, 5])
def test_training_data_that_is_not_finite_shows_in_every_row(batch_size: int | None) -> None:
    x, y = LOGISTIC.train()
    x[3] = torch.nan
    objective = xy_objective(LOGISTIC.model(), LOGISTIC.loss)
    fitted = Lissa(0.1, batch_size=batch_size).fitted(objective, {}, TrainingSet((x, y), 5))
    solved = fitted.solve(_gradients(fitted, LOGISTIC))
    assert (solved.report.status == SolverStatus.NOT_FINITE).all()
    assert solved.left[""].isnan().all()


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        (Lissa(0.1), None, "data: LiSSA goes over the training set again"),
        (Lissa(Relative(0.1)), TrainingSet(MLP.train(), 5), "'trace'"),
    ],
)
def test_what_solving_needs_is_asked_for(method: Lissa, data: TrainingSet | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method.fitted(xy_objective(MLP.model(), MLP.loss), {}, data)


@pytest.mark.parametrize(
    "options",
    [
        {"rtol": -1.0},
        {"atol": float("nan")},
        {"dampen": -0.1},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"maxiter": 0},
        {"batch_size": 0},
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Lissa(0.1, **options)


def test_a_method_travels_by_pickle() -> None:
    method = Lissa(Relative(0.1), batch_size=3, blocks={"a": ["0.bias"]})
    assert pickle.loads(pickle.dumps(method)) == method


class TestHalfPrecision:
    """Products in bfloat16 round at 1/256: a residual stops falling there, which is no growth."""

    @staticmethod
    def solved(case: ModelCase, mode: str, scale: float) -> tuple[Tensor, SolverReport]:
        (x, y), test = _halved(case.train()), _halved(case.test())
        model = LissaInfluence(
            case.model().bfloat16(),
            case.loss,
            0.1,
            scale=scale,
            second_order_mode=SecondOrderMode(mode),
            warn_on_max_iteration=False,
        )
        found = model.fit([(x, y)]).influences(*test, x, y)
        assert model.solver_report is not None
        return found, model.solver_report

    @pytest.mark.parametrize("mode", ["hessian", "empirical_fisher", "generalized_gauss_newton"])
    @pytest.mark.parametrize("case", [MLP, LOGISTIC], ids=repr)
    def test_a_solve_that_stays_at_its_rounding_answers_and_says_so(self, case: ModelCase, mode: str) -> None:
        found, report = self.solved(case, mode, 20.0)
        assert (report.status == SolverStatus.MAX_ITERATIONS).all()
        assert (report.residual < 0.05).all()
        wide = DirectInfluence(
            case.model().bfloat16().double(), case.loss, 0.1, second_order_mode=SecondOrderMode(mode)
        )
        (x, y), (x_test, y_test) = _halved(case.train()), _halved(case.test())
        expected = wide.fit([(x.double(), y)]).influences(x_test.double(), y_test, x.double(), y)
        oracle.assert_close(found.double(), expected, 0.1)

    def test_growth_is_still_told(self) -> None:
        found, report = self.solved(MLP, "generalized_gauss_newton", 0.2)
        assert (report.status == SolverStatus.NOT_FINITE).all()
        assert found.isnan().all()
        assert any("a scale of" in note for note in report.notes)


def _halved(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return data[0].bfloat16(), data[1]


class TestCuresCountWhatIsAdded:
    """Cures count λ and what dampening adds."""

    def test_what_the_regularization_adds_counts_for_the_scale(self) -> None:
        """LINEAR's curvature alone would be no obstacle: λ is."""
        lost = _solved(LINEAR, Lissa(40.0, scale=10.0, second_order=FISHER))
        assert (lost.report.status == SolverStatus.NOT_FINITE).all()
        (sentence,) = lost.report.notes
        enough = float(sentence.split("a scale of ")[1].split(" ")[0])
        assert enough > 40
        better = _solved(LINEAR, Lissa(40.0, scale=enough, second_order=FISHER)).report
        assert (better.status == SolverStatus.CONVERGED).all()

    def test_what_dampening_adds_counts_for_the_regularization_that_does(self) -> None:
        def enough(**settings: float) -> float:
            (sentence,) = _solved(MLP, Lissa(0.0, scale=1.0, maxiter=3, **settings)).report.notes
            return float(sentence.split("a regularization of ")[1].split(" ")[0])

        dampened = enough(dampen=1e-4)
        assert dampened == pytest.approx(enough() - 1e-4, rel=1e-2)
        assert _solved(MLP, Lissa(dampened, dampen=1e-4, scale=1.0, maxiter=3)).report.notes == ()


def test_parts_that_wait_do_not_keep_the_batches_that_they_were_cut_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a buffer of 48 MiB would hold the whole training set."""
    monkeypatch.setattr(training_batches, "KEPT_BYTES", 0)
    objective = xy_objective(MLP.model(), MLP.loss)
    parts = MiniBatches(TrainingBatches(objective, TrainingSet(MLP.train(), 23)), 2, seed=0)
    for part in islice(parts.endless(), 12):
        for piece in part:
            assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in piece.batch)
