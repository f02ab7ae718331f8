"""What a user's entry point returns, and how it is found.

`InfluenceTask` is the whole of what a job must be told in code: a trained model, a loss, training data
and test data. The driver imports the entry point and never calls it; every worker calls it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from influence_calculator.maths.checkpoints import Checkpoint
from influence_calculator.maths.objective import Batch


class DataSource(Protocol):
    """Random access to examples, in a fixed order.

    `read(start, stop)` returns a batch: a pytree of CPU tensors with `stop - start` entries each, the
    same for the same indices whenever and wherever it is called.
    """

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Batch: ...


@dataclass(frozen=True)
class InfluenceTask:
    """A trained model and the data to trace it to.

    Sign and scale: a score is `g_test · (H + λI)^-1 g_train`. Positive means that the training example
    helps: removing it raises the test loss by about score / N.
    """

    model: nn.Module
    loss: Callable[[Any, Batch], Tensor]
    """`loss(outputs, batch)`: the training loss, reduced in any way; applied to one example at a time."""
    train: DataSource
    test: DataSource
    measurement: Callable[[Any, Batch], Tensor] | None = None
    """Replaces the loss on the test side; positive then means: more weight on the example lowers it."""
    forward: Callable[[nn.Module, Batch], Any] | None = None
    """`forward(model, batch) -> outputs`; default `model(batch[0])`."""
    parameters: str | None = None
    """Regular expression (search) that selects the tracked parameters; default: all that require grad."""
    annotate: Callable[[Batch, Any], Mapping[str, Tensor]] | None = None
    """`annotate(batch, outputs) -> {name: one value per example}`, stored as `test_<name>` and `train_…`."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """What method TracIn sums over; the model itself counts only if its state is among them. Other methods
    leave them alone."""
    data_version: str | None = None
    """Names the data's version; without it 64 fixed examples are digested."""
