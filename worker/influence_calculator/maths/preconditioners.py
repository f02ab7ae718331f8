"""Preconditioners of conjugate gradients: cheap approximations of `(H + λI)^-1`, always positive.

Each is fitted by one pass over the training data, without λ.

Shapes: q rows, P_b parameters of block b, r the sketch's rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import BlockMode, BlockStructure
from influence_calculator.maths.conjugate_gradients import Rows
from influence_calculator.maths.curvature import BlockCurvature, SecondOrderMode
from influence_calculator.maths.curvature_passes import CurvaturePass
from influence_calculator.maths.errors import NotFiniteError
from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.footprints import row_bytes
from influence_calculator.maths.method import FitState
from influence_calculator.maths.seeded_rows import generator, orthonormal_rows, sign_rows
from influence_calculator.maths.shapes import ModelShapes


class Preconditioner(ABC):
    """A preconditioner's configuration: frozen, picklable, without tensors."""

    tensors: tuple[str, ...]
    """Names of what its pass leaves behind per block."""

    @property
    @abstractmethod
    def rows_kept(self) -> int:
        """Numbers that its pass sums per parameter."""

    @abstractmethod
    def fit_bytes(self, shapes: ModelShapes, widths: Sequence[int], product: int) -> int:
        """What its pass takes, over blocks of these widths; `product`: a batch's product with one row."""

    @abstractmethod
    def fit_pass(self, blocks: BlockStructure, second_order: SecondOrderMode) -> CurvaturePass:
        """The pass over the training data that it needs."""

    @abstractmethod
    def rows(self, values: Mapping[str, Tensor], regularization: float) -> Rows:
        """Its product with every row, from what its pass left behind of one block."""


def sketch_bytes(shapes: ModelShapes, widths: Sequence[int], rank: int, product: int) -> int:
    """What the pass of a Nyström sketch takes: see `Preconditioner.fit_bytes`."""
    blocks = [min(rank, width) * row_bytes(shapes, width) for width in widths]
    # The sums and Ω with one block's product on its way; then the sums and one block's finish in float64.
    finish = 5 * max(blocks) * 8 // max(4, shapes.itemsize)
    return max(2 * sum(blocks) + product + max(blocks), sum(blocks) + finish)


def fitted_to(preconditioner: Preconditioner, product: Rows, like: Tensor) -> dict[str, Tensor]:
    """What its pass leaves behind of one matrix that is known by its products; `like` a `[P]`."""
    step = preconditioner.fit_pass(BlockMode.FULL, SecondOrderMode.HESSIAN)
    sums = step.zeros("", len(like), like)
    step.add(_KnownByProducts(product, like), sums, step.directions("", like))
    return step.finish("", sums, 1, {})


class _KnownByProducts(BlockCurvature):
    nbytes = 0

    def __init__(self, product: Rows, like: Tensor) -> None:
        self._product = product
        self._like = like

    @override
    def products(self, vectors: Tensor) -> Tensor:
        return self._product(vectors)

    @override
    def add_matrix(self, total: Tensor) -> None:
        total.add_(self._product(torch.diag(torch.ones_like(self._like))))

    @override
    def trace(self) -> Tensor:
        return self._product(torch.diag(torch.ones_like(self._like))).diagonal().sum()


@dataclass(frozen=True)
class JacobiPreconditioner(Preconditioner):
    """`1 / (|diag H| + λ)`, the diagonal estimated as the mean of `v ⊙ Hv` over random signs v."""

    num_samples_estimator: int = 1
    """Number of sign vectors, at least 1."""
    seed: int = 0

    tensors = ("diagonal",)

    @property
    @override
    def rows_kept(self) -> int:
        return 1

    @override
    def fit_bytes(self, shapes: ModelShapes, widths: Sequence[int], product: int) -> int:
        row, largest = row_bytes(shapes, sum(widths)), row_bytes(shapes, max(widths))
        # The diagonal and the signs; of one block the products and what they are multiplied to.
        return (1 + self.num_samples_estimator) * row + product + 2 * self.num_samples_estimator * largest

    def __post_init__(self) -> None:
        _check_count("num_samples_estimator", self.num_samples_estimator)

    @override
    def fit_pass(self, blocks: BlockStructure, second_order: SecondOrderMode) -> CurvaturePass:
        return _DiagonalPass(blocks, second_order, self.num_samples_estimator, self.seed)

    @override
    def rows(self, values: Mapping[str, Tensor], regularization: float) -> Rows:
        diagonal = values["diagonal"].abs()
        # An entry estimated as 0 must not become infinite weight when λ is 0.
        smallest = torch.finfo(diagonal.dtype).eps * diagonal.max()
        inverse = 1 / (diagonal.clamp(min=float(smallest)) + regularization)
        if not torch.isfinite(inverse).all():
            return lambda rows: rows
        return lambda rows: rows * inverse


