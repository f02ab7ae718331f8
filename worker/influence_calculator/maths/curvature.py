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

from influence_calculator.maths.directional import (
    GRAPH_COPIES,
    activation_elements,
    directions_at_once,
    in_pieces,
    pull_back,
)
from influence_calculator.maths.gradients import (
    accumulation_dtype,
    collected,
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

    nbytes: int
    """What stays allocated while it lives."""
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
            activations = activation_elements(objective, batch)
            for block in layout.blocks:
                yield block, _Hessian(objective, layout.slots_of(block), batch, activations)
        case SecondOrderMode.EMPIRICAL_FISHER:
            for block, gradients in collected(objective, batch, layout).items():
                yield block, _EmpiricalFisher(gradients)
        case SecondOrderMode.GENERALIZED_GAUSS_NEWTON:
            activations = activation_elements(objective, batch)
            of_outputs = output_curvature(objective, batch)
            for block in layout.blocks:
                yield block, _GaussNewton(objective, layout.slots_of(block), batch, activations, of_outputs)


def products(
    mode: SecondOrderMode, objective: Objective, layout: Layout, batch: Batch, vectors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Per block, the sum over the batch's examples of the curvature times every row of `[q, P_b]`."""
    found = curvatures(mode, objective, layout, batch)
    return {block: curvature.products(vectors[block]) for block, curvature in found}


class _Hessian(BlockCurvature):
    """`Σ_i ∇²θ ℓ_i`: the gradient's graph is built once; symmetric, so a product is one pull-back."""

    def __init__(self, objective: Objective, slots: tuple[Slot, ...], batch: Batch, activations: int) -> None:
        self._through = _Through(objective, slots, batch, activations)
        gradient = grad(lambda values: objective.losses_at(values, batch).sum())
        _, self._pull = pull_back(gradient, self._through.parameters)
        self.nbytes = self._through.graph_bytes

    def products(self, vectors: Tensor) -> Tensor:
        return self._through.products(vmap(self._pull), vectors)

    def add_matrix(self, total: Tensor) -> None:
        for start, rows in self._through.unit_vectors():
            total[start : start + len(rows)] += self.products(rows)

    def trace(self) -> Tensor:
        return _trace(self._through, self.products)


class _EmpiricalFisher(BlockCurvature):
    """`Σ_i g_i g_iᵀ = GᵀG`, kept as `G [n, P_b]`."""

    def __init__(self, gradients: Tensor) -> None:
        self._gradients = gradients
        self.nbytes = gradients.nbytes

    def products(self, vectors: Tensor) -> Tensor:
        own = self._gradients.to(vectors.dtype)
        return (vectors @ own.T) @ own

    def add_matrix(self, total: Tensor) -> None:
        total.addmm_(self._gradients.T, self._gradients)

    def trace(self) -> Tensor:
        return self._gradients.square().sum()


class _GaussNewton(BlockCurvature):
    """`Σ_i J_iᵀ B_i J_i` with `B_i = clip(∇²_f ℓ_i)`: a push, products with every B_i, and a pull."""

    def __init__(
        self,
        objective: Objective,
        slots: tuple[Slot, ...],
        batch: Batch,
        activations: int,
        of_outputs: OutputCurvature,
    ) -> None:
        self._through = _Through(objective, slots, batch, activations, of_outputs.width)
        outputs, self._pull = pull_back(
            lambda values: float_outputs(objective.outputs(batch, values)), self._through.parameters
        )
        # Jᵀu is linear in u, so the pull-back of u → Jᵀu is v → Jv.
        _, self._push = pull_back(self._pull, torch.zeros_like(outputs))
        self._of_outputs = of_outputs
        self.clipped = of_outputs.clipped
        self.nbytes = self._through.graph_bytes + of_outputs.nbytes

    def products(self, vectors: Tensor) -> Tensor:
        def product(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            pushed = vmap(self._push)(tensors)
            pulled: dict[str, Tensor] = vmap(self._pull)(self._of_outputs.products(pushed))
            return pulled

        return self._through.products(product, vectors)

    def add_matrix(self, total: Tensor) -> None:
        for start, rows in self._through.unit_vectors():
            total[start : start + len(rows)] += self.products(rows)

    def trace(self) -> Tensor:
        return _trace(self._through, self.products)


class _Through:
    """What products through a graph over one batch need to know of one block."""

    def __init__(
        self,
        objective: Objective,
        slots: tuple[Slot, ...],
        batch: Batch,
        activations: int,
        outputs: int = 0,
    ) -> None:
        """`activations` as `activation_elements` tells; `outputs`: elements of an example that
        directions pass beside them.
        """
        own, n = objective.parameters(), batch_size(batch)
        self.parameters = {slot.name: own[slot.name] for slot in slots}
        self._slots = slots
        self._width = sum(slot.size for slot in slots)
        self._like = torch.zeros((), dtype=objective.dtype, device=objective.device)
        self.graph_bytes = GRAPH_COPIES * n * activations * objective.dtype.itemsize
        self._at_once = directions_at_once(objective, n, activations + outputs, self._width)

    def products(self, function: Callable[[dict[str, Tensor]], dict[str, Tensor]], vectors: Tensor) -> Tensor:
        """`function` of rows `[q, P_b]`, as many at a time as the workspace takes."""

        def piece(rows: Tensor) -> Tensor:
            result = function(tensors_of(rows, self._slots, self._like.dtype))
            return columns_of(result, self._slots, vectors.dtype)

        return in_pieces(piece, vectors, self._at_once)

    def unit_vectors(self) -> Iterator[tuple[int, Tensor]]:
        """The identity's rows, as many at a time as the workspace takes, each with its first index."""
        dtype = accumulation_dtype(self._like.dtype)
        for start in range(0, self._width, self._at_once):
            count = min(self._at_once, self._width - start)
            rows = self._like.new_zeros(count, self._width, dtype=dtype)
            rows.diagonal(start).fill_(1)
            yield start, rows


def _trace(through: _Through, products: Callable[[Tensor], Tensor]) -> Tensor:
    pieces = [products(rows).diagonal(start).sum() for start, rows in through.unit_vectors()]
    return torch.stack(pieces).sum()
