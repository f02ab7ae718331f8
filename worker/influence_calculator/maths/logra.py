"""LoGra: the empirical Fisher of each layer in a low-rank projection that costs less than the gradient.

`φ_b = S_bᵀ g_b` with a projection S_b of each block; scores are `Σ_b φ_b,test · (F_b + λI)^-1 φ_b,train`,
`F_b = (1/N) Σ φ_b φ_bᵀ`. After Choe et al. 2024 (What is your data worth to GPT?), with random projections:
a layer's is two-sided (`layer_projection`), k numbers of its inputs times k of its outputs, and curvature
between layers counts as zero, as in their code. Parameters that hooks do not capture are projected to k²
numbers, as TRAK does, one block per module. Where k is at least each side of each layer it is the empirical
Fisher method with one block per module.

Shapes: t test examples, n training examples, P_b parameters of block b, k_b ≤ k² columns of its projection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from typing_extensions import override

from influence_calculator.maths.blocks import (
    Regularization,
    checked_regularization,
    names_by_module,
    regularized_layout,
)
from influence_calculator.maths.capture import captured_layers, supported_layers
from influence_calculator.maths.ekfac_passes import matrix_shape
from influence_calculator.maths.gradient_methods import BlockwiseFitted
from influence_calculator.maths.gradients import vmapped_gradients
from influence_calculator.maths.layer_projection import LayerProjection
from influence_calculator.maths.layers import uncaptured_parameters
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.logra_footprint import logra_footprint
from influence_calculator.maths.memory_format import laid_out
from influence_calculator.maths.method import FitPass, FitState, Fitted, Footprint, Method, Part
from influence_calculator.maths.objective import Batch, Objective, TrainingData, batch_size
from influence_calculator.maths.projected_methods import (
    Coordinates,
    FisherPass,
    ProjectedFitted,
    Unprojected,
    coordinates_like,
)
from influence_calculator.maths.projection import Projection
from influence_calculator.maths.seeded_rows import require_rank_and_seed
from influence_calculator.maths.shapes import ModelShapes


@dataclass(frozen=True)
class Logra(Method):
    """`S_b (F_b + λI)^-1 S_bᵀ g` block by block, one block per module, named as the module."""

    regularization: Regularization | None
    """λ ≥ 0: a number, one per block, or `Relative(c)`. None is 0. Projections keep the trace: λ means what
    it means elsewhere."""
    rank: int
    """k of each side of a layer, at least 1."""
    seed: int = 0
    """Of the projections."""
    projected: bool = False
    """Both representations are coordinates, `[t, k_b]`; else factors and gradients by parameter, `[t, P_b]`.
    The same scores."""

    needs_data = False

    def __post_init__(self) -> None:
        checked_regularization(self.regularization)
        require_rank_and_seed(self.rank, self.seed, usual=64)

    def narrow(self) -> Logra:
        """The same in coordinates."""
        return replace(self, projected=True)

    @override
    def looked_at(self, objective: Objective, first: Callable[[], Batch]) -> Objective:
        # Gradients as a whole take a little longer so.
        return laid_out(objective, first) if self.projected else objective

    @override
    def layout(self, objective: Objective) -> Layout:
        layout = regularized_layout(objective, names_by_module(objective.names), self.regularization)
        if not self.projected:
            return layout
        return replace(layout, coordinates=_coordinate_widths(objective, layout, self.rank))

    @override
    def passes(self) -> tuple[FitPass, ...]:
        return (self._fisher,)

    @property
    def _fisher(self) -> LayersPass:
        return LayersPass(self.rank, self.seed)

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None = None) -> Fitted:
        layout = self.layout(objective)
        projections = BlockProjections(objective, self.rank, self.seed)
        solvers = {
            block: self._fisher.solver(objective, state, block, k, self.regularization)
            for block, k in projections.widths.items()
        }
        if self.projected:
            return ProjectedFitted(layout, objective, projections.parts, projections.of_block, solvers)
        wide = {b: Unprojected(projections.of_block[b], solver) for b, solver in solvers.items()}
        return BlockwiseFitted(layout, objective, wide)

    @override
    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        return logra_footprint(shapes, micro_batch, rows, self.rank, self.projected)


@dataclass(frozen=True)
class LayersPass(FisherPass):
    """One block per module."""

    rank: int
    seed: int

    name = "projected_layers"

    @override
    def units(self, objective: Objective) -> tuple[str, ...]:
        return tuple(names_by_module(objective.names))

    @override
    def coordinates(self, objective: Objective) -> tuple[Mapping[str, int], Coordinates]:
        projections = BlockProjections(objective, self.rank, self.seed)
        return projections.widths, projections.parts


class BlockProjections:
    """`S_b` of every block, and what a batch is in them."""

    def __init__(self, objective: Objective, rank: int, seed: int) -> None:
        layout = regularized_layout(objective, names_by_module(objective.names), None)
        like = coordinates_like(objective)
        self.widths = _coordinate_widths(objective, layout, rank)
        """k_b, in the layout's order."""
        self._layers = {
            layer.name: LayerProjection(layer, matrix_shape(objective, layer), rank, seed, like)
            for layer in supported_layers(objective)
        }
        others = names_by_module(uncaptured_parameters(objective))
        self._others = {
            block: Projection(layout.widths[block], rank * rank, _seed_of(seed, block), like)
            for block in others
        }
        self._slots = {slot.name: slot for block in others for slot in layout.slots_of(block)}
        self._specs = tuple(projection.layer for projection in self._layers.values())
        self._like = like
        self.of_block: dict[str, LayerProjection | Projection] = {**self._layers, **self._others}

    def parts(self, objective: Objective, batch: Batch) -> Iterator[Part]:
        """φ of each example, `[n, k_b]`, layer by layer; then of all other modules."""
        for captured in captured_layers(objective, batch, self._specs):
            block = captured.spec.name
            yield Part(block, 0, self._layers[block].coordinates(captured))
        n = batch_size(batch)
        sums = {block: self._like.new_zeros(n, projection.rank) for block, projection in self._others.items()}
        for name, values in vmapped_gradients(objective, batch, tuple(self._slots)):
            slot = self._slots[name]
            self._others[slot.block].add(sums[slot.block], slot.start, values)
        for block, coordinates in sums.items():
            yield Part(block, 0, coordinates)


def _coordinate_widths(objective: Objective, layout: Layout, rank: int) -> dict[str, int]:
    """k_b of every block."""
    widths = {block: min(width, rank * rank) for block, width in layout.widths.items()}
    for layer in supported_layers(objective):
        o, j = matrix_shape(objective, layer)
        widths[layer.name] = layer.groups * min(rank, o // layer.groups) * min(rank, j)
    return widths


def _seed_of(seed: int, block: str) -> int:
    """Of a block's signs: blocks are projected independently of each other."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{block}".encode(), digest_size=8).digest(), "little") >> 1
