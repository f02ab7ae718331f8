"""Operators: against explicit matrices and solves; what must not matter; a changed λ, device or model."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from influence_calculator.errors import OneShotIterableError, SolverWarning
from influence_calculator.maths.errors import SingularCurvatureError, TrainingModeError
from influence_calculator.maths.method import SolverStatus
from influence_calculator.torch.base import TensorOperator
from influence_calculator.torch.batch_operation import (
    BatchOperation,
    ChunkAveraging,
    GaussNewtonBatchOperation,
    HessianBatchOperation,
    InverseHarmonicMeanBatchOperation,
    PointAveraging,
)
from influence_calculator.torch.functional import LowRankProductRepresentation
from influence_calculator.torch.gradient_provider import TorchBatch
from influence_calculator.torch.operator import (
    CgOperator,
    DirectSolveOperator,
    GaussNewtonOperator,
    HessianOperator,
    InverseHarmonicMeanOperator,
    InverseOperator,
    LissaOperator,
    LowRankOperator,
    MatrixOperator,
)
from influence_calculator.torch.preconditioner import JacobiPreconditioner, NystroemPreconditioner
from model_cases import CONV2D, MLP, SHARED, ModelCase
from references import REGULARIZATIONS, reference

X, Y = MLP.train()
SIZES = (23, 11, 5)
"""Lengths of batches for 23 examples: one batch, two and one of a single example, five."""


def loader(case: ModelCase = MLP, size: int = 11) -> list[tuple[Tensor, Tensor]]:
    x, y = case.train()
    return list(zip(x.split(size), y.split(size), strict=True))


def rows(case: ModelCase = MLP) -> Tensor:
    """Test gradients: what operators are applied to."""
    return reference(case, "empirical_fisher").test


MATRICES: dict[str, tuple[Any, Any]] = {
    "hessian": (HessianOperator, HessianBatchOperation),
    "empirical_fisher": (GaussNewtonOperator, GaussNewtonBatchOperation),
}


@pytest.fixture(params=MATRICES)
def second_order(request: pytest.FixtureRequest) -> str:
    return request.param


class TestMatricesOfTheTrainingData:
    @pytest.mark.parametrize("case", [MLP, SHARED, CONV2D], ids=repr)
    @pytest.mark.parametrize("size", SIZES)
    def test_every_example_counts_the_same_whatever_the_batches(
        self, second_order: str, case: ModelCase, size: int
    ) -> None:
        operator = MATRICES[second_order][0](case.model(), case.loss, loader(case, size))
        expected = reference(case, second_order).curvature
        oracle.assert_close(operator.apply(torch.eye(len(expected), dtype=torch.float64)), expected, 1e-10)

    @pytest.mark.parametrize("λ", REGULARIZATIONS)
    @pytest.mark.parametrize("size", SIZES)
    def test_the_mean_of_inverses_is_that_of_the_explicit_ones(self, λ: float, size: int) -> None:
        operator = InverseHarmonicMeanOperator(MLP.model(), MLP.loss, loader(size=size), λ)
        explicit = oracle.mean_inverse(reference(MLP, "empirical_fisher").train, λ)
        oracle.assert_close(operator.apply(rows()), rows() @ explicit, 1e-10)

    @pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator, InverseHarmonicMeanOperator])
    def test_how_many_rows_there_are_does_not_matter(self, kind: Any) -> None:
        operator = kind(MLP.model(), MLP.loss, loader(), *([0.1] if "Inverse" in kind.__name__ else []))
        together = operator.apply(rows()[:3])
        for row, expected in zip(rows()[:3], together, strict=True):
            oracle.assert_close(operator.apply(row), expected, 1e-12)
            oracle.assert_close(operator.apply(row[None])[0], expected, 1e-12)
        assert operator.apply(rows()[:0]).shape == (0, operator.input_size)

    def test_vectors_by_parameter_are_the_flat_ones_cut(self, second_order: str) -> None:
        operator = MATRICES[second_order][0](MLP.model(), MLP.loss, loader())
        structure = operator.input_dict_structure
        assert structure == {name: tuple(p.shape) for name, p in MLP.model().named_parameters()}
        sizes = [torch.Size(shape).numel() for shape in structure.values()]
        cut = {
            name: part.reshape(len(rows()), *shape)
            for (name, shape), part in zip(structure.items(), rows().split(sizes, 1), strict=True)
        }
        applied = operator.apply_to_dict(cut)
        assert {name: tuple(v.shape[1:]) for name, v in applied.items()} == structure
        flat = torch.cat([value.flatten(1) for value in applied.values()], 1)
        oracle.assert_close(flat, operator.apply(rows()), 1e-12)
        one = operator.apply_to_dict({name: value[2] for name, value in cut.items()})
        for name, value in one.items():
            oracle.assert_close(value, applied[name][2], 1e-12)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda cut: {**cut, "0.weight": cut["0.weight"][:, :2]},
            lambda cut: {**cut, "0.weight": cut["0.weight"][:1]},
            lambda cut: {**cut, "0.weight": cut["0.weight"][0]},
            lambda cut: {name: value for name, value in cut.items() if name != "0.weight"},
            lambda cut: {**cut, "9.weight": cut["0.weight"]},
        ],
    )
    def test_vectors_by_parameter_of_other_shapes_are_refused(self, spoil: Callable[..., Any]) -> None:
        operator = HessianOperator(MLP.model(), MLP.loss, loader())
        cut = {name: torch.ones(2, *shape) for name, shape in operator.input_dict_structure.items()}
        with pytest.raises(ValueError, match=r"expected the shapes .*0\.weight"):
            operator.apply_to_dict(spoil(cut))

    def test_restricted_to_some_parameters_it_is_their_part_of_the_matrix_in_their_order(
        self, second_order: str
    ) -> None:
        model = MLP.model()
        columns = oracle.columns(model)
        chosen = {name: dict(model.named_parameters())[name] for name in ("4.bias", "0.weight")}
        operator = MATRICES[second_order][0](model, MLP.loss, loader(), restrict_to=chosen)
        own = torch.cat([torch.arange(60)[columns[name]] for name in chosen])
        expected = reference(MLP, second_order).curvature[own[:, None], own]
        oracle.assert_close(operator.apply(torch.eye(len(own), dtype=torch.float64)), expected, 1e-10)
        assert list(operator.input_dict_structure) == list(chosen)

    def test_it_follows_a_model_that_changes(self) -> None:
        model = MLP.model()
        operators = [HessianOperator(model, MLP.loss, loader())]
        operators += [GaussNewtonOperator(model, MLP.loss, loader())]
        before = [operator.apply(rows()) for operator in operators]
        with torch.no_grad():
            model[4].weight.mul_(1.5)
        for operator, old in zip(operators, before, strict=True):
            fresh = type(operator)(model, MLP.loss, loader()).apply(rows())
            assert oracle.relative_error(old, fresh) > 1e-2
            oracle.assert_close(operator.apply(rows()), fresh, 1e-12)

    def test_what_cannot_be_right_is_refused_when_it_is_built(self) -> None:
        with pytest.raises(OneShotIterableError):
            HessianOperator(MLP.model(), MLP.loss, iter(loader()))
        with pytest.raises(ValueError, match=r"restrict_to.*\['9\.weight'\]"):
            HessianOperator(MLP.model(), MLP.loss, loader(), restrict_to={"9.weight": torch.ones(1)})
        dropping = nn.Sequential(MLP.model(), nn.Dropout()).train()
        with pytest.raises(TrainingModeError):
            HessianOperator(dropping, MLP.loss, loader())
        with pytest.raises(ValueError, match="training data is empty"):
            HessianOperator(MLP.model(), MLP.loss, [])
        with pytest.raises(ValueError, match="regularization: expected numbers above 0"):
            InverseHarmonicMeanOperator(MLP.model(), MLP.loss, loader(), 0.0)


class TestBatchOperations:
    def test_a_batch_operation_is_the_mean_over_its_batch(self, second_order: str) -> None:
        operation = MATRICES[second_order][1](MLP.model(), MLP.loss)
        x, y = X[:3], Y[:3]
        expected = rows() @ oracle.CURVATURES[second_order](MLP.model(), MLP.loss, x, y)
        oracle.assert_close(operation.apply(TorchBatch(x, y), rows()), expected, 1e-10)
        oracle.assert_close(operation.apply(TorchBatch(x, y), rows()[1]), expected[1], 1e-10)

    @pytest.mark.parametrize("λ", REGULARIZATIONS)
    def test_so_is_the_mean_of_inverses_also_after_another_regularization(self, λ: float) -> None:
        operation = InverseHarmonicMeanBatchOperation(MLP.model(), MLP.loss, 0.5)
        operation.regularization = λ
        explicit = oracle.mean_inverse(reference(MLP, "empirical_fisher").train[:3], λ)
        batch = TorchBatch(X[:3], Y[:3])
        oracle.assert_close(operation.apply(batch, rows()), rows() @ explicit, 1e-10)
        structure = operation.input_dict_structure
        ones = {name: torch.ones(shape, dtype=torch.float64) for name, shape in structure.items()}
        by_name = operation.apply_to_dict(batch, ones)
        flat = torch.cat([value.flatten() for value in by_name.values()])
        oracle.assert_close(flat, operation.apply(batch, torch.ones(60, dtype=torch.float64)), 1e-12)

    def test_averages_weigh_by_examples_or_not_as_their_names_say(self, second_order: str) -> None:
        operation = MATRICES[second_order][1](MLP.model(), MLP.loss)
        whole = rows() @ reference(MLP, second_order).curvature
        applied = [operation.apply(TorchBatch(x, y), rows()) for x, y in loader(size=11)]
        oracle.assert_close(PointAveraging()(iter(applied), [11, 11, 1]), whole, 1e-10)
        assert oracle.relative_error(ChunkAveraging()(iter(applied)), whole) > 1e-2
        by_name = PointAveraging().as_dict_averaging()(({"a": value} for value in applied), [11, 11, 1])
        oracle.assert_close(by_name["a"], whole, 1e-10)

    def test_an_average_of_nothing_or_with_unknown_weights_is_refused(self) -> None:
        with pytest.raises(ValueError, match="points: expected the number of examples"):
            PointAveraging()([torch.ones(2)])
        for averaging in (PointAveraging(), PointAveraging().as_dict_averaging()):
            with pytest.raises(ValueError, match="at least one"):
                averaging([], [])

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        operation = HessianBatchOperation(MLP.model(), MLP.loss)
        with pytest.raises(ValueError, match=r"rows \[q, 60\], got \[2, 59\]"):
            operation.apply(TorchBatch(X, Y), torch.ones(2, 59))
        with pytest.raises(ValueError, match="at least one example"):
            operation.apply(TorchBatch(X[:0], Y[:0]), torch.ones(60))
        with pytest.raises(ValueError, match="one label for each of the 23"):
            TorchBatch(X, Y[:3])


MATRIX = reference(MLP, "empirical_fisher").curvature


def _spectral(matrix: Tensor) -> LowRankProductRepresentation:
    return LowRankProductRepresentation(*torch.linalg.eigh(matrix))


def _fisher() -> GaussNewtonOperator:
    return GaussNewtonOperator(MLP.model(), MLP.loss, loader())


class _Known(BatchOperation):
    """A user's batch operation: the same matrix for every batch."""

    may_be_indefinite = False

    def _apply_to_mat(self, batch: TorchBatch, mat: Tensor) -> Tensor:
        return mat @ MATRIX


