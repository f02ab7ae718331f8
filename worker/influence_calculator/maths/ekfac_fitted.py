"""Fitted EK-FAC: gradients turned into each layer's eigenbasis, where the inverse is a division.

The representations stay in that basis: turning what a layer captured costs `2(o² + j²)` per token,
turning factors back `2oj(o + j)` per test example, which only those who ask for factors pay.

Shapes: n, t examples, o outputs, j inputs (with a bias one more), P_b = o·j parameters of block b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.capture import captured_layers
from influence_calculator.maths.gradient_methods import solve_by_block
from influence_calculator.maths.gradients import accumulation_dtype, vmapped_gradients
from influence_calculator.maths.kronecker import (
    DiagonalSolver,
    LayerRows,
    turned_gradients,
    turned_in_pieces,
)
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import Fitted, Part, Solved
from influence_calculator.maths.objective import Batch, Objective


class EkfacFitted(Fitted):
    """Scores in the eigenbases: `left = Qᵀg / (Λ + λ)`, `right = Qᵀg`; `Q = I` outside of layers."""

    def __init__(
        self,
        layout: Layout,
        objective: Objective,
        layers: Mapping[str, LayerRows],
        solvers: Mapping[str, DiagonalSolver],
    ) -> None:
        """`layers` by block, without the blocks that are diagonal as they are; `solvers` of every block."""
        self.layout = layout
        self.objective = objective
        self._layers = layers
        self._solvers = solvers
        self._specs = tuple(rows.layer for rows in layers.values())
        captured = {name for spec in self._specs for name in spec.parameters}
        self._others = {slot.name: slot for slot in layout.slots if slot.name not in captured}

    @override
    def gradients(self, objective: Objective, batch: Batch) -> Left:
        pieces: dict[str, list[Part]] = {block: [] for block in self.layout.blocks}
        for layer in captured_layers(objective, batch, self._specs):
            block = layer.spec.name
            pieces[block].append(Part(block, 0, turned_gradients(layer, self._layers[block].basis)))
        for part in self._diagonal(objective, batch):
            pieces[part.block].append(part)
        return {block: _joined(pieces.pop(block)) for block in self.layout.blocks}

    def solve(self, gradients: Left) -> Solved:
        return solve_by_block(self._solvers, gradients)

    @override
    def right(self, batch: Batch) -> Iterator[Part]:
        for layer in captured_layers(self.objective, batch, self._specs):
            block = layer.spec.name
            for row, values in turned_in_pieces(layer, self._layers[block].basis):
                yield Part(block, 0, values, row)
        yield from self._diagonal(self.objective, batch)

    def _diagonal(self, objective: Objective, batch: Batch) -> Iterator[Part]:
        for name, values in vmapped_gradients(objective, batch, tuple(self._others)):
            slot = self._others[name]
            yield Part(slot.block, slot.start, values.to(accumulation_dtype(values.dtype)))

    def factors(self, left: Left) -> Left:
        return {
            block: self._layers[block].turned_back(rows) if block in self._layers else rows
            for block, rows in left.items()
        }

    def left(self, factors: Left) -> Left:
        return {
            block: self._layers[block].turned(rows) if block in self._layers else rows
            for block, rows in factors.items()
        }


def _joined(parts: list[Part]) -> Tensor:
    """The columns of one block side by side; a layer's are one part already."""
    if len(parts) == 1:
        return parts[0].values
    return torch.cat([part.values for part in sorted(parts, key=lambda part: part.start)], dim=1)
