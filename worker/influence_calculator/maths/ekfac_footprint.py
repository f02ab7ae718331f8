"""How many bytes EK-FAC takes on the device: formulas from plain sizes, named after what is alive.

Shapes: n examples of a micro-batch, S tokens per example, k groups, o outputs, j inputs of a group (with
a bias one more).
"""

from __future__ import annotations

import math

from influence_calculator.maths.kronecker import PRODUCT_ELEMENTS, turns_tokens
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
    bases = item * sum(_sides(layer) for layer in shapes.layers)
    eigenvalues = row
    largest_layer = item * max((_width(layer) for layer in shapes.layers), default=0)
    by_functions = 2 * item * micro_batch * others
    graph = _graph(shapes, micro_batch)
    drawing = OUTPUT_COPIES_BYTES * micro_batch * shapes.outputs + by_functions
    covariance = item * others + graph + drawing + _covariance(shapes, micro_batch)
    correction = eigenvalues + graph + drawing + _correction(shapes, micro_batch)
    capture = graph + by_functions + _per_sample(shapes, micro_batch)
    return Footprint(
        # Both passes hold one of: the covariances' sums, the bases.
        fit=bases + max(covariance, _eigen(shapes, bases), correction if update_diagonal else 0),
        # While rows are differentiated their gradients; then those and the left representation; then, in
        # place of the gradients, factors by parameter, and of one layer the matrix and a turned copy.
        factors=bases + eigenvalues + rows * row + max(capture, rows * (row + 2 * largest_layer)),
        capture=capture,
        factor_row=row,
        resident=bases + eigenvalues,
        stored=max(bases + item * others, eigenvalues if update_diagonal else 0),
    )


def _inputs(layer: LayerShape) -> int:
    """J."""
    return layer.inputs + int(layer.bias)


def _all_inputs(layer: LayerShape) -> int:
    """Of all groups."""
    return layer.groups * _inputs(layer)


def _width(layer: LayerShape) -> int:
    return _inputs(layer) * layer.outputs


def _sides(layer: LayerShape) -> int:
    """Elements of A and G."""
    return layer.groups * (_inputs(layer) ** 2 + layer.group_outputs**2)


def _graph(shapes: ModelShapes, micro_batch: int) -> int:
    """The examples, the graph, and the gradients that flow back through it."""
    output_gradients = shapes.itemsize * sum(layer.tokens * layer.outputs for layer in shapes.layers)
    example = shapes.example_bytes + 2 * shapes.activation_bytes + output_gradients
    return micro_batch * example


def _per_sample(shapes: ModelShapes, micro_batch: int) -> int:
    """The unfolded inputs of one layer, what turning takes, and its per-sample gradients."""
    item = max(4, shapes.itemsize)
    return item * micro_batch * max((_turning(layer) for layer in shapes.layers), default=0)


def _turning(layer: LayerShape) -> int:
    """Elements per example, by the cheaper way of `kronecker.turned_gradients`."""
    k, inputs = layer.groups, _inputs(layer)
    unfolded = layer.tokens * k * layer.inputs
    if turns_tokens(layer.tokens, layer.group_outputs, inputs):
        return 2 * unfolded + layer.tokens * (k * inputs + layer.outputs) + _width(layer)
    return unfolded + 2 * _width(layer)


def _covariance(shapes: ModelShapes, micro_batch: int) -> int:
    """The unfolded inputs of a layer, the copy with ones, and the output gradients as rows."""
    item = max(4, shapes.itemsize)
    return item * micro_batch * max((_covering(layer) for layer in shapes.layers), default=0)


def _covering(layer: LayerShape) -> int:
    """Elements per example; the examples of each group are put side by side, which takes a copy."""
    copies = 1 if layer.groups == 1 else 2
    return layer.tokens * ((1 + copies) * _all_inputs(layer) + copies * layer.outputs)


def _eigen(shapes: ModelShapes, bases: int) -> int:
    """The state beside the sums, and the largest eigenproblem."""
    sides = [layer.groups * max(_inputs(layer), layer.group_outputs) ** 2 for layer in shapes.layers]
    return bases + EIGENPROBLEM_COPIES * 8 * max(sides, default=0)


def _correction(shapes: ModelShapes, micro_batch: int) -> int:
    """The rotated inputs and output gradients of a layer, and the per-sample gradients formed at once."""
    item = max(4, shapes.itemsize)
    return item * max((_rotated(layer, micro_batch) for layer in shapes.layers), default=0)


def _rotated(layer: LayerShape, micro_batch: int) -> int:
    rotated = micro_batch * layer.tokens * (3 * _all_inputs(layer) + 2 * layer.outputs)
    if layer.tokens == layer.groups == 1:
        return rotated + micro_batch * (_inputs(layer) + layer.outputs)
    products = min(micro_batch, math.ceil(PRODUCT_ELEMENTS / _width(layer))) * _width(layer)
    return rotated + products
