"""How many bytes EK-FAC takes on the device: formulas from plain sizes, named after what is alive.

Shapes: n examples of a micro-batch, S tokens per example, o outputs, j inputs (with a bias one more).
"""

from __future__ import annotations

import math

from influence_calculator.maths.kronecker import PRODUCT_ELEMENTS
from influence_calculator.maths.method import Footprint
from influence_calculator.maths.shapes import LayerShape, ModelShapes

OUTPUT_COPIES_BYTES = 40
"""Per output element: probabilities, their cumulative sums in int64, draws and pseudo-gradients."""

EIGENPROBLEM_COPIES = 5
"""Of the largest covariance in float64: the matrix, its eigenvectors and the solver's workspace."""


def ekfac_footprint(
    shapes: ModelShapes, micro_batch: int, rows: int, update_diagonal: bool, diagonal: bool
) -> Footprint:
    """Bytes above the model; `diagonal`: parameters outside of layers get a diagonal."""
    item = max(4, shapes.itemsize)
    captured = sum(_width(layer) for layer in shapes.layers)
    others = shapes.width - captured if diagonal else 0
    row = item * (captured + others)
    bases = item * sum(_inputs(layer) ** 2 + layer.outputs**2 for layer in shapes.layers)
    eigenvalues = row
    largest_layer = item * max((_width(layer) for layer in shapes.layers), default=0)
    by_functions = 2 * item * micro_batch * others
    graph = _graph(shapes, micro_batch)
    covariance = (
        bases
        + item * others
        + max(graph + by_functions + _covariance(shapes, micro_batch), _eigen(shapes, bases))
    )
    correction = bases + eigenvalues + graph + _correction(shapes, micro_batch)
    capture = graph + by_functions + 2 * micro_batch * largest_layer
    return Footprint(
        fit=max(covariance, correction if update_diagonal else 0),
        # Gradients and factors of all rows; of the largest layer its matrix and three rotated copies.
        factors=bases + eigenvalues + rows * (2 * row + 4 * largest_layer) + capture,
        capture=capture,
        factor_row=row,
    )


def _inputs(layer: LayerShape) -> int:
    """J."""
    return layer.inputs + int(layer.bias)


def _width(layer: LayerShape) -> int:
    return _inputs(layer) * layer.outputs


def _graph(shapes: ModelShapes, micro_batch: int) -> int:
    """The examples, the graph, the gradients that flow back through it, and what drawing outputs takes."""
    output_gradients = shapes.itemsize * sum(layer.tokens * layer.outputs for layer in shapes.layers)
    example = shapes.example_bytes + 2 * shapes.activation_bytes + output_gradients
    return micro_batch * (example + OUTPUT_COPIES_BYTES * shapes.outputs)


def _covariance(shapes: ModelShapes, micro_batch: int) -> int:
    """The unfolded inputs of a layer, the copy with ones, and the output gradients as rows."""
    item = max(4, shapes.itemsize)
    tokens = [layer.tokens * (2 * _inputs(layer) + layer.outputs) for layer in shapes.layers]
    return item * micro_batch * max(tokens, default=0)


def _eigen(shapes: ModelShapes, bases: int) -> int:
    """The state beside the sums, and the largest eigenproblem."""
    sides = [max(_inputs(layer), layer.outputs) for layer in shapes.layers]
    return bases + EIGENPROBLEM_COPIES * 8 * max(sides, default=0) ** 2


def _correction(shapes: ModelShapes, micro_batch: int) -> int:
    """The rotated inputs and output gradients of a layer, and the per-sample gradients formed at once."""
    item = max(4, shapes.itemsize)
    return item * max((_rotated(layer, micro_batch) for layer in shapes.layers), default=0)


def _rotated(layer: LayerShape, micro_batch: int) -> int:
    rotated = micro_batch * layer.tokens * (3 * _inputs(layer) + 2 * layer.outputs)
    if layer.tokens == 1:
        return rotated + micro_batch * (_inputs(layer) + layer.outputs)
    products = min(micro_batch, math.ceil(PRODUCT_ELEMENTS / _width(layer))) * _width(layer)
    return rotated + products