STEPS: dict[str, Any] = {"maxiter": 9999, "scale": 0.8, "rtol": 1e-10}
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 0.0, "maxiter": 2000}
SOLVERS: dict[str, Callable[[float], InverseOperator]] = {
    "direct": lambda λ: DirectSolveOperator(MATRIX, λ),
    "direct in place": lambda λ: DirectSolveOperator(MATRIX.clone(), λ, in_place_regularization=True),
    "low rank": lambda λ: LowRankOperator(_spectral(MATRIX), λ),
    "low rank, not exact": lambda λ: LowRankOperator(_spectral(MATRIX), λ, exact=False),
    "cg": lambda λ: CgOperator(_fisher(), λ, **EXACT),
    "block cg": lambda λ: CgOperator(_fisher(), λ, use_block_cg=True, **EXACT),
    "cg, jacobi": lambda λ: CgOperator(_fisher(), λ, preconditioner=JacobiPreconditioner(5), **EXACT),
    "cg, nystroem": lambda λ: CgOperator(
        MatrixOperator(MATRIX), λ, preconditioner=NystroemPreconditioner(10), use_block_cg=True, **EXACT
    ),
    "lissa": lambda λ: LissaOperator(_Known(MLP.model(), MLP.loss), loader(), λ, **STEPS),
}


