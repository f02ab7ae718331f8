"""Fitted EK-FAC: gradients turned into each layer's eigenbasis, where the inverse is a division.

The representations stay in that basis: turning what a layer captured costs `2(o² + j²)` per token,
turning factors back `2oj(o + j)` per test example, which only those pay who ask for factors, and layers
of many tokens, whose training gradients are then not turned at all.

Shapes: n, t examples, o outputs, j inputs (with a bias one more), P_b = o·j parameters of block b.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.capture import CapturedLayer, captured_layers
from influence_calculator.maths.embeddings import EmbeddingRows
from influence_calculator.maths.finite import finite_rows, spoil
from influence_calculator.maths.gradient_methods import direct_report, solve_by_block
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.kronecker import (
    DiagonalSolver,
    LayerRows,
    Piece,
    products_in_pieces,
    turned_by_rows,
    turned_gradients,
    turned_in_pieces,
    turned_tokens,
)
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import Compact, CompactFitted, Part, Solved
from influence_calculator.maths.objective import Batch, Objective
from influence_calculator.maths.traced_gradients import TracedGradients, traced_gradients


class EkfacFitted(CompactFitted):
    """Solves in the eigenbases, `Qᵀg / (Λ + λ)`, and scores there, `right = Qᵀg`, or by parameter layer by
    layer; `Q = I` outside of layers.
    """

    def __init__(
        self,
        layout: Layout,
        objective: Objective,
        layers: Mapping[str, LayerRows],
        embeddings: Mapping[str, EmbeddingRows],
        solvers: Mapping[str, DiagonalSolver],
        notes: tuple[str, ...] = (),
    ) -> None:
        """`layers` and `embeddings` by block, the rest being diagonal as it is; `solvers` of every block."""
        self.layout = layout
        self.objective = objective
        self.notes = notes
        self._layers = layers
        self._embeddings = embeddings
        self._lookups = tuple(rows.spec for rows in embeddings.values())
        self._bases: dict[str, LayerRows | EmbeddingRows] = {**layers, **embeddings}
        self._solvers = solvers
        self._specs = tuple(rows.layer for rows in layers.values())
        captured = {name for spec in self._specs for name in spec.parameters}
        captured |= {spec.weight for spec in self._lookups}
        self._others = {slot.name: slot for slot in layout.slots if slot.name not in captured}
        self.forms_pieces = not self._others

    @override
    def gradients(self, objective: Objective, batch: Batch) -> Left:
        pieces: dict[str, list[Part]] = {block: [] for block in self.layout.blocks}
        for layer in captured_layers(objective, batch, self._specs):
            block = layer.spec.name
            pieces[block].append(Part(block, 0, turned_gradients(layer, self._layers[block].basis)))
        traced = self._traced(objective, batch)
        for part in self._diagonal(traced):
            pieces[part.block].append(part)
        for block, seen in traced.lookups.items():
            pieces[block].append(Part(block, 0, self._embeddings[block].gradients(seen)))
        return {block: _joined(pieces.pop(block)) for block in self.layout.blocks}

    def solve(self, gradients: Left) -> Solved:
        return solve_by_block(self._solvers, gradients)

    @override
    def right(self, batch: Batch) -> Iterator[Part]:
        for layer in captured_layers(self.objective, batch, self._specs):
            block = layer.spec.name
            for row, column, values in self._layers[block].right(layer):
                yield Part(block, column, values, row)
        traced = self._traced(self.objective, batch)
        yield from self._diagonal(traced)
        for block, seen in traced.lookups.items():
            yield from self._embeddings[block].parts(seen)

    def _traced(self, objective: Objective, batch: Batch) -> TracedGradients:
        return traced_gradients(objective, batch, tuple(self._others), self._lookups)

    def _diagonal(self, traced: TracedGradients) -> Iterator[Part]:
        for name, slot in self._others.items():
            values = traced.rows.pop(name)
            yield Part(slot.block, slot.start, values.to(accumulation_dtype(values.dtype)))

    @override
    def is_compact(self, columns: int) -> bool:
        per_token = self._compact_columns
        return per_token > 0 and columns < self.layout.width and columns % per_token == 0

    @property
    def _is_captured(self) -> bool:
        """Whether all there is are layers, the columns of each together."""
        return not self._others and not self._embeddings and self.layout.blocks_are_whole

    @cached_property
    def _compact_columns(self) -> int:
        """`Σ (o + j)`, the columns of one token; 0: this model has no compact rows.

        They are output gradients and activations of every token, layer by layer, where those are fewer
        numbers than their products.
        """
        layers = self._layers.values()
        if not self._is_captured or any(rows.basis.groups > 1 or rows.by_parameter for rows in layers):
            return 0
        return sum(sum(rows.basis.matrix_shape) for rows in self._layers.values())

    @override
    def compact(self, objective: Objective, batch: Batch) -> Compact | None:
        if not self._is_captured:
            return None
        sides: dict[str, tuple[Tensor, Tensor]] = {}
        S = 0
        left: Tensor | None = None
        for layer in captured_layers(objective, batch, self._specs):
            rows = self._layers[layer.spec.name]
            S = S or layer.activations.shape[1]
            if (
                left is None
                and S
                and layer.activations.shape[1] == S
                and self.is_compact(S * self._compact_columns)
            ):
                sides[layer.spec.name] = turned_tokens(layer, rows.basis)
                continue
            if left is None:
                n = layer.activations.shape[0] // layer.spec.groups
                left = rows.basis.inputs.new_empty(n, self.layout.width)
                self._expand(left, sides)
            if rows.by_parameter:
                self._solve_by_parameter(left, layer)
            else:
                self._solve_into(left, layer.spec.name, turned_in_pieces(layer, rows.basis))
        if left is None:
            left = torch.cat(
                [side.flatten(1) for block in self.layout.blocks for side in sides[block]], dim=1
            )
        finite = finite_rows(left)
        spoil(left, ~finite)
        return Compact(left, direct_report(finite))

    def _solve_by_parameter(self, left: Tensor, layer: CapturedLayer) -> None:
        """Writes the columns of one layer by parameter, a few examples at a time."""
        block = layer.spec.name
        columns, shifted = self.layout.columns_of(left, block), self._solvers[block].shifted
        rows = self._layers[block]
        for row, _, values in turned_by_rows(layer, rows.basis):
            rows.turned_back(values.div_(shifted), out=columns[row : row + len(values)])

    def _solve_into(self, left: Tensor, block: str, pieces: Iterable[Piece]) -> None:
        """Writes the columns of one layer, piece by piece."""
        columns, shifted = self.layout.columns_of(left, block), self._solvers[block].shifted
        for row, column, values in pieces:
            stop = column + values.shape[1]
            into = columns[row : row + len(values), column:stop]
            torch.div(values, shifted[column:stop], out=into)

    @override
    def expanded(self, rows: Tensor) -> Tensor:
        S = rows.shape[1] // self._compact_columns
        widths = [side for block in self.layout.blocks for side in self._layers[block].basis.matrix_shape]
        pieces = rows.split([S * width for width in widths], dim=1)
        sides = iter([piece.unflatten(1, (S, width)) for piece, width in zip(pieces, widths, strict=True)])
        left = rows.new_empty(rows.shape[0], self.layout.width)
        self._expand(left, {block: (next(sides), next(sides)) for block in self.layout.blocks})
        return left

    def _expand(self, left: Tensor, sides: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Writes the columns of layers by their turned output gradients and activations."""
        for block, tokens in sides.items():
            self._solve_into(left, block, products_in_pieces(*tokens))

    @override
    def scored(self, left: Left) -> Left:
        return {
            block: self._layers[block].scored(rows) if block in self._layers else rows
            for block, rows in left.items()
        }

    def factors(self, left: Left) -> Left:
        return {
            block: self._bases[block].turned_back(rows) if block in self._bases else rows
            for block, rows in left.items()
        }

    def left(self, factors: Left) -> Left:
        return {
            block: self._bases[block].turned(rows) if block in self._bases else rows
            for block, rows in factors.items()
        }


def _joined(parts: list[Part]) -> Tensor:
    """The columns of one block side by side; a layer's are one part already."""
    if len(parts) == 1:
        return parts[0].values
    return torch.cat([part.values for part in sorted(parts, key=lambda part: part.start)], dim=1)
