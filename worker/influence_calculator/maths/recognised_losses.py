"""Losses whose second derivative by the outputs has a closed form, found inside any loss function.

A user's loss may select, reshape and cast before it calls torch's `cross_entropy`, `nll_loss`, `mse_loss` or
`binary_cross_entropy_with_logits`. The call is seen while the loss runs, so that a user need not name
the loss in a way of ours. It counts if what lies between the outputs f and the call's input u is linear: then
`v_f = J_uᵀ v_u` has the covariance `∇²_f ℓ` if `v_u` has `∇²_u ℓ`. What the call returns, with
`reduction="none"` an element per position, the loss may weigh and add up: a second run of it, in which the
call returns a variable, tells the weights, of which negative ones are taken as 0. It may do so in place.
Anything else is left to the general way (`expectation`).

`nll_loss` is linear in its input: a model that answers with log-probabilities has normalised them itself, and
no curvature is left. What is taken is diag(p), as in `log_probabilities`, which together with the derivative
of the normalisation is the curvature of cross-entropy. `log_softmax` may stand right before it in the loss.

What is given is `v_u = B ε` with `B Bᵀ = ∇²_u ℓ`: B's columns for unit vectors ε, a draw for random signs. A
label y drawn from the prediction gives `p − e_y`, which has the same covariance, but is almost always 0 and
rarely large where the model is sure. It takes several labels to come as near to the expectation as one
draw of signs does.

Shapes: n examples, one at a time under vmap, or one after another where the shapes depend on data, as those
of what a mask selects; u the call's input, C classes, m elements.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from influence_calculator.maths.log_probabilities import are_log_probabilities, continued_function, counts_of
from influence_calculator.maths.objective import (
    Batch,
    Loss,
    Objective,
    batch_size,
    only_tensors,
    slice_batch,
    unsqueezed,
)
from influence_calculator.maths.vmapped_losses import class_dimension, labels_of

Vector = Callable[[int], Tensor]
"""m -> ε, `[m]`."""

_LINEAR = {
    *("clone", "contiguous", "detach", "cpu", "cuda", "to", "type", "bfloat16", "double", "float", "half"),
    *("chunk", "index_select", "narrow", "select", "split", "unbind", "__getitem__", "__get__"),
    *("expand", "flatten", "reshape", "reshape_as", "unflatten", "view", "view_as", "squeeze", "unsqueeze"),
    *("movedim", "permute", "swapaxes", "swapdims", "t", "transpose"),
}
"""Names of torch functions that only move, select or cast elements. `__get__` is a property (`.mT`)."""

_REPEATING = {"expand", "expand_as", "index_select", "__getitem__"}
"""Those that may give an element several times."""

_ADDING = {
    *("add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "neg", "__neg__", "sum", "mean"),
    *("masked_fill", "masked_select", "__setitem__"),
}
"""Names of those that are linear in all of their tensors together, but for what is constant."""

_SCALING = {"mul", "multiply", "__mul__", "__rmul__", "matmul", "__matmul__", "dot", "mv", "where"}
"""Names of those that are linear in one tensor if the others are constant."""

_DIVIDING = {"div", "divide", "true_divide", "__truediv__"}
"""Of those that are so in the first."""

_IN_PLACE = {"__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div"}
"""Operators that change their first tensor; names of other functions that do end with `_`."""

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
    found = _vectors(objective, outputs, batch, indices, vector)
    return None if found is None else found.of_outputs


class _Vectors(NamedTuple):
    of_outputs: list[Tensor]
    are_weighed: bool
    """Whether the loss does anything with what the call returned."""
    one_by_one: bool
    """Whether examples had to be taken so, and each may call something else."""


def _vectors(
    objective: Objective,
    outputs: Any,
    batch: Batch,
    indices: Tensor,
    vector: Callable[[Tensor, int], Tensor],
) -> _Vectors | None:
    leaves, rebuilt = only_tensors(outputs)
    leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    are_weighed = False

    def one(own: list[Tensor], example: Batch, index: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal are_weighed
        found = _weighed_call(_loss_of(objective, rebuilt, example), [leaf.unsqueeze(0) for leaf in own])
        are_weighed = are_weighed or found.is_weighed
        weights = found.weights.reshape(-1)
        pseudo = found.call.closed_form(lambda m: vector(index, m), weights, **found.call.arguments)
        return pseudo, found.is_sound

    try:
        with torch.enable_grad():
            (pseudo, are_sound), one_by_one = _of_each(one, leaves, batch, indices)
            total = pseudo.sum()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        return None
    if are_weighed and not bool(are_sound.all()):
        return None
    floats = [leaf for leaf in leaves if leaf.is_floating_point()]
    v = torch.autograd.grad(total, floats, allow_unused=True, materialize_grads=True)
    return _Vectors(list(v), are_weighed, one_by_one)


def _of_each(one: Callable[..., Any], *trees: Any) -> tuple[Any, bool]:
    """`one` of every example, under vmap if that takes it, and whether it did not.

    Raises:
        _UnrecognisedError, RuntimeError, ValueError: as `one` does.
    """
    try:
        return vmap(one)(*trees), False
    except (torch.OutOfMemoryError, _UnrecognisedError):
        raise
    except (RuntimeError, ValueError):
        # What a mask selects has a shape that depends on data, and so may what is called.
        rows = [one(*pytree.tree_map(lambda leaf, i=i: leaf[i], trees)) for i in range(batch_size(trees))]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *rows), True


def is_recognised(objective: Objective, outputs: Any, batch: Batch) -> bool:
    """Whether the loss has a closed form at all examples."""
    first = pytree.tree_map_only(Tensor, lambda leaf: leaf[:1], outputs)
    index = torch.zeros(1, dtype=torch.int64, device=objective.device)
    found = _vectors(objective, first, slice_batch(batch, 0, 1), index, lambda at, m: at.new_ones(m))
    if found is None:
        return False
    # What the loss calls under vmap, and with which shapes, one example tells; what it adds, all of them.
    return not (found.are_weighed or found.one_by_one) or _are_sound(objective, outputs, batch)


def _are_sound(objective: Objective, outputs: Any, batch: Batch) -> bool:
    """Whether every example's loss knows its outputs by what the call returned alone."""
    leaves, rebuilt = only_tensors(outputs)

    def one(own: list[Tensor], example: Batch) -> Tensor:
        loss = _loss_of(objective, rebuilt, example)
        return _weighed_call(loss, [leaf.unsqueeze(0) for leaf in own]).is_sound

    try:
        are_sound, _ = _of_each(one, [leaf.detach() for leaf in leaves], batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        return False
    return bool(are_sound.all())


def of_positive_weights(objective: Objective) -> Objective:
    """The objective with a recognised loss by its positive weights alone: `∇²_f ℓ` with its negative
    eigenvalues taken as 0. Soft labels weigh too: their sum may be negative.
    """
    return objective.with_loss(_PositiveWeights(objective.loss))


@dataclass(frozen=True)
class _PositiveWeights:
    loss: Loss

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        tensors, rebuilt = only_tensors(outputs)
        found = _weighed_call(lambda given: self.loss(rebuilt(given), batch), tensors)
        call = found.call
        if call.closed_form is _cross_entropy and call.arguments["target"].is_floating_point():
            logits, c = _counted_logits(found.weights.reshape(-1), **call.arguments)
            # What the labels pick is linear.
            return (c * logits.to(c.dtype).logsumexp(-1)).sum()
        return (found.weights.clamp(min=0) * found.call.result).sum()


LossOf = Callable[[list[Tensor]], Tensor]
"""One example's loss by the tensors of its outputs."""


def _loss_of(objective: Objective, rebuilt: Callable[[list[Tensor]], Any], example: Batch) -> LossOf:
    return lambda given: objective.loss(rebuilt(given), unsqueezed(example))


def _weighed_call(loss: LossOf, outputs: list[Tensor]) -> _WeighedCall:
    """The call that has a closed form, and the weights of what it returns in the loss."""
    floats = [leaf for leaf in outputs if leaf.is_floating_point()]
    watch = _Watch(floats)
    with watch:
        result = loss(outputs)
    call = watch.call
    if call is None:
        raise _UnrecognisedError
    if not watch.is_weighed:
        if result is not watch.returned or result.numel() != 1:
            raise _UnrecognisedError
        sound = torch.ones((), dtype=torch.bool, device=result.device)
        return _WeighedCall(call, torch.ones_like(result), sound, False)

    def summed_up(variable: Tensor, floats: list[Tensor]) -> Tensor:
        remaining = iter(floats)
        given = [next(remaining) if leaf.is_floating_point() else leaf for leaf in outputs]
        return _summed_up(loss, given, variable)

    here = call.result.detach()
    there = here + torch.arange(1, here.numel() + 1).to(here).view_as(here)
    weights, by_outputs = torch.func.grad(summed_up, argnums=(0, 1))(here, floats)
    # What a mode does not see (`torch.func`, scripts) may add of the outputs, or multiply.
    elsewhere = torch.func.grad(summed_up)(there, floats)
    is_linear = ((weights == elsewhere) | weights.isnan() & elsewhere.isnan()).all()
    # Of an element that counts several times, the weights would have to be added before negative ones are 0.
    is_counted_once = (weights >= 0).all() if watch.may_repeat else torch.ones_like(is_linear)
    is_sound = torch.stack(
        [is_linear, is_counted_once, *((gradient == 0).all() for gradient in by_outputs)]
    ).all()
    return _WeighedCall(call, weights.detach(), is_sound.detach(), True)


def _summed_up(loss: LossOf, outputs: list[Tensor], variable: Tensor) -> Tensor:
    """The loss, had the call returned the variable, in which it must be linear."""
    watch = _Watch([leaf for leaf in outputs if leaf.is_floating_point()], variable)
    with watch:
        result = loss(outputs)
    if id(result) not in watch.weighed:
        raise _UnrecognisedError
    return result.sum()


class _Call(NamedTuple):
    """Of a function that has a closed form."""

    closed_form: Callable[..., Tensor]
    arguments: Mapping[str, Any]
    result: Tensor


class _WeighedCall(NamedTuple):
    call: _Call
    weights: Tensor
    """Of each element of the call's result in the loss, shaped as it."""
    is_sound: Tensor
    """Whether the loss is linear in that result, and knows the outputs by it alone; `[]`."""
    is_weighed: bool
    """Whether the loss does anything with it at all."""


class _Watch(TorchFunctionMode):
    """Follows the outputs through a loss function to the call that has a closed form, and what it returns."""

    def __init__(self, leaves: list[Tensor], variable: Tensor | None = None) -> None:
        """`variable` is returned in place of the call's result."""
        super().__init__()
        self._derived = {id(leaf): leaf for leaf in leaves}  # holds them, so that no id is used twice
        self._normalised: dict[int, int] = {}
        """The dimension of those that `log_softmax` has answered; they count for `nll_loss` alone."""
        self._variable = variable
        self.call: _Call | None = None
        self.returned: Tensor | None = None
        """What the loss took for the call's result, and may have changed in place."""
        self.weighed: dict[int, Tensor] = {}
        """What is linear in what the call returned."""
        self.is_weighed = False
        """Whether anything but that itself is."""
        self.may_repeat = False
        """Whether an element of the outputs may stand in the call's input several times."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        name = _plain(getattr(func, "__name__", ""))
        numbers = args[:1] if name in _IN_THE_FORM_OF else args[1:] if name in _NEW else args
        given_ids = {id(leaf) for leaf in pytree.tree_leaves((numbers, dict(keywords)))}
        closed_form = _CLOSED_FORMS.get(func)
        if closed_form is not None and self.call is None and given_ids & self._derived.keys():
            return self._called(func, closed_form, args, keywords)
        result = continued_function(func)(*args, **keywords)
        produced = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if given_ids & self.weighed.keys():
            concerns = bool(produced) or name == "__setitem__"
            if concerns and (given_ids & self._derived.keys() or not self._weighs(name, args, keywords)):
                raise _UnrecognisedError
            self.is_weighed = self.is_weighed or concerns
            self.weighed |= {id(leaf): leaf for leaf in produced}
            return result
        if not given_ids & self._derived.keys():
            return result
        if name == "__setitem__" or (produced and name not in (*_LINEAR, "log_softmax")):
            raise _UnrecognisedError
        if produced and given_ids & self._normalised.keys():
            raise _UnrecognisedError
        self.may_repeat = self.may_repeat or (name in _REPEATING and _repeats(name, args))
        if name == "log_softmax":
            self._normalised |= {id(leaf): _softmax_dimension(leaf, args, keywords) for leaf in produced}
        self._derived |= {id(leaf): leaf for leaf in produced}
        return result

    def _called(
        self,
        func: Any,
        closed_form: Callable[..., Tensor],
        args: tuple[Any, ...],
        keywords: Mapping[str, Any],
    ) -> Tensor:
        given = inspect.signature(func).bind(*args, **keywords)
        given.apply_defaults()
        beside = [value for name, value in given.arguments.items() if name != "input"]
        if any(id(value) in self._derived for value in beside):
            raise _UnrecognisedError
        of_class = given.arguments.get("weight")
        if of_class is not None and bool((of_class < 0).any()):
            raise _UnrecognisedError  # its examples have negative eigenvalues
        self._refuse_other_normalisation(func, given.arguments["input"])
        result = continued_function(func)(*args, **keywords) if self._variable is None else self._variable
        self.call = _Call(closed_form, given.arguments, result)
        self.returned = result.clone()
        self.weighed[id(self.returned)] = self.returned
        return self.returned

    def _weighs(self, name: str, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
        """Whether a function of what the call returned is linear in it."""
        concerned = [id(value) in self.weighed for value in (*args, *keywords.values())]
        return (
            name in _LINEAR
            or name in _ADDING
            or (name in _SCALING and sum(concerned) == 1)
            or (name in _DIVIDING and bool(args) and concerned[0] and sum(concerned) == 1)
        )

    def _refuse_other_normalisation(self, func: Any, input: Tensor) -> None:
        classes = class_dimension(input)
        dimension = self._normalised.get(id(input), classes)
        if dimension != classes or (id(input) in self._normalised and func is not F.nll_loss):
            raise _UnrecognisedError


def _plain(name: str) -> str:
    """The name of the function that computes the same elsewhere than in place."""
    return _IN_PLACE.get(name, name if name.startswith("__") else name.removesuffix("_"))


def _repeats(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a function may give an element several times: not by slices, numbers and masks."""
    if name != "__getitem__":
        return True
    places = args[1] if isinstance(args[1], tuple) else (args[1],)
    once = (int, slice, type(None), type(Ellipsis))
    is_mask = [isinstance(place, Tensor) and place.dtype in (torch.bool, torch.uint8) for place in places]
    return not all(masks or isinstance(place, once) for masks, place in zip(is_mask, places, strict=True))


def _softmax_dimension(result: Tensor, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> int:
    """As `log_softmax(input, dim)` was called."""
    dimension = keywords.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(dimension, int):
        raise _UnrecognisedError
    return dimension % result.dim()


def _cross_entropy(vector: Vector, weights: Tensor, **arguments: Any) -> Tensor:
    """`v = (√p ε − p ⟨√p, ε⟩) √c` at every position, c as `_counted_logits` gives it."""
    logits, c = _counted_logits(weights, **arguments)
    p = logits.detach().to(c.dtype).softmax(-1)
    scaled = p.sqrt() * vector(p.numel()).reshape(p.shape)
    v = (scaled - p * scaled.sum(-1, keepdim=True)) * c.sqrt().unsqueeze(-1)
    return (v.to(logits.dtype) * logits).sum()


def _counted_logits(
    weights: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    **deprecated: Any,
) -> tuple[Tensor, Tensor]:
    """Logits of every position, `[positions, C]`, and c, what the log-probabilities there count together, 0
    where that is negative: `∇²_u ℓ` is `c (diag p − p pᵀ)`.

    c is 1, or 0 at an ignored position, where nothing is weighted; for a mean over what torch divides by.
    `weights` are those of what is returned, one or one per position, in the loss.
    """
    if any(value is not None for value in deprecated.values()):
        raise _UnrecognisedError
    logits = _by_position(input)
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    of_class = wide.new_ones(wide.shape[1]) if weight is None else weight.to(wide.dtype)
    if target.is_floating_point():
        counts = _by_position(target).to(wide.dtype) @ of_class
        counted = torch.ones_like(counts)
        total = counted.sum()
    else:
        labels = labels_of(input, target).reshape(-1)
        counted = (labels != ignore_index).to(wide.dtype)
        counts = counts_of(wide, labels, weight, ignore_index)
        total = counts.sum()
    c = ((1 - label_smoothing) * counts + label_smoothing * counted * of_class.mean()) * weights
    return logits, _averaged(c, total, reduction).clamp(min=0)


def _negative_log_likelihood(
    vector: Vector,
    weights: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    **deprecated: Any,
) -> Tensor:
    """`v = √(p c) ε` at every position, p = exp(u), c as in `_cross_entropy`."""
    if any(value is not None for value in deprecated.values()):
        raise _UnrecognisedError
    log_p = _by_position(input)
    p = log_p.detach().to(torch.promote_types(log_p.dtype, torch.float32)).exp()
    counts = counts_of(p, labels_of(input, target).reshape(-1), weight, ignore_index)
    c = counts * weights * are_log_probabilities(log_p, 1)
    c = _averaged(c, counts.sum(), reduction).clamp(min=0).unsqueeze(-1)
    # Of other inputs p may be infinite.
    v = torch.where(c == 0, 0, p * c).sqrt() * vector(p.numel()).reshape(p.shape)
    return (v.to(log_p.dtype) * log_p).sum()


def _averaged(c: Tensor, total: Tensor, reduction: str) -> Tensor:
    """C for a mean over so much, or for no mean."""
    return c / torch.where(total == 0, 1, total) if reduction == "mean" else c


def _by_position(values: Tensor) -> Tensor:
    """`[C]` or `[1, C, ...]` as `[positions, C]`."""
    return values.unsqueeze(0) if values.dim() == 1 else values.movedim(1, -1).reshape(-1, values.shape[1])


def _squared_error(
    vector: Vector, weights: Tensor, *, input: Tensor, target: Tensor, reduction: str, **others: Any
) -> Tensor:
    """`v = √(2/d) ε` for a mean over d elements, `√2 ε` for a sum."""
    if any(v is not None for v in others.values()) or input.shape != target.shape:
        raise _UnrecognisedError
    d = max(1, input.numel()) if reduction == "mean" else 1
    v = (2 / d * weights.clamp(min=0)).sqrt() * vector(input.numel()).to(input.dtype)
    return (v * input.reshape(-1)).sum()


def _binary_cross_entropy(
    vector: Vector, weights: Tensor, *, input: Tensor, target: Tensor, reduction: str, **others: Any
) -> Tensor:
    """`v = √(p (1 − p) / d) ε`, d = 1 for a sum."""
    if any(v is not None for v in others.values()) or input.shape != target.shape:
        raise _UnrecognisedError
    d = max(1, input.numel()) if reduction == "mean" else 1
    p = input.detach().reshape(-1).sigmoid()
    v = (p * (1 - p) / d * weights.clamp(min=0)).sqrt() * vector(input.numel())
    return (v * input.reshape(-1)).sum()


_CLOSED_FORMS: dict[Any, Callable[..., Tensor]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _negative_log_likelihood,
    F.mse_loss: _squared_error,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
}