@dataclass(frozen=True)
class NystroemPreconditioner(Preconditioner):
    """`U ((s_r + λ)/(S + λ) − I) Uᵀ + I` for the seeded rank-r Nyström approximation `H ≈ U S Uᵀ`.

    Directions outside of U are left as they are; negative eigenvalues of the sketch are dropped.
    """

    rank: int
    """r, at least 1; more than a block's width means the width."""
    seed: int = 0

    tensors = ("basis", "eigenvalues")

    @property
    @override
    def rows_kept(self) -> int:
        return self.rank

    @override
    def fit_bytes(self, shapes: ModelShapes, widths: Sequence[int], product: int) -> int:
        return sketch_bytes(shapes, widths, self.rank, product)

    def __post_init__(self) -> None:
        _check_count("rank", self.rank)

    @override
    def fit_pass(self, blocks: BlockStructure, second_order: SecondOrderMode) -> CurvaturePass:
        return _SketchPass(blocks, second_order, self.rank, self.seed)

    @override
    def rows(self, values: Mapping[str, Tensor], regularization: float) -> Rows:
        basis, eigenvalues = values["basis"], values["eigenvalues"]
        kept = eigenvalues > 0
        if not kept.any():
            return lambda rows: rows
        # Rows of the basis that are not kept are zero: choosing among them would copy it.
        smallest = eigenvalues[kept].min()
        weights = torch.where(kept, (smallest + regularization) / (eigenvalues + regularization) - 1, 0)
        return lambda rows: rows + (rows @ basis.T * weights) @ basis


@dataclass(frozen=True)
class _DiagonalPass(CurvaturePass):
    samples: int
    seed: int

    name = "jacobi"

    @override
    def zeros(self, block: str, width: int, like: Tensor) -> dict[str, Tensor]:
        return {"diagonal": like.new_zeros(width)}

    @override
    def directions(self, block: str, like: Tensor) -> Tensor:
        return sign_rows(self.samples, len(like), generator(self.seed, block), like)

    @override
    def add(self, curvature: BlockCurvature, sums: Mapping[str, Tensor], directions: Tensor) -> None:
        sums["diagonal"].add_((directions * curvature.products(directions)).sum(0))

    @override
    def finish(
        self, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        return {"diagonal": sums["diagonal"] / (length * self.samples)}


@dataclass(frozen=True)
class _SketchPass(CurvaturePass):
    rank: int
    seed: int

    name = "nystroem"

    @override
    def zeros(self, block: str, width: int, like: Tensor) -> dict[str, Tensor]:
        return {"sketch": like.new_zeros(min(self.rank, width), width)}

    @override
    def directions(self, block: str, like: Tensor) -> Tensor:
        """Ω: r orthonormal rows."""
        width = len(like)
        return orthonormal_rows(min(self.rank, width), width, generator(self.seed, block), like)

    @override
    def add(self, curvature: BlockCurvature, sums: Mapping[str, Tensor], directions: Tensor) -> None:
        sums["sketch"].add_(curvature.products(directions))

    @override
    def finish(
        self, unit: str, sums: Mapping[str, Tensor], length: int, state: FitState
    ) -> dict[str, Tensor]:
        """`HΩ (ΩᵀHΩ)^+ ΩᵀH = U S Uᵀ`, the pseudo-inverse over the positive eigenvalues only.

        Raises:
            NotFiniteError: a training example spoiled the products.
        """
        if not finite_rows(sums["sketch"]).all():
            raise NotFiniteError(
                f"block {unit!r}: expected finite products of the sketch with the curvature, got NaN or "
                "infinity; a training example has a loss or gradient that is not finite"
            )
        sketch = sums["sketch"].double() / length
        core = sketch @ self.directions(unit, sums["sketch"][0]).double().T
        eigenvalues, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = eigenvalues > _relative_rounding(sums["sketch"]) * eigenvalues.abs().max()
        root = (vectors[:, kept] / eigenvalues[kept].sqrt()).T @ sketch
        # Of r rows as long as the block: cuSOLVER refuses the singular values of millions of columns.
        orthonormal, triangle = torch.linalg.qr(root.T)
        _, singular, turn = torch.linalg.svd(triangle.T)
        basis = turn @ orthonormal.T
        rank, width = sketch.shape
        result = sketch.new_zeros(rank, width), sketch.new_zeros(rank)
        result[0][: len(basis)], result[1][: len(singular)] = basis, singular**2
        return {"basis": result[0].to(sums["sketch"]), "eigenvalues": result[1].to(sums["sketch"])}


def _relative_rounding(sketch: Tensor) -> float:
    """Of the core's eigenvalues; by its width, as a product's rounding does not grow with the unknowns."""
    return 10 * min(sketch.shape) * torch.finfo(sketch.dtype).eps


def _check_count(field: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"preconditioner.{field}: expected a whole number of at least 1, got {value}")
