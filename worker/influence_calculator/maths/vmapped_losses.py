"""Cross-entropy as vmap takes it without a detour.

torch has no rule for `nll_loss` under vmap and runs a decomposition in Python, which loads sympy: most of a
second in every process that does so. Here the label's log-probability is gathered, with the same result. What
torch refuses without vmap is refused here too, where the decomposition would not: labels of another dtype.

Shapes: n examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class GatheredLosses(TorchFunctionMode):
    """Inside, torch's `cross_entropy` and `nll_loss` gather, however a loss comes to call them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return gathered(func)(*args, **(kwargs or {}))


def gathered(func: Callable[..., Any]) -> Callable[..., Any]:
    """What does the same as this function of torch under vmap; mostly that itself."""
    return _GATHERED.get(func, func)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    is_soft = target.is_floating_point()
    target = target if is_soft else labels_of(input, target)
    deprecated = size_average is not None or reduce is not None
    if weight is not None or deprecated or label_smoothing != 0.0 or is_soft:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    return picked(F.log_softmax(input, dim=class_dimension(input)), target, ignore_index, reduction)


def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    target = labels_of(input, target)
    if weight is not None or size_average is not None or reduce is not None:
        return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    return picked(input, target, ignore_index, reduction)


def labels_of(input: Tensor, target: Tensor) -> Tensor:
    """The labels that `cross_entropy` and `nll_loss` were given, as int64.

    Raises:
        RuntimeError: of a dtype or a shape that torch refuses, in its words.
    """
    if target.dtype == torch.uint8 and input.dim() <= 2:
        target = target.long()
    if target.dtype != torch.int64:
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}")
    positions = list(input.shape)
    del positions[class_dimension(input)]
    if list(target.shape) != positions:
        raise RuntimeError(f"Expected target size {positions}, got {list(target.shape)}")
    return target


def picked(log_p: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Negative log-probabilities of the labels, as `labels_of` gives them, that are not ignored."""
    dimension = class_dimension(log_p)
    counted = target != ignore_index
    labels = torch.where(counted, target, 0).unsqueeze(dimension)
    losses = torch.where(counted, -log_p.gather(dimension, labels).squeeze(dimension), 0.0)
    return reduced(losses, counted, reduction)


def reduced(losses: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """As torch reduces losses of which each counts so much."""
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


def class_dimension(input: Tensor) -> int:
    """Of the input of `cross_entropy` and `nll_loss`."""
    return 0 if input.dim() == 1 else 1


_GATHERED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
}
