"""The algebra of a curvature that is diagonal in a Kronecker-factored basis, one layer at a time.

A layer's gradient as a matrix `V` is `[o, j]`: its weight's columns, then its bias. The curvature is
`(Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ`, so that

    (H + λI)^-1 V = Q_G ( (Q_Gᵀ V Q_A) / (Λ + λ) ) Q_Aᵀ.

Shapes: n, t examples, S tokens, o outputs, i inputs, j = i + 1 with a bias, P_b = o·j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from influence_calculator.maths.capture import CapturedLayer, per_sample_products
from influence_calculator.maths.errors import NotFiniteError, SingularCurvatureError
from influence_calculator.maths.layers import LayerSpec
from influence_calculator.maths.method import SolverReport

PRODUCT_ELEMENTS = 1 << 24
"""Per-sample gradients formed at once while Λ is summed: 64 MiB in float32."""


def extended_activations(layer: CapturedLayer, dtype: torch.dtype) -> Tensor:
    """`ã = [a, 1]`, `[n, S, j]`: only the part whose parameters are tracked."""
    a = layer.activations.to(dtype)
    if layer.spec.bias is None:
        return a
    ones = a.new_ones(*a.shape[:2], 1)
    return ones if layer.spec.weight is None else torch.cat([a, ones], dim=2)


def add_products(total: Tensor, tokens: Tensor) -> None:
    """`total += Σ_n Σ_s u uᵀ` over the tokens u of `[n, S, k]`."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    total.addmm_(rows.T, rows)


def add_squared_products(total: Tensor, g: Tensor, a: Tensor) -> None:
    """`total += Σ_n (Σ_s g aᵀ)²` elementwise, `[o, j]`: tokens are summed before squaring."""
    if g.shape[1] == 1:
        total.addmm_(g[:, 0].square().T, a[:, 0].square())
        return
    at_once = max(1, PRODUCT_ELEMENTS // total.numel())
    for g_piece, a_piece in zip(g.split(at_once), a.split(at_once), strict=True):
        total.add_(per_sample_products(g_piece, a_piece).square_().sum(0))


def eigenbasis(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (at least 0) and eigenvectors, computed in float64, in the dtype of the matrix.

    Raises:
        NotFiniteError: naming `what` holds NaN or infinity.
    """
    if not torch.isfinite(matrix).all():
        raise NotFiniteError(
            f"{what}: expected finite sums over the training data, got NaN or infinity; "
            "look for training examples whose loss or outputs are not finite"
        )
    wide = matrix.to(torch.float64)
    eigenvalues, vectors = torch.linalg.eigh((wide + wide.T) / 2)
    return eigenvalues.clamp(min=0).to(matrix.dtype), vectors.to(matrix.dtype)


@dataclass(frozen=True)
class Basis:
    """Where a layer's curvature is diagonal."""

    inputs: Tensor
    """`Q_A`, `[j, j]`, eigenvectors in columns."""
    outputs: Tensor
    """`Q_G`, `[o, o]`."""


class KroneckerSolver:
    """`(H_b + λ_b I)^-1` of one layer."""

    def __init__(self, layer: LayerSpec, basis: Basis, eigenvalues: Tensor, λ: float) -> None:
        self._layer = layer
        self._basis = basis
        self._shifted = shifted(eigenvalues, λ, f"layer {layer.name!r}")

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        Q_A, Q_G = self._basis.inputs, self._basis.outputs
        V = self._matrices(right_hand_sides.to(Q_A.dtype))
        turned = torch.matmul(Q_G.T, V @ Q_A).div_(self._shifted)
        # Two buffers serve all four products: fresh memory costs as much as the arithmetic.
        V = torch.matmul(turned, Q_A.T)
        V = torch.matmul(Q_G, V, out=turned)
        return self._columns(V), SolverReport.exact(right_hand_sides.shape[0])

    def _matrices(self, columns: Tensor) -> Tensor:
        """`[t, P_b]` as `[t, o, j]`."""
        o, j = self._shifted.shape
        t = columns.shape[0]
        if self._layer.weight is None or self._layer.bias is None:
            return columns.view(t, o, j)
        weight, bias = columns[:, : o * (j - 1)], columns[:, o * (j - 1) :]
        return torch.cat([weight.reshape(t, o, j - 1), bias.unsqueeze(2)], dim=2)

    def _columns(self, matrices: Tensor) -> Tensor:
        """The inverse of `_matrices`."""
        if self._layer.weight is None or self._layer.bias is None:
            return matrices.flatten(1)
        return torch.cat([matrices[:, :, :-1].flatten(1), matrices[:, :, -1]], dim=1)


class DiagonalSolver:
    """`g / (Λ + λ)` elementwise: parameters that no Kronecker product describes."""

    def __init__(self, block: str, diagonal: Tensor, λ: float) -> None:
        self._shifted = shifted(diagonal, λ, f"block {block!r}")

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        solved = right_hand_sides.to(self._shifted.dtype) / self._shifted
        return solved, SolverReport.exact(right_hand_sides.shape[0])


def shifted(eigenvalues: Tensor, λ: float, what: str) -> Tensor:
    """`Λ + λ`.

    Raises:
        SingularCurvatureError: an entry is 0.
    """
    values = eigenvalues + λ
    if not (values > 0).all():
        raise SingularCurvatureError(
            f"{what}: the curvature is 0 in some direction, so that H + λI is singular at λ = {λ:g}; "
            "give a larger regularization, 0.01 is a usual start"
        )
    return values
