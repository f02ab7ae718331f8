"""The curvature of `nll_loss`, which a loss of log-probabilities alone does not show.

`nll_loss` is linear in its input u: where the model itself ends with `log_softmax`, the loss's second
derivative by the model's outputs is 0, and with it the generalized Gauss-Newton matrix. But u is no free
variable: `Σ exp(u) = 1`. Off that surface the loss may be continued in any way, and

    −u_y + Σ_c exp(u_c) − 1

has the second derivative diag(p), p = exp(u), with which `Jᵀ diag(p) J` is the Fisher matrix, the same as
that of cross-entropy by what `log_softmax` was given: `(I − p 1ᵀ) diag(p) (I − 1 pᵀ) = diag(p) − p pᵀ`. Where
the loss itself calls `log_softmax` right before, what is added is 0 for all of its inputs, and nothing
changes. An input that holds no log-probabilities, where `nll_loss` picks one of other numbers, is left alone.

Shapes: C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from influence_calculator.maths.objective import Batch, Loss, Objective
from influence_calculator.maths.vmapped_losses import class_dimension, gathered, labels_of, picked, reduced

ROUNDING = 1e-5
"""Of the logarithm of a sum of probabilities."""

ROUNDING_OF_HALVES = 0.1
"""The same in half precision."""


def continued(objective: Objective) -> Objective:
    """The objective with `nll_loss`, wherever its loss calls it, continued as above: the same values, at
    log-probabilities, and another second derivative.
    """
    return objective.with_loss(_Continued(objective.loss))


def continued_function(func: Callable[..., Any]) -> Callable[..., Any]:
    """What does under vmap what this function of torch does, `nll_loss` continued."""
    return _nll_loss if func is F.nll_loss else gathered(func)


def are_log_probabilities(input: Tensor, classes: int) -> Tensor:
    """Whether `Σ exp(u)` over the dimension of classes is 1 but for rounding, at each of the others."""
    rounding = ROUNDING if torch.finfo(input.dtype).bits >= 32 else ROUNDING_OF_HALVES
    return input.detach().logsumexp(classes).abs() < rounding


def counts_of(log_p: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """How often each label counts: its class's weight, 0 if it is ignored; shaped as `target`."""
    counted = (target != ignore_index).to(log_p.dtype)
    if weight is None:
        return counted
    return counted * weight.to(log_p.dtype)[torch.where(target == ignore_index, 0, target)]


@dataclass(frozen=True)
class _Continued:
    loss: Loss

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        with _Continuation():
            return self.loss(outputs, batch)


class _Continuation(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return continued_function(func)(*args, **(kwargs or {}))


def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    target = labels_of(input, target)
    counts = counts_of(input, target, weight, ignore_index)
    classes = class_dimension(input)
    are_log_p = are_log_probabilities(input, classes)
    # What is not taken must not overflow either.
    p = torch.where(are_log_p.unsqueeze(classes), input, 0).exp()
    losses = picked(input, target, ignore_index, "none") + torch.where(are_log_p, p.sum(classes) - 1, 0)
    return reduced(counts * losses, counts, reduction)
