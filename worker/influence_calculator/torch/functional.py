"""Losses, gradients and curvature as functions of parameters, and low-rank approximations of matrices.

A loss over several examples is the mean of the losses of one example each, however the user's loss reduces
a batch. `parameters` are a dictionary by name, which may leave out some of the model's; vectors and columns
stand in its order.

Shapes: n examples, q rows, P parameters, r directions, F... feature dimensions of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_calculator.errors import SolverWarning
from influence_calculator.maths.blocks import BlockMode
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.curvature_passes import MatrixPass
from influence_calculator.maths.directional import pull_back
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.krylov import MOST_RESTARTS, Krylov, search_in
from influence_calculator.maths.layout import Layout, Slot, columns_of, tensors_of
from influence_calculator.maths.objective import xy_objective
from influence_calculator.maths.own_modes import own_modes
from influence_calculator.maths.preconditioners import NystroemPreconditioner, fitted_to
from influence_calculator.maths.training_batches import JoinedBatches
from influence_calculator.torch.data_operators import HessianOperator
from influence_calculator.torch.ignored import warn_of_no_effect
from influence_calculator.torch.low_rank import LowRankProductRepresentation
from influence_calculator.torch.restricted_model import RestrictedModel, RestrictTo
from influence_calculator.torch.tensor_operator import TensorOperator
from influence_calculator.torch.training_data import IterableTrainingData
from influence_calculator.torch.user_warnings import warn_user
from influence_calculator.torch.util import LossType

__all__ = [
    "LowRankProductRepresentation",
    "create_batch_hvp_function",
    "create_batch_loss_function",
    "create_empirical_loss_function",
    "create_hvp_function",
    "create_matrix_jacobian_product_function",
    "create_per_sample_gradient_function",
    "create_per_sample_loss_function",
    "create_per_sample_mixed_derivative_function",
    "gauss_newton",
    "hessian",
    "hvp",
    "model_hessian_nystroem_approximation",
    "operator_nystroem_approximation",
    "operator_spectral_approximation",
    "randomized_nystroem_approximation",
]

Parameters = dict[str, Tensor]

OfBatch = Callable[[Parameters, Tensor, Tensor], Tensor]
"""`(parameters, x, y) -> tensor`."""

OfBatchByName = Callable[[Parameters, Tensor, Tensor], Parameters]
"""`(parameters, x, y) -> tensor by parameter`."""

ONE_MEAN = "every example counts the same either way"
NO_SHIFT = "small and negative eigenvalues are dropped, which needs no shift"


def create_per_sample_loss_function(model: nn.Module, loss: LossType) -> OfBatch:
    """`(parameters, x, y) -> ℓ_i`, `[n]`."""
    objective = xy_objective(model, loss)
    return lambda parameters, x, y: objective.losses_at(parameters, (x, y))


def create_batch_loss_function(model: nn.Module, loss: LossType) -> OfBatch:
    """`(parameters, x, y) -> (1/n) Σ ℓ_i`."""
    losses = create_per_sample_loss_function(model, loss)
    return lambda parameters, x, y: losses(parameters, x, y).mean()


def create_empirical_loss_function(
    model: nn.Module, loss: LossType, data_loader: Iterable[Any]
) -> Callable[[Parameters], Tensor]:
    """`parameters -> (1/N) Σ ℓ_i` over all examples of a loader."""
    losses = create_per_sample_loss_function(model, loss)

    def empirical_loss(parameters: Parameters) -> Tensor:
        data = IterableTrainingData(data_loader, next(iter(parameters.values())).device, passes=1)
        return torch.cat([losses(parameters, *batch) for _, batch in data.batches()]).mean()

    return empirical_loss


def hvp(
    func: Callable[[Parameters], Tensor], params: Parameters, vec: Parameters, reverse_only: bool = True
) -> Parameters:
    """`∇² f(θ) v` of a scalar function of parameters, by parameter.

    Args:
        func: differentiated twice.
        params: θ.
        vec: v.
        reverse_only: two reverse passes; False: forward over reverse, which fewer operations have.
    """
    if reverse_only:
        product: Parameters = pull_back(grad(func), params)[1](vec)
        return product
    with sdpa_kernel(SDPBackend.MATH):
        pushed: Parameters = jvp(grad(func), (params,), (vec,))[1]
    return pushed


def create_batch_hvp_function(
    model: nn.Module, loss: LossType, reverse_only: bool = True
) -> Callable[[Parameters, Tensor, Tensor, Tensor], Tensor]:
    """`(parameters, x, y, v) -> (1/n) Σ ∇² ℓ_i v`, all `[P]`.

    The function raises ValueError for a v of another shape.
    """
    batch_loss = create_batch_loss_function(model, loss)

    def product(parameters: Parameters, x: Tensor, y: Tensor, vec: Tensor) -> Tensor:
        slots = _slots(parameters)
        width = sum(slot.size for slot in slots)
        if vec.shape != (width,):
            raise ValueError(
                f"vec: expected a vector [{width}], got {list(vec.shape)}; it has one entry per entry of the "
                "parameters given"
            )
        row = {name: value[0] for name, value in tensors_of(vec[None], slots, vec.dtype).items()}
        multiplied = hvp(lambda values: batch_loss(values, x, y), parameters, row, reverse_only)
        return torch.cat([value.flatten() for value in multiplied.values()])

    return product


def create_hvp_function(
    model: nn.Module,
    loss: LossType,
    data_loader: Iterable[Any],
    precompute_grad: bool = True,
    use_average: bool = True,
    reverse_only: bool = True,
    track_gradients: bool = False,
) -> Callable[[Tensor], Tensor]:
    """`v -> (1/N) Σ ∇² ℓ_i v` over all examples of a loader, of a vector `[P]` or of rows `[q, P]`.

    Args:
        model: in eval mode.
        loss: `loss(model(x), y)`.
        data_loader: the training data, as anything that iterates over (x, y) again and again.
        precompute_grad: the gradient's graphs are kept, as far as 192 MiB hold them; products are then those
            at the parameters of now.
        use_average: kept for pyDVL's signature: every example counts the same either way.
        reverse_only: kept for pyDVL's signature: only reverse passes are made.
        track_gradients: must be False.

    The function raises ValueError for a vector or rows of another width.

    Raises:
        ValueError: `track_gradients`.
    """
    _refuse_tracking(track_gradients)
    warn_of_no_effect(ONE_MEAN, use_average=not use_average)
    warn_of_no_effect("only reverse passes are made", reverse_only=not reverse_only)
    operator = HessianOperator(model, loss, data_loader)
    if not precompute_grad:
        return operator.apply
    product = operator.products()

    @own_modes()
    def multiplied(vec: Tensor) -> Tensor:
        if vec.ndim not in (1, 2) or vec.shape[-1] != operator.input_size:
            raise ValueError(
                f"vec: expected a vector [{operator.input_size}] or rows [q, {operator.input_size}], got "
                f"{list(vec.shape)}; the last dimension has one entry per parameter"
            )
        return product(vec) if vec.ndim == 2 else product(vec[None])[0]

    return multiplied


def hessian(
    model: nn.Module,
    loss: LossType,
    data_loader: Iterable[Any],
    use_hessian_avg: bool = True,
    track_gradients: bool = False,
    restrict_to: RestrictTo | None = None,
) -> Tensor:
    """`(1/N) Σ ∇² ℓ_i`, `[P, P]`.

    Args:
        model: in eval mode.
        loss: `loss(model(x), y)`.
        data_loader: the training data; read once.
        use_hessian_avg: kept for pyDVL's signature: every example counts the same either way.
        track_gradients: must be False.
        restrict_to: parameters by name, in the order of the columns; None: all that require grad.

    Raises:
        ValueError: `track_gradients`.
    """
    _refuse_tracking(track_gradients)
    warn_of_no_effect(ONE_MEAN, use_hessian_avg=not use_hessian_avg)
    return _matrix(SecondOrderMode.HESSIAN, RestrictedModel(model, loss, restrict_to), data_loader)


def gauss_newton(
    model: nn.Module, loss: LossType, data_loader: Iterable[Any], restrict_to: RestrictTo | None = None
) -> Tensor:
    """`(1/N) Σ g_i g_iᵀ` at the labels given, `[P, P]`: the empirical Fisher matrix, under pyDVL's name.

    Args:
        model: in eval mode.
        loss: `loss(model(x), y)`.
        data_loader: the training data; read once.
        restrict_to: parameters by name, in the order of the columns; None: all that require grad.
    """
    own = RestrictedModel(model, loss, restrict_to)
    return _matrix(SecondOrderMode.EMPIRICAL_FISHER, own, data_loader)


def create_per_sample_gradient_function(model: nn.Module, loss: LossType) -> OfBatchByName:
    """`(parameters, x, y) -> ∇θ ℓ_i` by parameter, `[n, *shape]`."""
    objective = xy_objective(model, loss)

    def gradients(parameters: Parameters, x: Tensor, y: Tensor) -> Parameters:
        with sdpa_kernel(SDPBackend.MATH):
            found: Parameters = vmap(grad(objective.example_loss), in_dims=(None, 0))(parameters, (x, y))
        return found

    return gradients


def create_matrix_jacobian_product_function(model: nn.Module, loss: LossType, g: Tensor) -> OfBatch:
    """`(parameters, x, y) -> g_k · ∇θ ℓ_i`, `[q, n]`, for rows g `[q, P]`."""
    gradients = create_per_sample_gradient_function(model, loss)

    def product(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return g @ columns_of(gradients(parameters, x, y), _slots(parameters), g.dtype).T

    return product


def create_per_sample_mixed_derivative_function(model: nn.Module, loss: LossType) -> OfBatchByName:
    """`(parameters, x, y) -> ∇θ ∇x ℓ_i` by parameter, `[n, F..., *shape]`; `TorchGradientProvider` multiplies
    with it for less.
    """
    objective = xy_objective(model, loss)

    def of_one(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return objective.example_loss(parameters, (x, y))

    def derivatives(parameters: Parameters, x: Tensor, y: Tensor) -> Parameters:
        with sdpa_kernel(SDPBackend.MATH):
            of_examples = vmap(jacrev(grad(of_one, argnums=1)), in_dims=(None, 0, 0))
            found: Parameters = of_examples(parameters, x, y)
        return found

    return derivatives


def randomized_nystroem_approximation(
    mat_mat_prod: Tensor | Callable[[Tensor], Tensor],
    input_dim: int,
    rank: int,
    input_type: torch.dtype,
    shift_func: Callable[[Tensor], Tensor] | None = None,
    mat_vec_device: torch.device = torch.device("cpu"),  # noqa: B008  pyDVL's default; devices are immutable
    seed: int = 0,
) -> LowRankProductRepresentation:
    """`AΩ (ΩᵀAΩ)⁺ ΩᵀA = V D Vᵀ` for a seeded random Ω of r columns; A symmetric and positive.

    Args:
        mat_mat_prod: A, or its product with columns `[P, r]`.
        input_dim: P.
        rank: r; more than P means P, and the result is A itself.
        input_type: dtype of the columns.
        shift_func: kept for pyDVL's signature: small and negative eigenvalues of the sketch are dropped.
        mat_vec_device: where columns are made.
        seed: of Ω.
    """
    warn_of_no_effect(NO_SHIFT, shift_func=shift_func is not None)
    multiply = (lambda columns: mat_mat_prod @ columns) if isinstance(mat_mat_prod, Tensor) else mat_mat_prod
    like = torch.zeros(input_dim, dtype=input_type, device=mat_vec_device)
    return _nystroem(lambda rows: multiply(rows.T).T, like, rank, seed)


def model_hessian_nystroem_approximation(
    model: nn.Module,
    loss: LossType,
    data_loader: Iterable[Any],
    rank: int,
    shift_func: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> LowRankProductRepresentation:
    """`operator_nystroem_approximation` of the training data's Hessian."""
    warn_of_no_effect(NO_SHIFT, shift_func=shift_func is not None)
    return operator_nystroem_approximation(HessianOperator(model, loss, data_loader), rank, seed=seed)


