"""Losses whose second derivative by the outputs has a closed form, found inside any loss function.

A user's loss may select, reshape and cast before it calls torch's `cross_entropy`, `mse_loss` or
`binary_cross_entropy_with_logits`. The call is seen while the loss runs, so that a user need not name
the loss in a way of ours. It counts if the loss returns what the call returned and if what lies
between the outputs f and the call's input u is linear: then `v_f = J_uᵀ v_u` has the covariance
`∇²_f ℓ` if `v_u` has `∇²_u ℓ`. Anything else is left to the general way (`expectation`).

A draw is `v_u = B ε` with `B Bᵀ = ∇²_u ℓ` and random signs ε. A label y drawn from the prediction gives
`p − e_y`, which has the same covariance, but is almost always 0 and rarely large where the model is sure.
It takes several labels to come as near to the expectation as one draw of signs does.

Shapes: one example at a time, under vmap; u the call's input, C classes, m elements.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from influence_calculator.maths.vmapped_losses import gathered

Signs = Callable[[int], Tensor]
"""m -> ε, `[m]`: ±1 with equal odds."""

_LINEAR = {
    *("clone", "contiguous", "detach", "cpu", "cuda", "to", "type", "bfloat16", "double", "float", "half"),
    *("chunk", "index_select", "narrow", "select", "split", "unbind", "__getitem__", "__get__"),
    *("expand", "flatten", "reshape", "reshape_as", "unflatten", "view", "view_as", "squeeze", "unsqueeze"),
    *("movedim", "permute", "swapaxes", "swapdims", "t", "transpose"),
}
"""Names of torch functions that only move, select or cast elements. `__get__` is a property (`.mT`)."""


class _UnrecognisedError(Exception):
    """Leaves the loss as soon as it is seen that no closed form applies."""


def pseudo_loss(loss: Callable[[], Tensor], leaves: list[Tensor], signs: Signs) -> Tensor | None:
    """`⟨v_u, u⟩` of one example's loss, with a drawn `v_u`, `E[v_u v_uᵀ] = ∇²_u ℓ`; None if not recognised.

    `loss()` computes the example's loss from `leaves`.
    """
    watch = _Watch(leaves, signs)
    try:
        with watch:
            result = loss()
    except _UnrecognisedError:
        return None
    return watch.pseudo if watch.result is not None and result is watch.result else None


class _Watch(TorchFunctionMode):
    """Follows the outputs through a loss function until the call that has a closed form."""

    def __init__(self, leaves: list[Tensor], signs: Signs) -> None:
        super().__init__()
        self._derived = {id(leaf): leaf for leaf in leaves}  # holds them, so that no id is used twice
        self._signs = signs
        self.pseudo: Tensor | None = None
        self.result: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        result = gathered(func)(*args, **keywords)
        if not any(id(leaf) in self._derived for leaf in pytree.tree_leaves((args, dict(keywords)))):
            return result
        closed_form = _CLOSED_FORMS.get(func)
        if closed_form is not None and self.result is None:
            given = inspect.signature(func).bind(*args, **keywords)
            given.apply_defaults()
            if id(given.arguments["target"]) in self._derived:
                raise _UnrecognisedError
            self.pseudo = closed_form(self._signs, **given.arguments)
            self.result = result
            return result
        produced = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (produced and name not in _LINEAR):
            raise _UnrecognisedError
        self._derived |= {id(leaf): leaf for leaf in produced}
        return result


def _cross_entropy(
    signs: Signs,
    *,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    **deprecated: Any,
) -> Tensor:
    """`v = (√p ε − p ⟨√p, ε⟩) √c` at every position that is not ignored.

    c is 1 over the number of such positions for a mean, 1 for a sum.
    """
    plain = weight is None and label_smoothing == 0.0 and not any(v is not None for v in deprecated.values())
    if not plain or target.is_floating_point():
        raise _UnrecognisedError
    logits = input.unsqueeze(0) if input.dim() == 1 else input.movedim(1, -1)
    logits = logits.reshape(-1, logits.shape[-1])
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    signed = p.sqrt() * signs(p.numel()).reshape(p.shape)
    counted = (target.reshape(-1) != ignore_index).to(p.dtype)
    scale = counted / counted.sum().clamp(min=1).sqrt() if reduction == "mean" else counted
    v = (signed - p * signed.sum(-1, keepdim=True)) * scale.unsqueeze(-1)
    return (v.to(logits.dtype) * logits).sum()


def _squared_error(signs: Signs, *, input: Tensor, target: Tensor, reduction: str, **others: Any) -> Tensor:
    """`v = √(2/d) ε` for a mean over d elements, `√2 ε` for a sum."""
    if any(v is not None for v in others.values()) or input.shape != target.shape:
        raise _UnrecognisedError
    d = input.numel() if reduction == "mean" else 1
    v = (2 / d) ** 0.5 * signs(input.numel()).to(input.dtype)
    return (v * input.reshape(-1)).sum()


def _binary_cross_entropy(
    signs: Signs, *, input: Tensor, target: Tensor, reduction: str, **others: Any
) -> Tensor:
    """`v = √(p (1 − p) / d) ε`, d = 1 for a sum."""
    if any(v is not None for v in others.values()) or input.shape != target.shape:
        raise _UnrecognisedError
    d = input.numel() if reduction == "mean" else 1
    p = input.detach().reshape(-1).sigmoid()
    v = (p * (1 - p) / d).sqrt() * signs(input.numel())
    return (v * input.reshape(-1)).sum()


_CLOSED_FORMS: dict[Any, Callable[..., Tensor]] = {
    F.cross_entropy: _cross_entropy,
    F.mse_loss: _squared_error,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
}
