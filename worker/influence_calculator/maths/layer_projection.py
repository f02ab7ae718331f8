"""A projection of one layer's gradients on both sides, which the gradient itself is not needed for.

With orthonormal columns drawn by a seed, scaled to `E[P Pᵀ] = I`,

    φ = P_outᵀ (Σ_s g ãᵀ) P_in = Σ_s (P_outᵀ g) (P_inᵀ ã)ᵀ,

so that what a layer captured is projected token by token and no `[o, j]` is formed. As a matrix it is
`S = P_out ⊗ P_in`, which keeps products of gradients on average. A side with no more than k rows is the
identity. The groups of a convolution share both.

Shapes: n, t examples, c groups, S tokens, o outputs, j inputs of a group (with a bias one more), k_out and
k_in at most k, P_b = o·j parameters of the layer, k_b = c·k_out·k_in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_calculator.maths.capture import CapturedLayer, per_sample_products
from influence_calculator.maths.kronecker import Basis, layer_columns, layer_matrices, turned_tokens
from influence_calculator.maths.layers import LayerSpec
from influence_calculator.maths.seeded_rows import generator, orthonormal_rows


class LayerProjection:
    """`S` of one layer, whose tracked part is `shape` = `(o, j)`."""

    def __init__(self, layer: LayerSpec, shape: tuple[int, int], rank: int, seed: int, like: Tensor) -> None:
        self.layer = layer
        self._shape = shape
        o, j = shape
        self._sides = Basis(
            _side(j, rank, like, seed, layer.name, "inputs"),
            _side(o // layer.groups, rank, like, seed, layer.name, "outputs"),
        )

    def coordinates(self, captured: CapturedLayer) -> Tensor:
        """φ of each example, `[n, k_b]`."""
        n = captured.gradients.shape[0] // self.layer.groups
        return per_sample_products(*turned_tokens(captured, self._sides)).reshape(n, -1)

    def project(self, rows: Tensor) -> Tensor:
        """`P_outᵀ V P_in` of rows by parameter `[t, P_b]`, `[t, k_b]`."""
        P_in, P_out = self._sides.inputs, self._sides.outputs
        V = layer_matrices(self.layer, rows.to(P_in.dtype), self._shape)
        by_group = V.view(-1, P_out.shape[0], P_in.shape[0])
        width = self.layer.groups * P_out.shape[1] * P_in.shape[1]
        return (P_out.T @ by_group @ P_in).reshape(len(rows), width)

    def back(self, coordinates: Tensor) -> Tensor:
        """`P_out φ P_inᵀ` by parameter, `[t, P_b]`."""
        P_in, P_out = self._sides.inputs, self._sides.outputs
        φ = coordinates.to(P_in.dtype).reshape(-1, P_out.shape[1], P_in.shape[1])
        return layer_columns(self.layer, (P_out @ φ @ P_in.T).reshape(-1, *self._shape))

    def coordinates_of(self, factors: Tensor) -> Tensor:
        """`a` of factors `z = a Sᵀ`; `SᵀS` is a number times the identity."""
        scales = [P.shape[1] / P.shape[0] for P in (self._sides.inputs, self._sides.outputs)]
        return self.project(factors).mul_(scales[0] * scales[1])


def _side(width: int, rank: int, like: Tensor, *key: object) -> Tensor:
    """P, `[width, k]`."""
    if rank >= width:
        return torch.eye(width, dtype=like.dtype, device=like.device)
    rows = orthonormal_rows(rank, width, generator(*key), like)  # type: ignore[arg-type]
    return rows.T.mul((width / rank) ** 0.5).contiguous()
