"""The algebra of a curvature that is diagonal in a Kronecker-factored basis, one layer at a time.

A layer's gradient as a matrix `V` is `[o, j]`: its weight's columns, then its bias. The curvature is
`(Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ`, so that

    (H + λI)^-1 V = Q_G ( (Q_Gᵀ V Q_A) / (Λ + λ) ) Q_Aᵀ.

What is scored stays turned, `Q_Gᵀ V Q_A`, where the inverse is a division: products of two turned
gradients are those of the gradients, since the basis is orthogonal. Where turning the training set costs
more than turning the test side back, gradients of both are scored by parameter.

Shapes: N examples that were fitted, n, t examples, S tokens, o outputs, i inputs, j = i + 1 with a bias,
P_b = o·j.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from influence_calculator.maths.capture import CapturedLayer, by_channel, by_tap, per_sample_products
from influence_calculator.maths.errors import NotFiniteError, SingularCurvatureError
from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.layers import LayerSpec
from influence_calculator.maths.method import SolverReport
from influence_calculator.maths.singularity import is_singular, rounding_of_squares

PRODUCT_ELEMENTS = 1 << 24
"""Of per-sample gradients, formed at once: 64 MiB in float32."""

CACHED_ELEMENTS = 3 << 20
"""The same on a processor, 12 MiB in float32: they are read again while its cache holds them."""

OUTPUTS = 32
"""A multiple of this many outputs' gradients is formed at once: of others, products are slow."""

TEST_EXAMPLES = 256
"""That a training set is taken to be scored against at once, where its gradients are turned or not."""

COVARIANCE_COLUMNS = 128
"""Of a covariance, summed at once on a processor, which thus leaves out most of the upper triangle."""


def extended_activations(layer: CapturedLayer, dtype: torch.dtype) -> Tensor:
    """`ã = [a, 1]`, `[n·k, S, j]`: only the part whose parameters are tracked."""
    a = layer.activations.to(dtype)
    if layer.spec.bias is None:
        return a
    ones = a.new_ones(*a.shape[:2], 1)
    return ones if layer.spec.weight is None else torch.cat([a, ones], dim=2)


def add_products(total: Tensor, tokens: Tensor) -> None:
    """`total += Σ_n Σ_s u uᵀ` over the tokens u of `[n·k, S, w]`, for each group of `[k, w, w]`.

    At least its lower triangle: `mirror` makes the upper one of it when all is added.
    """
    if total.dim() == 2:
        _add_symmetric(total, _rows(tokens))
        return
    k = total.shape[0]
    rows = tokens.unflatten(0, (-1, k)).transpose(0, 1).flatten(1, 2)
    total.baddbmm_(rows.mT, rows)


def add_activations(total: Tensor, layer: CapturedLayer) -> None:
    """`total += Σ_n Σ_s ã ãᵀ`, `[j, j]`, or `[k, j, j]` of k groups; as `add_products`."""
    if layer.spec.weight is None or layer.spec.bias is None or total.dim() == 3:
        add_products(total, extended_activations(layer, total.dtype))
        return
    # Of the ones come a row, a column and a number: no copy of the activations with ones is made.
    rows = _rows(layer.activations.to(total.dtype))
    _add_symmetric(total[:-1, :-1], rows)
    sums = rows.sum(0)
    total[-1, :-1] += sums
    total[:-1, -1] += sums
    total[-1, -1] += len(rows)


def tapped(layer: LayerSpec, Q_A: Tensor, taps: int) -> Tensor:
    """Rows `[j, …]` in the order of the weight's columns, by tap of the kernel, then by channel."""
    return Q_A[_reordered(by_tap, layer, Q_A, taps)] if taps > 1 else Q_A


def untapped(layer: LayerSpec, total: Tensor, taps: int) -> Tensor:
    """`Σ ã ãᵀ`, `[j, j]`, of inputs by tap, then by channel, in the order of the weight's columns."""
    order = _reordered(by_channel, layer, total, taps)
    return total[order][:, order]