def operator_nystroem_approximation(
    operator: TensorOperator,
    rank: int,
    shift_func: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> LowRankProductRepresentation:
    """`AΩ (ΩᵀAΩ)⁺ ΩᵀA = V D Vᵀ` of an operator, for a seeded random Ω: one product with r rows.

    Args:
        operator: A, symmetric and positive.
        rank: r; more than P means P, and the result is A itself.
        shift_func: kept for pyDVL's signature: small and negative eigenvalues of the sketch are dropped.
        seed: of Ω.
    """
    warn_of_no_effect(NO_SHIFT, shift_func=shift_func is not None)
    return _nystroem(operator.products(), _like(operator), rank, seed)


def operator_spectral_approximation(
    operator: TensorOperator,
    rank: int = 10,
    krylov_dimension: int | None = None,
    tol: float = 1e-6,
    max_iter: int | None = None,
    eigen_computation_on_gpu: bool = False,
    seed: int = 0,
) -> LowRankProductRepresentation:
    """The r eigenpairs of largest modulus of a symmetric operator, by block Lanczos.

    Args:
        operator: A.
        rank: r; more than P means P.
        krylov_dimension: rows that the search keeps, more than the rank; default `max(2 rank + 1, 20)`.
        tol: an eigenpair has converged at `‖A v − θ v‖ ≤ tol |θ|`; a `SolverWarning` says when one has not.
        max_iter: restarts of the search at most; default 30.
        eigen_computation_on_gpu: kept for pyDVL's signature; the search runs where the operator is.
        seed: of the rows that the search starts from.
    """
    where = "the search runs where the operator is"
    warn_of_no_effect(where, eigen_computation_on_gpu=eigen_computation_on_gpu)
    search = Krylov(rank, krylov_dimension, tol, MOST_RESTARTS if max_iter is None else max_iter)
    found = search_in(search, operator.products(), _like(operator), seed)
    if not found.converged:
        message = (
            f"the {len(found.eigenvalues)} eigenpairs of largest modulus have not converged; raise max_iter "
            "or krylov_dimension, or lower the rank"
        )
        warn_user(message, SolverWarning)
    return LowRankProductRepresentation(found.eigenvalues.to(found.eigenvectors), found.eigenvectors.T)


def _nystroem(
    product: Callable[[Tensor], Tensor], like: Tensor, rank: int, seed: int
) -> LowRankProductRepresentation:
    values = fitted_to(NystroemPreconditioner(rank, seed), product, like)
    return LowRankProductRepresentation(values["eigenvalues"], values["basis"].T)


def _like(operator: TensorOperator) -> Tensor:
    dtype = accumulation_dtype(operator.dtype)
    return torch.zeros(operator.input_size, dtype=dtype, device=operator.device)


def _matrix(second_order: SecondOrderMode, own: RestrictedModel, data_loader: Iterable[Any]) -> Tensor:
    data = IterableTrainingData(data_loader, own.device, passes=1)
    own.batch(*data.first())
    step = MatrixPass(BlockMode.FULL, second_order)
    sums = step.accumulate(own.objective, JoinedBatches(own.objective, data).batches(), {})
    return step.finish("", sums[""], data.length, {})["matrix"]


def _slots(parameters: Parameters) -> tuple[Slot, ...]:
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    return Layout.of(shapes, {"": tuple(shapes)}).slots


def _refuse_tracking(track_gradients: bool) -> None:
    if track_gradients:
        raise ValueError(
            "track_gradients: expected False, got True: results are numbers; differentiate "
            "create_empirical_loss_function with torch.func instead"
        )