@pytest.fixture(params=SOLVERS)
def build(request: pytest.FixtureRequest) -> Callable[[float], InverseOperator]:
    return SOLVERS[request.param]


class TestInverseOperators:
    @pytest.mark.parametrize("λ", REGULARIZATIONS)
    def test_it_solves_and_another_regularization_needs_no_other_operator(
        self, build: Callable[[float], InverseOperator], λ: float
    ) -> None:
        explicit = reference(MLP, "empirical_fisher")
        operator = build(0.3)
        first = operator.apply(rows())
        oracle.assert_close(first, explicit.factors(0.3), explicit.bound(0.3))
        operator.regularization = λ
        oracle.assert_close(operator.apply(rows()), explicit.factors(λ), explicit.bound(λ))
        assert operator.regularization == λ
        assert operator.solver_report is not None
        assert (operator.solver_report.status == SolverStatus.CONVERGED).all()
        operator.regularization = 0.3
        assert torch.equal(operator.apply(rows()), first)

    def test_moved_and_pickled_it_is_the_same(self, build: Callable[[float], InverseOperator]) -> None:
        operator = build(0.1)
        expected = operator.apply(rows())
        assert operator.to("cpu") is operator
        oracle.assert_close(operator.apply(rows()), expected, 1e-12)
        again = pickle.loads(pickle.dumps(operator))
        oracle.assert_close(again.apply(rows()), expected, 1e-12)
        assert (operator.input_size, operator.dtype, operator.device.type) == (60, torch.float64, "cpu")

    def test_one_vector_is_one_row(self, build: Callable[[float], InverseOperator]) -> None:
        operator = build(0.1)
        oracle.assert_close(operator.apply(rows()[2]), operator.apply(rows())[2], 1e-8)

    def test_a_negative_regularization_is_refused(self, build: Callable[[float], InverseOperator]) -> None:
        operator = build(0.1)
        with pytest.raises(ValueError, match="regularization: expected"):
            operator.regularization = -0.1
        assert operator.regularization == 0.1
        with pytest.raises(ValueError, match=r"rows \[q, 60\], got \[7, 59\]"):
            operator.apply(rows()[:, 1:])

    def test_a_row_that_is_not_finite_is_the_only_one_lost(
        self, build: Callable[[float], InverseOperator]
    ) -> None:
        spoiled = rows().clone()
        spoiled[1, 3] = torch.nan
        operator = build(0.1)
        with pytest.warns(SolverWarning, match="1 of 7 right-hand sides did not converge"):
            solved = operator.apply(spoiled)
        assert solved[1].isnan().all()
        kept = [0, 2, 3, 4, 5, 6]
        oracle.assert_close(solved[kept], reference(MLP, "empirical_fisher").factors(0.1)[kept], 1e-6)


