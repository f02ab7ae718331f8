"""Layers whose per-sample gradients follow from their inputs and output gradients alone.

A layer of this kind computes `f = W ã` for every token (position) of every example, so that the
gradient by W is `Σ_s g_s ã_sᵀ`. Here stands which modules are such layers, and how their tensors
become `[n, S, ·]`; `capture` records the tensors. A convolution with k groups is k such layers side
by side, of which each has `o / k` rows of the weight: its groups stand where examples stand.

Shapes: n examples, k groups (1 for most layers), S tokens per example, i inputs of a group (kernel
included), o outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from typing_extensions import override

from influence_calculator.maths.objective import Objective


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight, detached; one that is computed (`parametrize`, weight norm) as it is now."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


@dataclass(frozen=True)
class LayerSpec(ABC):
    """One layer that hooks can capture, and which of its parameters are tracked."""

    name: str
    """The module's name in the model; "" for the model itself."""
    weight: str | None
    """Name of the weight if it is tracked."""
    bias: str | None
    """Name of the bias if there is one that is tracked."""
    groups: int = 1
    """k: parts of the outputs of which each sees its own part of the inputs, as of grouped convolutions."""
    transposed: ClassVar[bool] = False
    """Whether the weight is `[i, o]`, in place of `[o, i]`."""

    def weight_shape(self, module: nn.Module) -> tuple[int, int]:
        """`(o, i)`, i of one group."""
        rows, columns = weight_of(module).flatten(1).shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The tracked parameters, in `named_parameters()` order."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def taps(self, module: nn.Module) -> int | None:  # noqa: ARG002
        """K, places in its kernel, if it may be captured with channels last in memory."""
        return None

    @abstractmethod
    def rows(self, module: nn.Module, inputs: Tensor) -> int:
        """How many there are along the first dimension; one without a batch is one."""

    @abstractmethod
    def activations(self, module: nn.Module, inputs: Tensor, n: int, channels_last: bool = False) -> Tensor:
        """The inputs of one call as `[n·k, S, i]`, the groups of an example side by side.

        With channels last `[n, S, K·c]` by tap of the kernel, then by channel; the weight has the channel
        first.
        """

    @abstractmethod
    def output_gradients(self, gradients: Tensor, n: int) -> Tensor:
        """The gradients by the outputs of one call as `[n·k, S, o/k]`."""

    @abstractmethod
    def sequence(self, outputs: Sequence[int], n: int) -> int | None:
        """S of a call with outputs of this shape whose tokens are one sequence; None: they are none."""


class LinearLayer(LayerSpec):
    """`nn.Linear`: every dimension but the last is tokens, examples first."""

    def rows(self, module: nn.Module, inputs: Tensor) -> int:  # noqa: ARG002
        return inputs.shape[0] if inputs.dim() > 1 else 1

    def activations(self, module: nn.Module, inputs: Tensor, n: int, channels_last: bool = False) -> Tensor:  # noqa: ARG002
        return inputs.reshape(n, -1, inputs.shape[-1])

    def output_gradients(self, gradients: Tensor, n: int) -> Tensor:
        return gradients.reshape(n, -1, gradients.shape[-1])

    def sequence(self, outputs: Sequence[int], n: int) -> int | None:
        return outputs[1] if len(outputs) == 3 and outputs[0] == n else None


class TransposedLinearLayer(LinearLayer):
    """Hugging Face's `Conv1D`: a linear layer whose weight is `[i, o]`."""

    transposed = True


class ConvLayer(LayerSpec):
    """`nn.Conv1d`, `2d`, `3d`: tokens are output positions, inputs the patch under each, kernel included."""

    @override
    def taps(self, module: nn.Module) -> int | None:
        assert isinstance(module, _ConvNd)
        return math.prod(module.kernel_size) if isinstance(module, nn.Conv2d) and self.groups == 1 else None

    def rows(self, module: nn.Module, inputs: Tensor) -> int:
        assert isinstance(module, _ConvNd)
        return inputs.shape[0] if inputs.dim() == len(module.kernel_size) + 2 else 1

    def activations(self, module: nn.Module, inputs: Tensor, n: int, channels_last: bool = False) -> Tensor:
        assert isinstance(module, _ConvNd)
        # Each order is gathered from the memory that it suits; from the other it takes four times as long.
        patches = _padded(module, inputs if channels_last else inputs.contiguous())
        for axis, (k, s, d) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ):
            patches = patches.unfold(axis + 2, d * (k - 1) + 1, s)[..., ::d]
        # [images, channels, *positions, *kernel], until here a view.
        axes = len(module.kernel_size)
        positions, taps = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
        columns = self.groups * module.weight.shape[1] * math.prod(module.kernel_size)
        if channels_last:
            return patches.permute(0, *positions, *taps, 1).reshape(n, -1, columns)
        if self.groups == 1 and len(patches) == n:
            # In memory the tokens of all examples lie side by side: one matrix, however it is read.
            by_column = patches.permute(1, *taps, 0, *positions).reshape(columns, n, -1)
            return by_column.permute(1, 2, 0)
        patches = patches.permute(0, 1, *taps, *positions)
        return self._tokens(patches.reshape(len(patches), columns, -1), n)

    def output_gradients(self, gradients: Tensor, n: int) -> Tensor:
        return self._tokens(gradients.flatten(2), n)

    def sequence(self, outputs: Sequence[int], n: int) -> int | None:
        return outputs[2] if len(outputs) == 3 and outputs[0] == n else None

    def _tokens(self, columns: Tensor, n: int) -> Tensor:
        """`[images, k·u, positions]` as `[n·k, S, u]`; several images per example are further tokens."""
        images = columns.shape[0] // n
        if images == 1:
            return columns.reshape(n * self.groups, -1, columns.shape[2]).mT
        u = columns.shape[1] // self.groups
        by_group = columns.unflatten(1, (self.groups, u)).unflatten(0, (n, images))
        return by_group.permute(0, 2, 1, 4, 3).reshape(n * self.groups, -1, u)


