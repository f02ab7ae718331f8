"""How many bytes EK-FAC takes on the device: formulas from plain sizes, named after what is alive.

Shapes: n examples of a micro-batch, S tokens per example, k groups, o outputs, j inputs of a group (with
a bias one more). Of embeddings: V rows, o columns, S positions per example.
"""

from __future__ import annotations

from influence_calculator.maths.embeddings import examples_at_once
from influence_calculator.maths.kronecker import PRODUCT_ELEMENTS, turns_tokens
from influence_calculator.maths.method import GATHERED_ELEMENTS, Footprint
from influence_calculator.maths.shapes import EmbeddingShape, LayerShape, ModelShapes

OUTPUT_COPIES_BYTES = 24
"""Per output element: signs, in int64 when they are made, probabilities, their roots and pseudo-gradients."""

LOOKUP_COPIES = 3
"""Of the gradients by what one embedding looks up: turned, in order, summed."""

EIGENPROBLEM_COPIES = 5
"""Of the largest covariance in float64: the matrix, its eigenvectors and the solver's workspace."""


def ekfac_footprint(
    shapes: ModelShapes, micro_batch: int, rows: int, update_diagonal: bool, diagonal: bool
) -> Footprint:
    """Bytes above the model; `diagonal`: parameters outside of layers get a diagonal."""
    item = max(4, shapes.itemsize)
    captured = sum(_width(layer) for layer in shapes.layers)
    captured += sum(embedding.rows * embedding.columns for embedding in shapes.embeddings)
    others = shapes.width - captured if diagonal else 0
    row = item * (captured + others)
    bases = item * sum(_sides(layer) for layer in shapes.layers) + _embedding_bases(shapes)
    eigenvalues = row
    largest_layer = item * max((_width(layer) for layer in shapes.layers), default=0)
    by_functions = 2 * item * micro_batch * others
    graph = _graph(shapes, micro_batch)
    # Embeddings are traced once the graph of the layers is gone.
    looked_up = _lookups(shapes, micro_batch, graph)
    # What is sent back through the model is drawn while there is only the graph of the forward pass.
    drawing = _forward(shapes, micro_batch) + OUTPUT_COPIES_BYTES * micro_batch * shapes.outputs
    drawn = graph + item * micro_batch * shapes.outputs
    forming = _in_pieces(shapes, micro_batch)
    covariance = by_functions + max(drawing, drawn + _covariance(shapes, micro_batch), looked_up)
    covariance += item * others
    correction = eigenvalues + by_functions + max(drawing, drawn + forming, looked_up)
    capture = _differentiated(shapes, micro_batch, others, forming)
    few = min(micro_batch, rows)
    whole = _differentiated(shapes, few, others, _per_sample(shapes, few))
    return Footprint(
        # Both passes hold one of: the covariances' sums, the bases.
        fit=bases + max(covariance, _eigen(shapes, bases), correction if update_diagonal else 0),
        # While rows are differentiated their gradients; then those and the left representation.
        factors=bases + eigenvalues + rows * row + max(whole, rows * row),
        # Then, in place of the gradients, of one layer the factors by parameter and a copy on the way to them
        # (an embedding's rows are turned as they are).
        by_parameter=bases + eigenvalues + rows * (row + 2 * largest_layer),
        capture=capture,
        factor_row=row,
        resident=bases + eigenvalues,
        stored=max(bases + item * others, eigenvalues if update_diagonal else 0),
    )


def _embedding_bases(shapes: ModelShapes) -> int:
    """G of each embedding, and its tokens' frequencies in float64."""
    item = max(4, shapes.itemsize)
    return sum(item * e.columns**2 + 8 * e.rows for e in shapes.embeddings)


def _lookups(shapes: ModelShapes, micro_batch: int, graph: int) -> int:
    """Gradients by what embeddings look up, beside the graph they come from, then what one is turned into."""
    if not shapes.embeddings:
        return 0
    item = max(4, shapes.itemsize)
    each = [micro_batch * e.tokens * e.columns for e in shapes.embeddings]
    scored = max(_scored(e, micro_batch) for e in shapes.embeddings)
    return item * sum(each) + max(graph, item * (LOOKUP_COPIES * max(each) + scored))


