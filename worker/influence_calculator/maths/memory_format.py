"""Whether convolutions are captured with channels last in memory, which a processor is faster with.

Their inputs are then gathered along what lies side by side, and the kernels of convolutions read and write
vectors of channels. A model may rely on the memory that tensors have: it may take a view of a convolution's
outputs, which those with channels last do not have, or read it as it lies. So two examples are tried first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_calculator.maths.capture import (
    captured_gradients,
    kernel_taps,
    of_the_losses,
    record,
    supported_layers,
)
from influence_calculator.maths.objective import Batch, Objective, slice_batch
from influence_calculator.maths.one_by_one import tolerance


def laid_out(objective: Objective, first: Callable[[], Batch]) -> Objective:
    """The objective with `channels_last` where it is faster and captures the same of the first example."""
    plain, tried = (replace(objective, channels_last=last) for last in (False, True))
    if objective.device.type != "cpu" or objective.dtype != torch.float32:
        return plain
    if all(kernel_taps(tried, layer) is None for layer in supported_layers(tried)):
        return plain
    # Of one example alone more views can be taken than of several.
    twice = pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]), slice_batch(first(), 0, 1))
    return tried if _capture_the_same(plain, tried, twice) else plain


def _capture_the_same(plain: Objective, tried: Objective, batch: Batch) -> bool:
    expected = list(captured_gradients(plain, batch))
    recording = record(tried, batch)
    if not recording.channels_last:
        return False
    try:
        found = [pair for layer in of_the_losses(recording, tried, batch) for pair in layer.per_sample()]
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # Whatever is said of the form of tensors; as they usually are the model has just answered.
        return False
    return all(_close(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))


def _close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= tolerance(expected.dtype) * float(expected.norm())