def _padded(module: _ConvNd, inputs: Tensor) -> Tensor:
    """The inputs as the kernel meets them."""
    match module.padding:
        case "valid":
            return inputs
        case "same":
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            sides = [(both // 2, both - both // 2) for both in total]
        case _:
            sides = [(int(side), int(side)) for side in module.padding]
    # `F.pad` begins with the last dimension.
    amounts = [amount for pair in reversed(sides) for amount in pair]
    if not any(amounts):
        return inputs
    return F.pad(inputs, amounts, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


_CAPTURED: tuple[tuple[type[nn.Module], type[LayerSpec]], ...] = (
    (nn.Linear, LinearLayer),
    (nn.Conv1d, ConvLayer),
    (nn.Conv2d, ConvLayer),
    (nn.Conv3d, ConvLayer),
)
"""Modules that are captured, and how."""


def _kind(module: nn.Module) -> type[LayerSpec] | None:
    """How a module is captured; a subclass with a forward of its own may do anything, so it is not."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    for known, kind in _CAPTURED:
        if isinstance(module, known) and type(module).forward is known.forward:
            return kind
    return TransposedLinearLayer if _is_transposed_linear(module) else None


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is the `Conv1D` of `transformers`, `x @ weight + bias`, as the layers of GPT-2 are.

    Told by its name and its package, so that nobody needs `transformers` to be installed; the file has
    moved between its versions.
    """
    forward = type(module).forward
    return any(
        known.__name__ == "Conv1D"
        and known.__module__.partition(".")[0] == "transformers"
        and known.__dict__.get("forward") is forward
        for known in type(module).__mro__
    )


@dataclass(frozen=True)
class EmbeddingSpec:
    """One `nn.Embedding` whose weight is tracked and its own."""

    name: str
    """The module's name in the model."""
    weight: str
    rows: int
    """V."""
    columns: int
    """o."""
    padding: int | None
    """The id whose row takes no gradient."""


def supported_embeddings(objective: Objective) -> tuple[EmbeddingSpec, ...]:
    """The embeddings whose weight's gradient is the sum of that by what each token looks up.

    Left out: a weight that another module shares or that the model uses by hand, one that lookups change
    (`max_norm`), and gradients that are divided by counts of the batch (`scale_grad_by_freq`).
    """
    model = objective.model
    owners = _owners(model)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or type(module).forward is not nn.Embedding.forward:
            continue
        weight = f"{name}.weight" if name else "weight"
        if module.max_norm is not None or module.scale_grad_by_freq or weight not in objective.names:
            continue
        if owners[id(module.weight)] == 1 and weight not in objective.by_hand:
            V, o = module.weight.shape
            found.append(EmbeddingSpec(name, weight, V, o, module.padding_idx))
    return tuple(found)


def _owners(model: nn.Module) -> Counter[int]:
    """By identity of a parameter, how many modules have it."""
    return Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))


def supported_layers(objective: Objective) -> tuple[LayerSpec, ...]:
    """The layers that hooks capture, each with at least one tracked parameter, in `named_modules()` order.

    Left out: layers that share a parameter with another module, whose gradient is a sum over both, those with
    other parameters beside weight and bias (as `weight_norm` adds) or some that the model uses by hand, and
    `out_proj` of `nn.MultiheadAttention`, which is never called as a module.
    """
    model = objective.model
    tracked = set(objective.names)
    owners = _owners(model)
    layers = []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None or _inside_attention(model, name):
            continue
        own = {key: f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)}
        if any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
            continue
        if any(path in objective.by_hand for path in own.values()):
            continue
        if any(key not in ("weight", "bias") and path in tracked for key, path in own.items()):
            continue
        weight, bias = (own[key] if own.get(key) in tracked else None for key in ("weight", "bias"))
        if weight or bias:
            layers.append(kind(name, weight, bias, getattr(module, "groups", 1)))
    return tuple(layers)


def described(model: nn.Module, name: str) -> str:
    """A module's kind, and the modules that it shares parameters with."""
    own = {id(p) for p in model.get_submodule(name).parameters(recurse=False)}
    others = [
        repr(other)
        for other, module in model.named_modules()
        if other != name and own & {id(p) for p in module.parameters(recurse=False)}
    ]
    kind = type(model.get_submodule(name)).__name__
    return f"{kind}, shared with {' and '.join(others)}" if others else kind


def _inside_attention(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return name.endswith("out_proj") and isinstance(model.get_submodule(parent), nn.MultiheadAttention)


def uncaptured_parameters(objective: Objective) -> tuple[str, ...]:
    """Tracked parameters that belong to no supported layer, in order."""
    captured = {name for layer in supported_layers(objective) for name in layer.parameters}
    return tuple(name for name in objective.names if name not in captured)
