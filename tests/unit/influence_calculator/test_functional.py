"""Functions of parameters against the oracle, at the model's own and at others; low-rank approximations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from influence_calculator.errors import SolverWarning
from influence_calculator.maths.errors import NotFiniteError
from influence_calculator.torch import functional
from influence_calculator.torch.functional import LowRankProductRepresentation
from influence_calculator.torch.operator import GaussNewtonOperator, HessianOperator, MatrixOperator
from influence_calculator.torch.util import get_model_parameters
from model_cases import MLP, MLP_REGRESSION, SHARED, ModelCase
from references import reference

X, Y = MLP.train()
FEW = X[:4], Y[:4]
ROWS = torch.randn(3, 60, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def loader(size: int = 11) -> list[tuple[Tensor, Tensor]]:
    """23 examples: a last batch of one."""
    return list(zip(X.split(size), Y.split(size), strict=True))


def elsewhere() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and parameters that are not its own; the oracle takes another model, which has them."""
    moved = MLP.model()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.3)
    return moved, get_model_parameters(moved)


def by_row(parameters: dict[str, Tensor], vec: Tensor) -> dict[str, Tensor]:
    parts = vec.split([value.numel() for value in parameters.values()])
    return {n: part.reshape(value.shape) for (n, value), part in zip(parameters.items(), parts, strict=True)}


def flat(tensors: dict[str, Tensor], n: int) -> Tensor:
    return torch.cat([value.reshape(n, -1) for value in tensors.values()], 1)