def _reordered(order: Callable[[Tensor, int], Tensor], layer: LayerSpec, matrix: Tensor, taps: int) -> Tensor:
    """Rows of `[j, …]` in that order, the bias's last."""
    rows = torch.arange(len(matrix), device=matrix.device)
    i = len(matrix) - (layer.bias is not None)
    return torch.cat([order(rows[:i], taps), rows[i:]])


def _rows(tokens: Tensor) -> Tensor:
    """`[n·k, S, w]` as `[n·k·S, w]`: a view, or a copy that runs along what lies side by side in memory."""
    if tokens.stride(2) == 1 or tokens.stride(1) != 1:
        return tokens.flatten(0, 1)
    return tokens.permute(2, 0, 1).flatten(1).T


def _add_symmetric(total: Tensor, rows: Tensor) -> None:
    """`total += Σ u uᵀ` over rows u, its lower triangle and little more, in blocks."""
    w = len(total)
    blocks = max(1, w // COVARIANCE_COLUMNS) if total.device.type == "cpu" else 1
    for start, stop in pairwise(w * block // blocks for block in range(blocks + 1)):
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


def mirror(total: Tensor) -> None:
    """Makes the upper triangle of `[…, w, w]` what the lower one is."""
    w = total.shape[-1]
    for start in range(0, w, COVARIANCE_COLUMNS):
        own = slice(start, start + COVARIANCE_COLUMNS)
        total[..., :start, own] = total[..., own, :start].mT
        diagonal = total[..., own, own]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)


def add_squared_gradients(total: Tensor, layer: CapturedLayer, basis: Basis) -> None:
    """`total += Σ_n (Q_Gᵀ (Σ_s g ãᵀ) Q_A)²` elementwise, `[o, j]`: tokens are summed before squaring."""
    if layer.activations.shape[1] == 1 and basis.groups == 1:
        g, a = turned_tokens(layer, basis)
        total.addmm_(g[:, 0].square().T, a[:, 0].square())
        return
    flat = total.view(-1)
    for _, start, values in turned_in_pieces(layer, basis):
        flat[start : start + values.shape[1]] += values.square_().sum(0)


def eigenbasis(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (at least 0) and eigenvectors, computed in float64, in the dtype of the matrix.

    Raises:
        NotFiniteError: naming `what` holds NaN or infinity.
    """
    if not finite_rows(matrix).all():
        raise NotFiniteError(
            f"{what}: expected finite sums over the training data, got NaN or infinity; "
            "look for training examples whose loss or outputs are not finite"
        )
    wide = matrix.to(torch.float64)
    eigenvalues, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    return eigenvalues.clamp(min=0).to(matrix.dtype), vectors.to(matrix.dtype)


@dataclass(frozen=True)
class Basis:
    """Where a layer's curvature is diagonal."""

    inputs: Tensor
    """`Q_A`, `[k, j, j]`, eigenvectors in columns."""
    outputs: Tensor
    """`Q_G`, `[k, o/k, o/k]`."""
    taps: int = 1
    """K of `Q_A` whose rows, the bias's aside, are by tap of the kernel, then by channel."""

    @property
    def groups(self) -> int:
        """How many matrices stand one below the other."""
        return self.inputs.shape[0] if self.inputs.dim() == 3 else 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(o, j)`."""
        return self.groups * self.outputs.shape[-1], self.inputs.shape[-1]


def turned_tokens(layer: CapturedLayer, basis: Basis) -> tuple[Tensor, Tensor]:
    """`Q_Gᵀ g` and `Q_Aᵀ ã` of every token, `[n·k, S, o/k]` and `[n·k, S, j]`."""
    Q_A, Q_G = basis.inputs, basis.outputs
    g = _times(layer.gradients.to(Q_G.dtype), Q_G)
    if basis.taps != layer.taps:
        assert basis.taps == 1, "what is captured by tap is turned by rows in either order, others are not"
        Q_A = tapped(layer.spec, Q_A, layer.taps)
    if layer.spec.weight is None or layer.spec.bias is None or basis.groups > 1:
        return g, _times(extended_activations(layer, Q_A.dtype), Q_A)
    a = layer.activations.to(Q_A.dtype)
    # The 1 of ã picks the last row of Q_A: no copy of the activations with ones is made.
    turned = torch.addmm(Q_A[-1], _rows(a), Q_A[:-1])
    return g, turned.unflatten(0, a.shape[:2])


def _times(tokens: Tensor, Q: Tensor) -> Tensor:
    """`[n·k, S, w]` times `[k, w, w]`, each group its own matrix."""
    if Q.dim() == 2:
        return (_rows(tokens) @ Q).unflatten(0, tokens.shape[:2])
    by_group = tokens.unflatten(0, (-1, Q.shape[0]))
    return torch.einsum("nksw,kwv->nksv", by_group, Q).flatten(0, 1)


def turned_gradients(layer: CapturedLayer, basis: Basis) -> Tensor:
    """`Q_Gᵀ (Σ_s g ãᵀ) Q_A` of each example as a row, `[n, P_b]`."""
    n = layer.gradients.shape[0] // basis.groups
    if turns_tokens(layer.activations.shape[1], basis.outputs.shape[-1], basis.inputs.shape[-1]):
        return per_sample_products(*turned_tokens(layer, basis)).reshape(n, -1)
    V = _gradient_matrices(layer, basis.inputs.dtype)
    return _turned(V, basis, out=V).reshape(n, -1)


class Piece(NamedTuple):
    """`turned_gradients` of consecutive examples, consecutive columns of them."""

    row: int
    """The first example."""
    column: int
    values: Tensor
    """In memory of its own, which holds until the next piece is asked for."""


def turned_in_pieces(layer: CapturedLayer, basis: Basis) -> Iterator[Piece]:
    """`turned_gradients` in pieces that together are all of them, with memory for one."""
    if basis.groups == 1 and turns_tokens(layer.activations.shape[1], *basis.matrix_shape):
        yield from products_in_pieces(*turned_tokens(layer, basis))
        return
    yield from turned_by_rows(layer, basis)


def turned_by_rows(layer: CapturedLayer, basis: Basis) -> Iterator[Piece]:
    """The same with all columns of the examples of each piece."""
    n = layer.gradients.shape[0] // basis.groups
    o, j = basis.matrix_shape
    rows = max(1, PRODUCT_ELEMENTS // (o * j))
    for row in range(0, n, rows):
        yield Piece(row, 0, turned_gradients(layer.of_examples(row, row + rows), basis))


def gradients_in_pieces(layer: CapturedLayer, dtype: torch.dtype) -> Iterator[Piece]:
    """`CapturedLayer.per_sample` of a layer without groups, the parameters' columns side by side, as
    `turned_in_pieces`.
    """
    g = layer.gradients.to(dtype)
    columns = 0
    if layer.spec.weight is not None:
        a = layer.activations.to(dtype)
        pieces = products_in_pieces(a, g) if layer.spec.transposed else products_in_pieces(g, a)
        yield from pieces if layer.taps == 1 else _by_channel(pieces, layer.taps, a.shape[2])
        columns = g.shape[2] * a.shape[2]
    if layer.spec.bias is not None:
        yield Piece(0, columns, g.sum(1))


def _by_channel(pieces: Iterable[Piece], taps: int, i: int) -> Iterator[Piece]:
    """Pieces of whole outputs, whose i inputs were captured by tap, as the weight's columns are."""
    memory: Tensor | None = None
    for piece in pieces:
        values = piece.values.view(-1, taps, i // taps)
        # As in `products_in_pieces`; the first piece is the largest.
        memory = torch.empty_like(piece.values).flatten() if memory is None else memory
        ordered = memory[: values.numel()].view(piece.values.shape)
        ordered.view(-1, i // taps, taps).copy_(values.mT)
        yield piece._replace(values=ordered)


def products_in_pieces(g: Tensor, a: Tensor) -> Iterator[Piece]:
    """`Σ_s g aᵀ` of `[n, S, o]` and `[n, S, j]`, each example's as a row, in pieces that together are all.

    On a processor small ones, each in the same memory: memory that is fresh at every use, or has left the
    cache, costs as much as the arithmetic.
    """
    (n, _, o), j = g.shape, a.shape[2]
    elements = CACHED_ELEMENTS if g.device.type == "cpu" else PRODUCT_ELEMENTS
    rows = max(1, min(n, elements // (min(o, OUTPUTS) * j)))
    rows = math.ceil(n / math.ceil(n / rows))
    outputs = min(o, OUTPUTS * max(1, elements // (rows * j * OUTPUTS)))
    memory = g.new_empty(rows * outputs * j)
    for row in range(0, n, rows):
        examples = slice(row, row + rows)
        for first in range(0, o, outputs):
            g_piece = g[examples, :, first : first + outputs]
            out = memory[: g_piece.shape[0] * g_piece.shape[2] * j].view(-1, g_piece.shape[2], j)
            yield Piece(row, first * j, per_sample_products(g_piece, a[examples], out=out).flatten(1))


def _gradient_matrices(layer: CapturedLayer, dtype: torch.dtype) -> Tensor:
    """`Σ_s g ãᵀ` of each example, `[n·k, o/k, j]` in the order of what was captured; tokens, of which there
    are many, are not copied.
    """
    g = layer.gradients.to(dtype)
    columns = []
    if layer.spec.weight is not None:
        columns.append(per_sample_products(g, layer.activations))
    if layer.spec.bias is not None:
        columns.append(g.sum(1).unsqueeze(2))
    return torch.cat(columns, dim=2)


def turns_tokens(S: int, o: int, j: int) -> bool:
    """Whether turning S tokens, `2S(o² + j²)`, costs less than turning the products' sum, `2oj(o + j)`."""
    return S * (o * o + j * j) <= o * j * (o + j)


def scores_by_parameter(N: int, S: float, o: int, j: int, k: int) -> bool:
    """Whether gradients are scored by parameter: N training examples are not turned, at `2S(o² + j²)` or
    `2oj(o + j)` each, but `TEST_EXAMPLES` turned back, at `2oj(o + j)` each.

    Not for less than an eighth of what a training example costs beside: its capture, `4ojS`, its gradient,
    `2ojS`, and `2oj` for each score. Nor if there are several groups, k: those are turned for little.
    """
    back = 2 * o * j * (o + j)
    turning = min(2 * S * (o * o + j * j), back)
    beside = 2 * o * j * (3 * S + TEST_EXAMPLES)
    return k == 1 and N * turning >= TEST_EXAMPLES * back and 8 * turning >= beside


def _turned(V: Tensor, basis: Basis, out: Tensor | None = None) -> Tensor:
    """`Q_Gᵀ V Q_A` of `[n·k, o/k, j]`; `out`, which may be V, is memory for it."""
    if basis.groups == 1:
        # Two buffers serve both products: fresh memory costs as much as the arithmetic.
        return torch.matmul(basis.outputs.T, V @ basis.inputs, out=out)
    by_group = V.unflatten(0, (-1, basis.groups))
    return torch.einsum("kop,nkoj,kjl->nkpl", basis.outputs, by_group, basis.inputs)


class LayerRows:
    """Rows `[t, P_b]` of one layer, by parameter and turned into the layer's basis."""

    def __init__(self, layer: LayerSpec, basis: Basis, by_parameter: bool = False) -> None:
        """`by_parameter`: how they are scored; without groups only."""
        self.layer = layer
        self.basis = basis
        self.by_parameter = by_parameter

    def right(self, captured: CapturedLayer) -> Iterator[Piece]:
        """Gradients as they are scored, piece by piece."""
        if self.by_parameter:
            return gradients_in_pieces(captured, self.basis.inputs.dtype)
        return turned_in_pieces(captured, self.basis)

    def scored(self, rows: Tensor) -> Tensor:
        """Turned rows as they are scored."""
        return self.turned_back(rows) if self.by_parameter else rows

    def turned(self, columns: Tensor) -> Tensor:
        """`Q_Gᵀ V Q_A` of rows by parameter."""
        basis = self.basis
        V = layer_matrices(self.layer, columns.to(basis.inputs.dtype), basis.matrix_shape, basis.taps)
        V = V.view(-1, *self._group_shape)
        return _turned(V, basis, out=V).reshape(len(columns), math.prod(basis.matrix_shape))

    def turned_back(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """`Q_G V Q_Aᵀ` by parameter: the inverse of `turned`."""
        back = Basis(self.basis.inputs.mT, self.basis.outputs.mT)
        V = rows.to(back.inputs.dtype).reshape(-1, *self._group_shape)
        matrices = _turned(V, back).reshape(-1, *self.basis.matrix_shape)
        return layer_columns(self.layer, matrices, out, self.basis.taps)

    @property
    def _group_shape(self) -> tuple[int, int]:
        """`(o/k, j)`."""
        return self.basis.outputs.shape[-1], self.basis.inputs.shape[-1]


def layer_matrices(layer: LayerSpec, columns: Tensor, shape: tuple[int, int], taps: int = 1) -> Tensor:
    """Rows by parameter `[t, P_b]` as `[t, o, j]`, in memory of their own; `shape` is `(o, j)`.

    With taps K > 1 the columns of the weight by tap of the kernel, then by channel.
    """
    o, j = shape
    t = columns.shape[0]
    i = j if layer.bias is None else j - 1
    weight, bias = columns[:, : o * i], columns[:, o * i :]
    by_output = weight.reshape(t, i, o).mT if layer.transposed else weight.reshape(t, o, i)
    return torch.cat([by_tap(by_output, taps), bias.reshape(t, o, j - i)], dim=2)


def layer_columns(layer: LayerSpec, matrices: Tensor, out: Tensor | None = None, taps: int = 1) -> Tensor:
    """The inverse of `layer_matrices`; `out` is `[t, P_b]`."""
    t, o, j = matrices.shape
    i = j if layer.bias is None else j - 1
    columns = matrices.new_empty(t, o * j) if out is None else out
    weight = columns[:, : o * i].unflatten(1, (i, o) if layer.transposed else (o, i))
    by_output = by_channel(matrices[:, :, :i], taps)
    weight.copy_(by_output.mT if layer.transposed else by_output)
    columns[:, o * i :].unflatten(1, (o, j - i)).copy_(matrices[:, :, i:])
    return columns


class DiagonalSolver:
    """`g / (Λ + λ)` elementwise, of gradients in the basis in which the curvature is diagonal."""

    def __init__(self, what: str, eigenvalues: Tensor, λ: float, rounding: float | None = None) -> None:
        """`rounding` of the eigenvalues beside the largest; default: they are means of squares."""
        own = rounding_of_squares(eigenvalues.dtype) if rounding is None else rounding
        self._shifted = shifted(eigenvalues, λ, what, own).flatten()

    @property
    def shifted(self) -> Tensor:
        """`Λ + λ`, one entry per column."""
        return self._shifted

    def solve(self, right_hand_sides: Tensor) -> tuple[Tensor, SolverReport]:
        solved = right_hand_sides.to(self._shifted.dtype) / self._shifted
        return solved, SolverReport.exact(right_hand_sides.shape[0])


def shifted(eigenvalues: Tensor, λ: float, what: str, rounding: float) -> Tensor:
    """`Λ + λ`.

    Raises:
        SingularCurvatureError: an entry is 0, or rounding of the largest.
    """
    values = eigenvalues + λ
    if is_singular(values, rounding):
        raise SingularCurvatureError(
            f"{what}: the curvature is 0 in some direction, so that H + λI is singular at λ = {λ:g}; "
            "give a larger regularization, 0.01 is a usual start"
        )
    return values
