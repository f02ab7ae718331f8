"""How many bytes LoGra takes on the device: formulas from plain sizes, named after what is alive.

Shapes: n examples of a micro-batch, S tokens per example, c groups, o outputs, j inputs of a group (with a
bias one more), k columns of each side's projection, P_b parameters and k_b columns of block b.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from influence_calculator.maths.blocks import names_by_module
from influence_calculator.maths.footprints import capture_bytes, graph_bytes, row_bytes
from influence_calculator.maths.method import Footprint
from influence_calculator.maths.projection import projection_bytes
from influence_calculator.maths.shapes import LayerShape, ModelShapes

FLOAT64 = 8
DRAWING_COPIES = 3
"""Of a layer's side while its orthonormal columns are made: the draws, the factor, its workspace."""


def logra_footprint(
    shapes: ModelShapes, micro_batch: int, rows: int, rank: int, projected: bool
) -> Footprint:
    """Bytes above the model; `projected`: representations are coordinates."""
    item = max(4, shapes.itemsize)
    widths = block_ranks(shapes, rank)
    others = [width for width, _ in other_ranks(shapes, rank)]
    matrices, largest = (item * f(k * k for k in widths) for f in (sum, _largest))
    narrow, row = row_bytes(shapes, sum(widths)), row_bytes(shapes, shapes.width)
    sides = [side for layer in shapes.layers for side in _sides(layer, rank)]
    projections = item * sum(sides) + sum(projection_bytes(width, rank * rank, item) for width in others)
    drawing = DRAWING_COPIES * FLOAT64 * _largest(sides)
    capture = _capture(shapes, micro_batch, rank, sum(others))
    widest = row_bytes(shapes, max([_parameters(layer) for layer in shapes.layers] + others))
    factor_row = narrow if projected else row
    differentiated, of_rows = (
        _capture(shapes, n, rank, sum(others)) if projected else capture_bytes(shapes, n)
        for n in (micro_batch, min(micro_batch, rows))
    )
    turned = rows * (narrow + (0 if projected else widest))
    return Footprint(
        # The sums and one batch's part of them.
        fit=2 * matrices + projections + max(drawing, capture),
        # The matrices, their factors and a copy of one while that is made; the gradients, beside them the
        # last micro-batch or the factors, with one block's rows between.
        factors=2 * matrices
        + largest
        + projections
        + rows * factor_row
        + max(drawing, of_rows, rows * factor_row + turned),
        capture=differentiated,
        factor_row=factor_row,
        resident=2 * matrices + projections,
        stored=matrices,
    )


def block_ranks(shapes: ModelShapes, rank: int) -> list[int]:
    """k_b of every block: of the layers, then of the other modules."""
    layers = [_layer_rank(layer, rank) for layer in shapes.layers]
    return layers + [k for _, k in other_ranks(shapes, rank)]


def _layer_rank(layer: LayerShape, rank: int) -> int:
    """k_b of a layer."""
    return layer.groups * min(rank, layer.group_outputs) * min(rank, _inputs(layer))


def _inputs(layer: LayerShape) -> int:
    """J."""
    return layer.inputs + int(layer.bias)


def _parameters(layer: LayerShape) -> int:
    return _inputs(layer) * layer.outputs


def _sides(layer: LayerShape, rank: int) -> tuple[int, int]:
    """Elements of P_in and P_out."""
    j, o = _inputs(layer), layer.group_outputs
    return j * min(rank, j), o * min(rank, o)


def other_ranks(shapes: ModelShapes, rank: int) -> list[tuple[int, int]]:
    """P_b and k_b of the modules that hooks do not capture."""
    captured = {layer.name for layer in shapes.layers}
    sizes = {name: math.prod(shape) for name, shape in shapes.parameters.items()}
    modules = names_by_module(sizes)
    widths = [sum(sizes[n] for n in names) for module, names in modules.items() if module not in captured]
    return [(width, min(width, rank * rank)) for width in widths]


def _capture(shapes: ModelShapes, micro_batch: int, rank: int, others: int) -> int:
    """The graph and the output gradients that flow back; one layer's unfolded inputs and projected tokens;
    all coordinates of the batch; the gradients of the modules that hooks do not capture.
    """
    item = max(4, shapes.itemsize)
    flowing = shapes.itemsize * sum(layer.tokens * layer.outputs for layer in shapes.layers)
    tokens = _largest(_projected_tokens(layer, rank) for layer in shapes.layers)
    coordinates = sum(_layer_rank(layer, rank) for layer in shapes.layers)
    example = graph_bytes(shapes) + flowing + item * (tokens + coordinates + 2 * others)
    return micro_batch * example


def _projected_tokens(layer: LayerShape, rank: int) -> int:
    """Elements per example: the inputs by group, their projections and those of output gradients."""
    c, S = layer.groups, layer.tokens
    return S * c * (layer.inputs + min(rank, _inputs(layer)) + min(rank, layer.group_outputs))


def _largest(values: Iterable[int]) -> int:
    return max(values, default=0)
