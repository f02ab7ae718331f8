"""How many bytes the methods in gradient space take on the device: formulas from plain sizes.

The terms are named after what is alive at the moment of the largest use. A test compares the sums
with what a process measured.
"""

from __future__ import annotations

import math

from influence_calculator.maths.blocks import BlockStructure, names_of_blocks
from influence_calculator.maths.directional import GRAPH_COPIES, WORKSPACE_BYTES
from influence_calculator.maths.shapes import ModelShapes


def block_widths(shapes: ModelShapes, structure: BlockStructure) -> list[int]:
    """P_b of every block."""
    sizes = {name: math.prod(shape) for name, shape in shapes.parameters.items()}
    blocks = names_of_blocks(tuple(sizes), structure)
    return [sum(sizes[name] for name in names) for names in blocks.values()]


def row_bytes(shapes: ModelShapes, width: int) -> int:
    """A gradient or factor of one example; half precision is kept as float32."""
    return width * max(4, shapes.itemsize)


def capture_bytes(shapes: ModelShapes, micro_batch: int) -> int:
    """Differentiating one micro-batch of which one captured layer's gradients live at a time.

    The examples, the activations and their gradients; of the largest captured layer the inputs and
    output gradients by tokens and the per-sample gradients; those of all other parameters at once.
    """
    layers = [
        layer.inputs * layer.outputs + layer.tokens * (layer.groups * layer.inputs + layer.outputs)
        for layer in shapes.layers
    ]
    captured = sum((layer.inputs + layer.bias) * layer.outputs for layer in shapes.layers)
    elements = max(layers, default=0) + max(0, shapes.width - captured)
    return micro_batch * (graph_bytes(shapes) + elements * max(4, shapes.itemsize))


def collect_bytes(shapes: ModelShapes, micro_batch: int, width: int) -> int:
    """The same with all gradients `[n, P]` side by side, as the empirical Fisher takes them."""
    return capture_bytes(shapes, micro_batch) + micro_batch * row_bytes(shapes, width)


def gathered_bytes(shapes: ModelShapes, micro_batch: int, rows: int, width: int) -> int:
    """Gradients `[rows, P]` of examples that are differentiated one micro-batch after another.

    Beside them the last micro-batch, or where there are several all of them once more, joined.
    """
    return joined_bytes(
        rows * row_bytes(shapes, width), capture_bytes(shapes, min(micro_batch, rows)), rows > micro_batch
    )


def joined_bytes(gradients: int, capture: int, several: bool) -> int:
    """The same of what a method takes in place of gradients, and of what it differentiates them with."""
    return gradients + max(gradients if several else 0, capture)


def graph_bytes(shapes: ModelShapes) -> int:
    """Of one example: itself, its activations and their gradients."""
    return 2 * shapes.activation_bytes + shapes.example_bytes


def workspace(shapes: ModelShapes, micro_batch: int) -> int:
    """Directional derivatives: the graph of the first backward, and the directions at once.

    At least one direction goes through, whatever it takes; else as many as `WORKSPACE_BYTES` allows,
    of which the largest (a GPU's) is counted.
    """
    one = GRAPH_COPIES * micro_batch * shapes.activation_bytes + 4 * shapes.width * shapes.itemsize
    return micro_batch * graph_bytes(shapes) + max(one, max(WORKSPACE_BYTES.values()))