def test_a_matrix_in_place_is_changed_and_another_is_not() -> None:
    given = MATRIX.clone()
    operator = DirectSolveOperator(given, 0.5)
    operator.apply(rows())
    assert torch.equal(given, MATRIX)
    oracle.assert_close(operator.matrix, MATRIX + 0.5 * torch.eye(60), 1e-15)
    in_place = DirectSolveOperator(given, 0.5, in_place_regularization=True)
    assert torch.equal(in_place.matrix, MATRIX + 0.5 * torch.eye(len(MATRIX), dtype=MATRIX.dtype))
    in_place.apply(rows())
    for λ in (0.1, 3.0, 0.7):
        in_place.regularization = λ
        in_place.apply(rows())
    assert torch.equal(given.diagonal(), MATRIX.diagonal() + 0.7)
    assert in_place.matrix is not operator.matrix


def test_a_matrix_that_is_not_symmetric_is_solved_as_it_is() -> None:
    matrix = MATRIX + torch.randn(60, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 9
    operator = DirectSolveOperator(matrix, 2.0)
    expected = torch.linalg.solve(matrix + 2 * torch.eye(60), rows().T).T
    oracle.assert_close(operator.apply(rows()), expected, 1e-10)
    oracle.assert_close(MatrixOperator(matrix).apply(rows()[0]), matrix @ rows()[0], 1e-13)
    form = operator.as_bilinear_form().inner_prod(rows(), rows()[:2])
    oracle.assert_close(form, expected @ rows()[:2].T, 1e-10)


def test_a_matrix_without_inverse_is_refused_with_the_cure() -> None:
    with pytest.raises(SingularCurvatureError, match="larger regularization"):
        DirectSolveOperator(torch.zeros(3, 3)).apply(torch.ones(3))
    with pytest.raises(ValueError, match="square"):
        DirectSolveOperator(torch.zeros(3, 4))


def test_a_low_rank_operator_counts_the_rest_as_regularization_or_as_nothing() -> None:
    values, vectors = torch.linalg.eigh(MATRIX)
    few = LowRankProductRepresentation(values[-4:], vectors[:, -4:])
    matrix = (few.projections * few.eigen_vals) @ few.projections.T
    inverse = torch.linalg.inv(matrix + 0.1 * torch.eye(60, dtype=torch.float64))
    oracle.assert_close(LowRankOperator(few, 0.1).apply(rows()), rows() @ inverse, 1e-10)
    inside = few.projections / (few.eigen_vals + 0.1) @ few.projections.T
    oracle.assert_close(LowRankOperator(few, 0.1, exact=False).apply(rows()), rows() @ inside, 1e-10)
    with pytest.raises(ValueError, match="regularization: expected numbers above 0"):
        LowRankOperator(few)
    with pytest.raises(ValueError, match="one column for each"):
        LowRankProductRepresentation(values[:3], vectors)


def test_an_operator_that_is_not_positive_shows_in_the_report() -> None:
    negative = CgOperator(MatrixOperator(-MATRIX), 1e-3)
    with pytest.warns(SolverWarning, match="indefinite") as told:
        negative.apply(rows())
    assert [warning.filename for warning in told] == [__file__]
    assert negative.solver_report is not None
    assert (negative.solver_report.status == SolverStatus.INDEFINITE).any()
    growing = LissaOperator(_Known(MLP.model(), MLP.loss), loader(), 0.1, scale=0.05)
    with pytest.warns(SolverWarning, match="not_finite"), pytest.warns(SolverWarning, match="a scale of"):
        assert growing.apply(rows()).isnan().any()


def test_an_argument_without_effect_says_so_where_the_operator_is_made() -> None:
    operation = GaussNewtonBatchOperation(MLP.model(), MLP.loss)
    for make in (
        lambda: CgOperator(MatrixOperator(MATRIX), progress=True),
        lambda: LissaOperator(operation, loader(), progress=True),
    ):
        with pytest.warns(UserWarning, match="progress has no effect: see solver_report") as told:
            make()
        assert [warning.filename for warning in told] == [__file__]


class _Identity(TensorOperator):
    """A user's operator that answers with what it was given."""

    def __init__(self) -> None:
        self.moved: list[Any] = []

    @property
    def input_size(self) -> int:
        return 60

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def to(self, device: torch.device | str) -> _Identity:
        self.moved.append(device)
        return self

    def _apply_to_vec(self, vec: Tensor) -> Tensor:
        return vec

    def _apply_to_mat(self, mat: Tensor) -> Tensor:
        return mat


def test_an_operator_of_ones_own_can_be_inverted_though_it_answers_with_its_argument() -> None:
    inverse = CgOperator(_Identity(), 1.0, **EXACT)
    oracle.assert_close(inverse.apply(rows()), rows() / 2, 1e-12)
    given = rows().clone()
    _Identity().products()(given).add_(1)
    assert torch.equal(given, rows())
    inverse.to("cpu")
    assert inverse.operator.moved == ["cpu"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", SIZES)
def test_lissa_averages_a_batch_operation_by_examples(size: int) -> None:
    operation = GaussNewtonBatchOperation(MLP.model(), MLP.loss)
    operator = LissaOperator(operation, loader(size=size), 1.0, scale=1.2, rtol=1e-9)
    oracle.assert_close(operator.apply(rows()), reference(MLP, "empirical_fisher").factors(1.0), 1e-8)


def test_in_float32_an_operator_answers_in_float32() -> None:
    data = [(x.float(), y) for x, y in loader()]
    operator = CgOperator(GaussNewtonOperator(MLP.model(torch.float32), MLP.loss, data), 0.1)
    solved = operator.apply(rows().float())
    assert solved.dtype == torch.float32
    explicit = reference(MLP, "empirical_fisher")
    oracle.assert_close(solved, explicit.factors(0.1), explicit.bound(0.1, torch.float32))


def test_dampening_adds_its_product_with_the_scale_to_the_regularization() -> None:
    operator = LissaOperator(_Known(MLP.model(), MLP.loss), loader(), 0.1, dampen=0.05, **STEPS)
    oracle.assert_close(
        operator.apply(rows()), reference(MLP, "empirical_fisher").factors(0.1 + 0.05 * 0.8), 1e-8
    )
