"""Layers whose per-sample gradients follow from their inputs and output gradients alone.

A layer of this kind computes `f = W ã` for every token (position) of every example, so that the
gradient by W is `Σ_s g_s ã_sᵀ`. Here stands which modules are such layers, and how their tensors
become `[n, S, ·]`; `capture` records the tensors.

Shapes: n examples, S tokens per example, i inputs (kernel included), o outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator.maths.objective import Objective


@dataclass(frozen=True)
class LayerSpec(ABC):
    """One layer that hooks can capture, and which of its parameters are tracked."""

    name: str
    """The module's name in the model; "" for the model itself."""
    weight: str | None
    """Name of the weight if it is tracked."""
    bias: str | None
    """Name of the bias if there is one that is tracked."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The tracked parameters, in `named_parameters()` order."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @abstractmethod
    def activations(self, module: nn.Module, inputs: Tensor, n: int) -> Tensor:
        """The inputs of one call as `[n, S, i]`."""

    @abstractmethod
    def output_gradients(self, gradients: Tensor, n: int) -> Tensor:
        """The gradients by the outputs of one call as `[n, S, o]`."""


class LinearLayer(LayerSpec):
    """`nn.Linear`: every dimension but the last is tokens, examples first."""

    def activations(self, module: nn.Module, inputs: Tensor, n: int) -> Tensor:  # noqa: ARG002
        return inputs.reshape(n, -1, inputs.shape[-1])

    def output_gradients(self, gradients: Tensor, n: int) -> Tensor:
        return gradients.reshape(n, -1, gradients.shape[-1])


class Conv2dLayer(LayerSpec):
    """`nn.Conv2d` with one group and zero padding: tokens are output pixels, inputs the patch under each."""

    def activations(self, module: nn.Module, inputs: Tensor, n: int) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        padded = F.pad(inputs, _padding(module))
        patches = F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
        # Several images per example (frames, crops) are further tokens.
        images = patches.shape[0] // n
        if images == 1:
            return patches.mT
        return patches.mT.reshape(n, images * patches.shape[2], patches.shape[1])

    def output_gradients(self, gradients: Tensor, n: int) -> Tensor:
        flat = gradients.flatten(2)
        images = flat.shape[0] // n
        if images == 1:
            return flat.mT
        return flat.mT.reshape(n, images * flat.shape[2], flat.shape[1])


def _padding(module: nn.Conv2d) -> list[int]:
    """What `F.pad` takes: left, right, top, bottom."""
    if isinstance(module.padding, tuple):
        height, width = module.padding
        return [width, width, height, height]
    if module.padding == "valid":
        return [0, 0, 0, 0]
    height, width = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return [width // 2, width - width // 2, height // 2, height - height // 2]


def _kind(module: nn.Module) -> type[LayerSpec] | None:
    """How a module is captured; a subclass with a forward of its own may do anything, so it is not."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return LinearLayer
    if (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and module.groups == 1
        and module.padding_mode == "zeros"
    ):
        return Conv2dLayer
    return None


def supported_layers(objective: Objective) -> tuple[LayerSpec, ...]:
    """The layers that hooks capture, each with at least one tracked parameter, in `named_modules()` order.

    Left out: layers that share a parameter with another module, whose gradient is a sum over both,
    and `out_proj` of `nn.MultiheadAttention`, which is never called as a module.
    """
    model = objective.model
    tracked = set(objective.names)
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None or _inside_attention(model, name):
            continue
        own = {key: f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)}
        if any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
            continue
        weight, bias = (own[key] if own.get(key) in tracked else None for key in ("weight", "bias"))
        if weight or bias:
            layers.append(kind(name, weight, bias))
    return tuple(layers)


def _inside_attention(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return name.endswith("out_proj") and isinstance(model.get_submodule(parent), nn.MultiheadAttention)


def uncaptured_parameters(objective: Objective) -> tuple[str, ...]:
    """Tracked parameters that belong to no supported layer, in order."""
    captured = {name for layer in supported_layers(objective) for name in layer.parameters}
    return tuple(name for name in objective.names if name not in captured)
