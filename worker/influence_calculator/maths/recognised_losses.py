"""Losses whose second derivative by the outputs has a closed form, found inside any loss function.

A user's loss may select, reshape and cast before it calls torch's `cross_entropy`, `nll_loss`, `mse_loss` or
`binary_cross_entropy_with_logits`. The call is seen while the loss runs, so that a user need not name
the loss in a way of ours. It counts if the loss returns what the call returned and if what lies
between the outputs f and the call's input u is linear: then `v_f = J_uᵀ v_u` has the covariance
`∇²_f ℓ` if `v_u` has `∇²_u ℓ`. Anything else is left to the general way (`expectation`).

`nll_loss` is linear in its input: a model that answers with log-probabilities has normalised them itself, and
no curvature is left. What is taken is diag(p), as in `log_probabilities`, which together with the derivative
of the normalisation is the curvature of cross-entropy. `log_softmax` may stand right before it in the loss.

What is given is `v_u = B ε` with `B Bᵀ = ∇²_u ℓ`: B's columns for unit vectors ε, a draw for random signs. A
label y drawn from the prediction gives `p − e_y`, which has the same covariance, but is almost always 0 and
rarely large where the model is sure. It takes several labels to come as near to the expectation as one
draw of signs does.

Shapes: n examples, one at a time under vmap; u the call's input, C classes, m elements.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from influence_calculator.maths.log_probabilities import counts_of
from influence_calculator.maths.objective import Batch, Objective, only_tensors, slice_batch, unsqueezed
from influence_calculator.maths.vmapped_losses import class_dimension, gathered

Vector = Callable[[int], Tensor]
"""m -> ε, `[m]`."""

_LINEAR = {
    *("clone", "contiguous", "detach", "cpu", "cuda", "to", "type", "bfloat16", "double", "float", "half"),
    *("chunk", "index_select", "narrow", "select", "split", "unbind", "__getitem__", "__get__"),
    *("expand", "flatten", "reshape", "reshape_as", "unflatten", "view", "view_as", "squeeze", "unsqueeze"),
    *("movedim", "permute", "swapaxes", "swapdims", "t", "transpose"),
}
"""Names of torch functions that only move, select or cast elements. `__get__` is a property (`.mT`)."""


_IN_THE_FORM_OF = {"expand_as", "reshape_as", "to", "type_as", "view_as"}
"""Names of those that take the numbers of their first argument alone."""

_NEW = {"full_like", "new_full", "new_ones", "new_tensor", "new_zeros", "ones_like", "zeros_like"}
"""Names of those that take no numbers of the tensor that they are called on."""


class _UnrecognisedError(ValueError):
    """Leaves the loss as soon as it is seen that no closed form applies."""


def recognised_vectors(
    objective: Objective,
    outputs: Any,
    batch: Batch,
    indices: Tensor,
    vector: Callable[[Tensor, int], Tensor],
) -> list[Tensor] | None:
    """`v_f` of every example, one tensor per floating-point output; None where the loss is not recognised.

    `vector(index, m)` is an example's ε, the index an element of `indices`, `[n]`.
    """
    leaves, rebuilt = only_tensors(outputs)
    leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]

    def one(own: list[Tensor], example: Batch, index: Tensor) -> Tensor:
        own = [leaf.unsqueeze(0) for leaf in own]
        return _pseudo_loss(
            lambda: objective.loss(rebuilt(own), unsqueezed(example)),
            [leaf for leaf in own if leaf.is_floating_point()],
            lambda m: vector(index, m),
        )

    try:
        with torch.enable_grad():
            total = vmap(one)(leaves, batch, indices).sum()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        return None
    floats = [leaf for leaf in leaves if leaf.is_floating_point()]
    return list(torch.autograd.grad(total, floats, allow_unused=True, materialize_grads=True))


def is_recognised(objective: Objective, outputs: Any, batch: Batch) -> bool:
    """Whether the loss has a closed form; `∇²_f ℓ` is then positive semi-definite at all outputs."""
    first = pytree.tree_map_only(Tensor, lambda leaf: leaf[:1], outputs)
    index = torch.zeros(1, dtype=torch.int64, device=objective.device)
    vectors = recognised_vectors(
        objective, first, slice_batch(batch, 0, 1), index, lambda at, m: at.new_ones(m)
    )
    return vectors is not None


def _pseudo_loss(loss: Callable[[], Tensor], leaves: list[Tensor], vector: Vector) -> Tensor:
    """`⟨v_u, u⟩` of one example, whose loss `loss()` computes from `leaves`."""
    watch = _Watch(leaves, vector)
    with watch:
        result = loss()
    if watch.pseudo is None or result is not watch.result:
        raise _UnrecognisedError
    return watch.pseudo


class _Watch(TorchFunctionMode):
    """Follows the outputs through a loss function until the call that has a closed form."""

    def __init__(self, leaves: list[Tensor], vector: Vector) -> None:
        super().__init__()
        self._derived = {id(leaf): leaf for leaf in leaves}  # holds them, so that no id is used twice
        self._normalised: dict[int, int] = {}
        """The dimension of those that `log_softmax` has answered; they count for `nll_loss` alone."""
        self._vector = vector
        self.pseudo: Tensor | None = None
        self.result: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        result = gathered(func)(*args, **keywords)
        name = getattr(func, "__name__", "")
        numbers = args[:1] if name in _IN_THE_FORM_OF else args[1:] if name in _NEW else args
        given_ids = {id(leaf) for leaf in pytree.tree_leaves((numbers, dict(keywords)))}
        if not given_ids & self._derived.keys():
            return result
        closed_form = _CLOSED_FORMS.get(func)
        if closed_form is not None and self.result is None:
            given = inspect.signature(func).bind(*args, **keywords)
            given.apply_defaults()
            beside = [value for name, value in given.arguments.items() if name != "input"]
            if any(id(value) in self._derived for value in beside):
                raise _UnrecognisedError
            self._refuse_other_normalisation(func, given.arguments["input"])
            self.pseudo = closed_form(self._vector, **given.arguments)
            self.result = result
            return result
        produced = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if name == "__setitem__" or (produced and name not in (*_LINEAR, "log_softmax")):
            raise _UnrecognisedError
        if produced and given_ids & self._normalised.keys():
            raise _UnrecognisedError
        if name == "log_softmax":
            self._normalised |= {id(leaf): _softmax_dimension(leaf, args, keywords) for leaf in produced}
        self._derived |= {id(leaf): leaf for leaf in produced}
        return result

    def _refuse_other_normalisation(self, func: Any, input: Tensor) -> None:
        classes = class_dimension(input)
        dimension = self._normalised.get(id(input), classes)
        if dimension != classes or (id(input) in self._normalised and func is not F.nll_loss):
            raise _UnrecognisedError


def _softmax_dimension(result: Tensor, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> int:
    """As `log_softmax(input, dim)` was called."""
    dimension = keywords.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(dimension, int):
        raise _UnrecognisedError
    return dimension % result.dim()


def _cross_entropy(
    vector: Vector,
    *,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    **deprecated: Any,
) -> Tensor:
    """`v = (√p ε − p ⟨√p, ε⟩) √c` at every position, c what the log-probabilities there count together.

    That is 1, or 0 at an ignored position, where nothing is weighted; for a mean over what torch divides by.
    """
    if reduction not in ("mean", "sum") or any(value is not None for value in deprecated.values()):
        raise _UnrecognisedError
    logits = _by_position(input)
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    weights = torch.ones_like(p[0]) if weight is None else weight.to(p.dtype)
    if target.is_floating_point():
        counts = _by_position(target).to(p.dtype) @ weights
        counted = torch.ones_like(counts)
        total = counted.sum()
    else:
        labels = target.reshape(-1)
        counted = (labels != ignore_index).to(p.dtype)
        counts = counts_of(p, labels, weight, ignore_index)
        total = counts.sum()
    c = (1 - label_smoothing) * counts + label_smoothing * counted * weights.mean()
    if reduction == "mean":
        c = c / torch.where(total == 0, 1, total)
    scaled = p.sqrt() * vector(p.numel()).reshape(p.shape)
    v = (scaled - p * scaled.sum(-1, keepdim=True)) * c.clamp(min=0).sqrt().unsqueeze(-1)
    return (v.to(logits.dtype) * logits).sum()


def _negative_log_likelihood(
    vector: Vector,
    *,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    **deprecated: Any,
) -> Tensor:
    """`v = √(p c) ε` at every position, p = exp(u), c as in `_cross_entropy`."""
    if reduction not in ("mean", "sum") or any(value is not None for value in deprecated.values()):
        raise _UnrecognisedError
    log_p = _by_position(input)
    p = log_p.detach().to(torch.promote_types(log_p.dtype, torch.float32)).exp()
    c = counts_of(p, target.reshape(-1), weight, ignore_index)
    if reduction == "mean":
        c = c / torch.where(c.sum() == 0, 1, c.sum())
    v = (p * c.clamp(min=0).unsqueeze(-1)).sqrt() * vector(p.numel()).reshape(p.shape)
    return (v.to(log_p.dtype) * log_p).sum()


def _by_position(values: Tensor) -> Tensor:
    """`[C]` or `[1, C, ...]` as `[positions, C]`."""
    return values.unsqueeze(0) if values.dim() == 1 else values.movedim(1, -1).reshape(-1, values.shape[1])


def _squared_error(vector: Vector, *, input: Tensor, target: Tensor, reduction: str, **others: Any) -> Tensor:
    """`v = √(2/d) ε` for a mean over d elements, `√2 ε` for a sum."""
    if any(v is not None for v in others.values()) or input.shape != target.shape:
        raise _UnrecognisedError
    d = input.numel() if reduction == "mean" else 1
    v = (2 / d) ** 0.5 * vector(input.numel()).to(input.dtype)
    return (v * input.reshape(-1)).sum()


def _binary_cross_entropy(
    vector: Vector, *, input: Tensor, target: Tensor, reduction: str, **others: Any
) -> Tensor:
    """`v = √(p (1 − p) / d) ε`, d = 1 for a sum."""
    if any(v is not None for v in others.values()) or input.shape != target.shape:
        raise _UnrecognisedError
    d = input.numel() if reduction == "mean" else 1
    p = input.detach().reshape(-1).sigmoid()
    v = (p * (1 - p) / d).sqrt() * vector(input.numel())
    return (v * input.reshape(-1)).sum()


_CLOSED_FORMS: dict[Any, Callable[..., Tensor]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _negative_log_likelihood,
    F.mse_loss: _squared_error,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
}
