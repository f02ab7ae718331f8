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


def capture_bytes(shapes: ModelShapes, micro_batch: int, width: int) -> int:
    """Differentiating one micro-batch: the examples, activations and their gradients, gradients.

    The per-sample gradients count twice: as they are formed and as the score's or the sum's operand.
    """
    graph = 2 * shapes.activation_bytes + shapes.example_bytes
    return micro_batch * (graph + 2 * row_bytes(shapes, width))


def workspace(shapes: ModelShapes, micro_batch: int) -> int:
    """Directional derivatives: the graph of the first backward, and the directions at once.

    At least one direction goes through, whatever it takes; else as many as `WORKSPACE_BYTES` allows,
    of which the largest (a GPU's) is counted.
    """
    one = GRAPH_COPIES * micro_batch * shapes.activation_bytes + 4 * shapes.width * shapes.itemsize
    graph = micro_batch * (2 * shapes.activation_bytes + shapes.example_bytes)
    return graph + max(one, max(WORKSPACE_BYTES.values()))