def _scored(embedding: EmbeddingShape, micro_batch: int) -> int:
    """Elements of the rows that are scored at once, without tokens that none of their examples holds."""
    p = min(micro_batch, examples_at_once(embedding.tokens, embedding.columns))
    return p * rows_scored_at_once(embedding, micro_batch) * embedding.columns + GATHERED_ELEMENTS


def rows_scored_at_once(embedding: EmbeddingShape, micro_batch: int) -> int:
    """Of the V rows those that examples scored together may hold, at most."""
    p = min(micro_batch, examples_at_once(embedding.tokens, embedding.columns))
    return min(p * embedding.tokens, embedding.rows)


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


def _forward(shapes: ModelShapes, micro_batch: int) -> int:
    """The examples, and the graph that a forward pass leaves."""
    return micro_batch * (shapes.example_bytes + shapes.activation_bytes)


def _graph(shapes: ModelShapes, micro_batch: int) -> int:
    """The examples, the graph, and the gradients that flow back through it."""
    output_gradients = shapes.itemsize * sum(layer.tokens * layer.outputs for layer in shapes.layers)
    return _forward(shapes, micro_batch) + micro_batch * (shapes.activation_bytes + output_gradients)


def _differentiated(shapes: ModelShapes, micro_batch: int, others: int, forming: int) -> int:
    """Gradients of examples, `forming` what the layers take beside the graph; embeddings come after it."""
    graph, by_functions = _graph(shapes, micro_batch), 2 * max(4, shapes.itemsize) * micro_batch * others
    return by_functions + max(graph + forming, _lookups(shapes, micro_batch, graph))


def _per_sample(shapes: ModelShapes, micro_batch: int) -> int:
    """The unfolded inputs of one layer, what turning takes, and its per-sample gradients."""
    item = max(4, shapes.itemsize)
    return item * micro_batch * max((_turning(layer) for layer in shapes.layers), default=0)


def _turning(layer: LayerShape) -> int:
    """Elements per example, by the cheaper way of `kronecker.turned_gradients`."""
    if _turns_tokens(layer):
        return _turned_tokens(layer) + _width(layer)
    return layer.tokens * layer.groups * layer.inputs + 2 * _width(layer)


def _turns_tokens(layer: LayerShape) -> bool:
    return turns_tokens(layer.tokens, layer.group_outputs, _inputs(layer))


def _turned_tokens(layer: LayerShape) -> int:
    """The unfolded inputs of an example, of groups with a copy, and turned inputs and output gradients."""
    copies = 1 if layer.groups == 1 else 2
    return layer.tokens * (copies * layer.groups * layer.inputs + _all_inputs(layer) + layer.outputs)


def _covariance(shapes: ModelShapes, micro_batch: int) -> int:
    """The unfolded inputs of a layer and the output gradients as rows."""
    item = max(4, shapes.itemsize)
    return item * micro_batch * max((_covering(layer) for layer in shapes.layers), default=0)


def _covering(layer: LayerShape) -> int:
    """Elements per example; those of groups get their ones and are then put side by side, which copies."""
    inputs, outputs = (1, 1) if layer.groups == 1 else (3, 2)
    return layer.tokens * (inputs * _all_inputs(layer) + outputs * layer.outputs)


def _eigen(shapes: ModelShapes, bases: int) -> int:
    """The state beside the sums, and the largest eigenproblem."""
    sides = [layer.groups * max(_inputs(layer), layer.group_outputs) ** 2 for layer in shapes.layers]
    sides += [embedding.columns**2 for embedding in shapes.embeddings]
    return bases + EIGENPROBLEM_COPIES * 8 * max(sides, default=0)


def _in_pieces(shapes: ModelShapes, micro_batch: int) -> int:
    """What a layer captured and turned, and the per-sample gradients that are formed at once."""
    item = max(4, shapes.itemsize)
    return item * max((_forming(layer, micro_batch) for layer in shapes.layers), default=0)


def _forming(layer: LayerShape, micro_batch: int) -> int:
    """Elements, by `kronecker.turned_in_pieces`; for one token also the squares of both sides."""
    width = _width(layer)
    at_once = min(micro_batch * width, max(PRODUCT_ELEMENTS, width))
    if _turns_tokens(layer):
        return micro_batch * (_turned_tokens(layer) + layer.tokens * layer.outputs) + at_once
    return micro_batch * layer.tokens * layer.groups * layer.inputs + 2 * at_once
