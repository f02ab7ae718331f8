"""Second-order matrices of the loss, as sums over the examples of a batch, block by block.

`H = (1/N) Σ_i ∇²θ ℓ_i` and its positive relatives. A `BlockCurvature` belongs to one batch: it builds
what its products need once and answers any number of them. Whoever sums over batches divides by N.

Shapes: q vectors, n examples of the batch, P_b parameters of block b, d output elements per example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum

import torch
from torch import Tensor
from torch.func import grad, vmap

from influence_calculator.maths.directional import directions_at_once, in_pieces, pull_back
from influence_calculator.maths.gradients import (
    accumulation_dtype,
    collected,
    model_dtype,
    per_sample_gradients,
)
from influence_calculator.maths.layout import Layout, Slot, columns_of, tensors_of
from influence_calculator.maths.objective import Batch, Objective, batch_size
from influence_calculator.maths.output_curvature import OutputCurvature, float_outputs, output_curvature


class SecondOrderMode(StrEnum):
    """Which matrix stands for the curvature."""

    HESSIAN = "hessian"
    """`(1/N) Σ ∇²θ ℓ_i`. May be indefinite."""
    EMPIRICAL_FISHER = "empirical_fisher"
    """`(1/N) Σ g_i g_iᵀ` at the labels given. Positive semi-definite."""
    GENERALIZED_GAUSS_NEWTON = "generalized_gauss_newton"
    """`(1/N) Σ J_iᵀ clip(∇²_f ℓ_i) J_i`, negative eigenvalues clipped to 0. Positive semi-definite."""


class BlockCurvature(ABC):
    """The sum over one batch's examples of one block's second-order matrix."""

    clipped: int = 0
    """Negative eigenvalues of output Hessians that were taken as 0."""

    @abstractmethod
    def products(self, vectors: Tensor) -> Tensor:
        """The matrix times every row of `[q, P_b]`."""

    @abstractmethod
    def add_matrix(self, total: Tensor) -> None:
        """Adds the matrix to `total`, `[P_b, P_b]`, in place."""

    @abstractmethod
    def trace(self) -> Tensor:
        """The sum of the diagonal."""


def curvatures(
    mode: SecondOrderMode, objective: Objective, layout: Layout, batch: Batch
) -> Iterator[tuple[str, BlockCurvature]]:
    """Every block's curvature over one batch, one living at a time where that saves memory."""
    match mode:
        case SecondOrderMode.HESSIAN:
            for block in layout.blocks:
                yield block, _Hessian(objective, layout.slots_of(block), batch)
        case SecondOrderMode.EMPIRICAL_FISHER:
            like = next(iter(objective.parameters().values()))
            parts = per_sample_gradients(objective, batch, layout)
            for block, gradients in collected(parts, layout, batch_size(batch), like).items():
                yield block, _EmpiricalFisher(gradients)
        case SecondOrderMode.GENERALIZED_GAUSS_NEWTON:
            of_outputs = output_curvature(objective, batch)
            for block in layout.blocks:
                yield block, _GaussNewton(objective, layout.slots_of(block), batch, of_outputs)