def sums(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same loss, summed over a batch where it meant."""
    return lambda outputs, y: loss(outputs, y) * len(y)


@pytest.mark.parametrize("loss", [MLP.loss, sums(MLP.loss)], ids=["mean", "sum"])
def test_losses_are_those_of_one_example_each_at_the_parameters_given(loss: Any) -> None:
    moved, parameters = elsewhere()
    expected = torch.stack([MLP.loss(moved(a[None]), b[None]) for a, b in zip(X, Y, strict=True)]).detach()
    model = MLP.model()
    oracle.assert_close(
        functional.create_per_sample_loss_function(model, loss)(parameters, X, Y), expected, 1e-12
    )
    mean = functional.create_batch_loss_function(model, loss)(parameters, X, Y)
    oracle.assert_close(mean, expected.mean().detach(), 1e-12)
    empirical = functional.create_empirical_loss_function(model, loss, loader())
    oracle.assert_close(empirical(parameters), expected.mean().detach(), 1e-12)
    gradient = torch.func.grad(empirical)(parameters)
    each = oracle.example_gradients(moved, MLP.loss, X, Y)
    oracle.assert_close(flat(gradient, 1)[0], each.mean(0), 1e-10)


def test_gradients_and_products_with_them_are_those_of_one_example_each() -> None:
    moved, parameters = elsewhere()
    expected = oracle.example_gradients(moved, MLP.loss, *FEW)
    found = functional.create_per_sample_gradient_function(MLP.model(), MLP.loss)(parameters, *FEW)
    oracle.assert_close(flat(found, 4), expected, 1e-10)
    product = functional.create_matrix_jacobian_product_function(MLP.model(), MLP.loss, ROWS)
    oracle.assert_close(product(parameters, *FEW), ROWS @ expected.T, 1e-10)


def test_mixed_derivatives_are_those_of_gradients_by_the_input() -> None:
    moved, parameters = elsewhere()
    identity = torch.eye(60, dtype=torch.float64)
    expected = oracle.perturbations(moved, MLP.loss, identity, *FEW).movedim(0, -1)
    mixed = functional.create_per_sample_mixed_derivative_function(MLP.model(), MLP.loss)(parameters, *FEW)
    oracle.assert_close(torch.cat([v.reshape(4, 4, -1) for v in mixed.values()], -1), expected, 1e-10)


@pytest.mark.parametrize("reverse_only", [True, False])
def test_products_with_the_hessian_of_a_function_or_a_batch(reverse_only: bool) -> None:
    moved, parameters = elsewhere()
    expected = oracle.hessian(moved, MLP.loss, *FEW) @ ROWS[0]
    mean = functional.create_batch_loss_function(MLP.model(), MLP.loss)
    found = functional.hvp(lambda p: mean(p, *FEW), parameters, by_row(parameters, ROWS[0]), reverse_only)
    oracle.assert_close(flat(found, 1)[0], expected, 1e-10)
    product = functional.create_batch_hvp_function(MLP.model(), MLP.loss, reverse_only)
    oracle.assert_close(product(parameters, *FEW, ROWS[0]), expected, 1e-10)


def test_some_parameters_alone_give_their_part_in_their_order() -> None:
    own = get_model_parameters(MLP.model())
    chosen = {name: own[name] for name in ("4.bias", "0.weight")}
    places = oracle.columns(MLP.model())
    columns = torch.cat([torch.arange(60)[places[name]] for name in chosen])
    part = oracle.hessian(MLP.model(), MLP.loss, *FEW)[columns[:, None], columns]
    vec = ROWS[0, : len(columns)]
    product = functional.create_batch_hvp_function(MLP.model(), MLP.loss)
    oracle.assert_close(product(chosen, *FEW, vec), part @ vec, 1e-10)
    whole = reference(MLP, "hessian").curvature[columns[:, None], columns]
    matrix = functional.hessian(MLP.model(), MLP.loss, loader(), restrict_to=chosen)
    oracle.assert_close(matrix, whole, 1e-10)


@pytest.mark.parametrize("precompute", [True, False])
def test_products_with_the_hessian_of_all_examples(precompute: bool) -> None:
    expected = ROWS @ reference(MLP, "hessian").curvature
    product = functional.create_hvp_function(MLP.model(), MLP.loss, loader(), precompute_grad=precompute)
    oracle.assert_close(product(ROWS), expected, 1e-10)
    oracle.assert_close(product(ROWS[1]), expected[1], 1e-10)


@pytest.mark.parametrize("case", [MLP, MLP_REGRESSION, SHARED], ids=repr)
@pytest.mark.parametrize("size", [23, 11])
def test_matrices_count_every_example_the_same_whatever_the_batches(case: ModelCase, size: int) -> None:
    x, y = case.train()
    data = list(zip(x.split(size), y.split(size), strict=True))
    found = functional.hessian(case.model(), case.loss, iter(data))
    oracle.assert_close(found, reference(case, "hessian").curvature, 1e-10)
    found = functional.gauss_newton(case.model(), case.loss, data)
    oracle.assert_close(found, reference(case, "empirical_fisher").curvature, 1e-10)


def test_vectors_of_another_width_are_refused() -> None:
    model = MLP.model()
    parameters = get_model_parameters(model)
    of_a_batch = functional.create_batch_hvp_function(model, MLP.loss)
    for vec in (ROWS[0, :59], torch.cat([ROWS[0], ROWS[0, :1]]), ROWS):
        with pytest.raises(ValueError, match=r"vec: expected a vector \[60\], got"):
            of_a_batch(parameters, *FEW, vec)
    of_all = functional.create_hvp_function(model, MLP.loss, loader())
    for vec in (ROWS[0, :59], ROWS[:, 1:], ROWS[None]):
        with pytest.raises(ValueError, match=r"vec: expected a vector \[60\] or rows \[q, 60\], got"):
            of_all(vec)


def test_what_has_no_effect_is_told_and_what_cannot_be_is_refused() -> None:
    model, square = MLP.model(), MatrixOperator(ROWS.T @ ROWS)
    for call, name in (
        (lambda: functional.hessian(model, MLP.loss, loader(), use_hessian_avg=False), "use_hessian_avg"),
        (lambda: functional.create_hvp_function(model, MLP.loss, loader(), use_average=False), "use_average"),
        (lambda: functional.operator_nystroem_approximation(square, 2, len), "shift_func"),
    ):
        with pytest.warns(UserWarning, match=f"{name} has no effect") as told:
            call()
        assert [warning.filename for warning in told] == [__file__]
    with pytest.raises(ValueError, match="track_gradients"):
        functional.hessian(MLP.model(), MLP.loss, loader(), track_gradients=True)
    with pytest.raises(ValueError, match="track_gradients"):
        functional.create_hvp_function(MLP.model(), MLP.loss, loader(), track_gradients=True)


FISHER = reference(MLP, "empirical_fisher").curvature
HESSIAN = reference(MLP, "hessian").curvature


def matrix_of(known: LowRankProductRepresentation) -> Tensor:
    return (known.projections * known.eigen_vals) @ known.projections.T


def test_at_full_rank_the_nystroem_approximation_is_the_matrix() -> None:
    for found in (
        functional.randomized_nystroem_approximation(FISHER, 60, 60, torch.float64),
        functional.randomized_nystroem_approximation(lambda columns: FISHER @ columns, 60, 99, torch.float64),
        functional.operator_nystroem_approximation(GaussNewtonOperator(MLP.model(), MLP.loss, loader()), 60),
    ):
        oracle.assert_close(matrix_of(found), FISHER, 1e-8)
    by_model = functional.model_hessian_nystroem_approximation(MLP.model(), MLP.loss, loader(), 8)
    operator = HessianOperator(MLP.model(), MLP.loss, loader())
    by_operator = functional.operator_nystroem_approximation(operator, 8)
    oracle.assert_close(matrix_of(by_model), matrix_of(by_operator), 1e-10)


def test_at_a_low_rank_it_is_the_formula_of_one_random_sketch() -> None:
    seen: list[Tensor] = []

    def product(columns: Tensor) -> Tensor:
        seen.append(columns.clone())
        return FISHER @ columns

    found = functional.randomized_nystroem_approximation(product, 60, 5, torch.float64, seed=3)
    (Ω,) = seen
    sketch = FISHER @ Ω
    oracle.assert_close(matrix_of(found), sketch @ torch.linalg.pinv(Ω.T @ sketch) @ sketch.T, 1e-8)
    again = functional.randomized_nystroem_approximation(FISHER, 60, 5, torch.float64, seed=3)
    oracle.assert_close(matrix_of(again), matrix_of(found), 1e-12)
    other = functional.randomized_nystroem_approximation(FISHER, 60, 5, torch.float64, seed=4)
    assert oracle.relative_error(matrix_of(other), matrix_of(found)) > 1e-3


@pytest.mark.parametrize("rank", [1, 5, 60])
def test_the_spectral_approximation_has_the_eigenpairs_of_largest_modulus(rank: int) -> None:
    values, vectors = torch.linalg.eigh(HESSIAN)
    best = values.abs().argsort(descending=True)[:rank]
    expected = (vectors[:, best] * values[best]) @ vectors[:, best].T
    operator = HessianOperator(MLP.model(), MLP.loss, loader())
    found = functional.operator_spectral_approximation(operator, rank, tol=1e-10)
    oracle.assert_close(found.eigen_vals, values[best], 1e-8)
    oracle.assert_close(matrix_of(found), expected, 1e-7)


def test_a_search_that_ends_early_or_meets_nan_says_so() -> None:
    close = MatrixOperator(torch.diag(torch.linspace(1, 1.01, 200, dtype=torch.float64)))
    with pytest.warns(SolverWarning, match="10 eigenpairs of largest modulus have not converged"):
        functional.operator_spectral_approximation(close, 10, tol=1e-12, max_iter=1)
    with pytest.raises(NotFiniteError):
        functional.operator_spectral_approximation(MatrixOperator(torch.full((60, 60), torch.nan)))


def test_parameters_come_by_name_without_those_that_are_frozen() -> None:
    model = SHARED.model()
    tracked = ["first.weight", "first.bias", "second.bias", "head.weight", "head.bias"]
    assert list(get_model_parameters(model)) == tracked
    every = get_model_parameters(model, detach=False, require_grad_only=False)
    assert list(every) == [name for name, _ in model.named_parameters()]
    assert all(value is own for value, own in zip(every.values(), model.parameters(), strict=True))
