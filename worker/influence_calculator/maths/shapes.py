"""The sizes of a model that a plan of work is made from: plain numbers, no tensors.

Measured once by the process that loads the model first (`measure` in `capture`), stored with the
plan, and read by every `footprint`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One layer that hooks capture: activations `[n·k, S, i]`, output gradients `[n·k, S, o/k]`."""

    name: str
    inputs: int
    """i: columns of the weight as a matrix (of a convolution a group's channels × kernel), without the bias;
    0 if the weight is not tracked."""
    outputs: int
    """o."""
    tokens: int
    """S: positions per example over all calls (1 for a plain Linear, output positions for convolutions)."""
    bias: bool
    """Whether a bias is tracked."""
    groups: int = 1
    """k: of a grouped convolution."""

    @property
    def group_outputs(self) -> int:
        """Rows of the weight in one group, `o / k`."""
        return self.outputs // self.groups


@dataclass(frozen=True)
class EmbeddingShape:
    """One embedding that EK-FAC treats."""

    name: str
    rows: int
    """V."""
    columns: int
    """o."""
    tokens: int
    """S: positions per example over all calls."""

    @property
    def weight(self) -> str:
        """Name of the table."""
        return f"{self.name}.weight" if self.name else "weight"


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of the tracked part of a model and of one example."""

    parameters: dict[str, tuple[int, ...]]
    """Tracked parameters in order: name -> shape."""
    layers: tuple[LayerShape, ...]
    itemsize: int
    """Bytes of one parameter element."""
    model_bytes: int
    """All parameters and buffers, those of checkpoints included."""
    activation_bytes: int
    """What a forward pass keeps alive for ONE example: its graph, the inputs of layers, the outputs."""
    example_bytes: int
    """One training example as a batch entry."""
    outputs: int
    """Elements of the model's outputs for one example."""
    embeddings: tuple[EmbeddingShape, ...] = ()
    """Tracked embeddings with weights of their own."""
    checkpoints: int = 0
    """C: states of the model that scores are summed over; 0 for methods that differentiate the model."""

    @property
    def width(self) -> int:
        """P."""
        total = 0
        for shape in self.parameters.values():
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total