def products(
    mode: SecondOrderMode, objective: Objective, layout: Layout, batch: Batch, vectors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Per block, the sum over the batch's examples of the curvature times every row of `[q, P_b]`."""
    found = curvatures(mode, objective, layout, batch)
    return {block: curvature.products(vectors[block]) for block, curvature in found}


class _Hessian(BlockCurvature):
    """`Σ_i ∇²θ ℓ_i`: the gradient's graph is built once; symmetric, so a product is one pull-back."""

    def __init__(self, objective: Objective, slots: tuple[Slot, ...], batch: Batch) -> None:
        own = objective.parameters()
        parameters = {slot.name: own[slot.name] for slot in slots}
        gradient = grad(lambda values: objective.losses_at(values, batch).sum())
        _, self._pull = pull_back(gradient, parameters)
        self._slots = slots
        self._dtype = own[slots[0].name].dtype
        self._device = own[slots[0].name].device
        self._at_once = directions_at_once(objective, batch, _width(slots))

    def products(self, vectors: Tensor) -> Tensor:
        def pulled(rows: Tensor) -> Tensor:
            result = vmap(self._pull)(tensors_of(rows, self._slots, self._dtype))
            return columns_of(result, self._slots, vectors.dtype)

        return in_pieces(pulled, vectors, self._at_once)

    def add_matrix(self, total: Tensor) -> None:
        _add_rows(self.products, total, self._at_once)

    def trace(self) -> Tensor:
        return _trace_of_products(
            self.products, _width(self._slots), self._at_once, self._dtype, self._device
        )


class _EmpiricalFisher(BlockCurvature):
    """`Σ_i g_i g_iᵀ = GᵀG`, kept as `G [n, P_b]`."""

    def __init__(self, gradients: Tensor) -> None:
        self._gradients = gradients

    def products(self, vectors: Tensor) -> Tensor:
        own = self._gradients.to(vectors.dtype)
        return (vectors @ own.T) @ own

    def add_matrix(self, total: Tensor) -> None:
        total.addmm_(self._gradients.T, self._gradients)

    def trace(self) -> Tensor:
        return self._gradients.square().sum()


class _GaussNewton(BlockCurvature):
    """`Σ_i J_iᵀ B_i J_i` with `B_i = clip(∇²_f ℓ_i)`: a push, n small products `[d, d]`, and a pull."""

    def __init__(
        self, objective: Objective, slots: tuple[Slot, ...], batch: Batch, of_outputs: OutputCurvature
    ) -> None:
        own = objective.parameters()
        parameters = {slot.name: own[slot.name] for slot in slots}
        outputs, self._pull = pull_back(
            lambda values: float_outputs(objective.outputs(batch, values)), parameters
        )
        # Jᵀu is linear in u, so the pull-back of u → Jᵀu is v → Jv.
        _, self._push = pull_back(self._pull, torch.zeros_like(outputs))
        self.clipped = of_outputs.clipped
        self._middle = of_outputs.matrices
        self._slots = slots
        self._dtype = own[slots[0].name].dtype
        self._device = own[slots[0].name].device
        self._at_once = directions_at_once(objective, batch, _width(slots))

    def products(self, vectors: Tensor) -> Tensor:
        def through(rows: Tensor) -> Tensor:
            pushed = vmap(self._push)(tensors_of(rows, self._slots, self._dtype))
            middle = torch.einsum("nde,qne->qnd", self._middle, pushed.to(self._middle.dtype))
            result = vmap(self._pull)(middle.to(pushed.dtype))
            return columns_of(result, self._slots, vectors.dtype)

        return in_pieces(through, vectors, self._at_once)

    def add_matrix(self, total: Tensor) -> None:
        _add_rows(self.products, total, self._at_once)

    def trace(self) -> Tensor:
        return _trace_of_products(
            self.products, _width(self._slots), self._at_once, self._dtype, self._device
        )


def _width(slots: tuple[Slot, ...]) -> int:
    return sum(slot.size for slot in slots)


def _unit_vectors(start: int, stop: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = torch.zeros(stop - start, width, dtype=dtype, device=device)
    rows.diagonal(start).fill_(1)
    return rows


def _add_rows(product: Callable[[Tensor], Tensor], total: Tensor, at_once: int) -> None:
    width = total.shape[0]
    for start in range(0, width, at_once):
        stop = min(start + at_once, width)
        total[start:stop] += product(_unit_vectors(start, stop, width, total.dtype, total.device))


def _trace_of_products(
    product: Callable[[Tensor], Tensor], width: int, at_once: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    dtype = accumulation_dtype(dtype)
    total = torch.zeros((), dtype=dtype, device=device)
    for start in range(0, width, at_once):
        stop = min(start + at_once, width)
        total += product(_unit_vectors(start, stop, width, dtype, device)).diagonal(start).sum()
    return total


def empty_matrices(objective: Objective, layout: Layout) -> dict[str, Tensor]:
    """Zeros `[P_b, P_b]` per block, in the dtype sums are kept in."""
    device = next(iter(objective.parameters().values())).device
    dtype = model_dtype(objective)
    return {b: torch.zeros(w, w, dtype=dtype, device=device) for b, w in layout.widths.items()}
