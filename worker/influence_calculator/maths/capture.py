"""Per-sample gradients from hooks: activations and output gradients of layers, weights untouched.

One forward pass with every parameter detached records the inputs of the supported layers and starts
the graph at the outputs of the first of them, so that autograd forms no weight gradient and
differentiates nothing below. One backward pass then gives every layer's output gradients, from which
per-sample gradients are formed layer by layer.

Shapes: n examples, k groups of a convolution (else 1), S tokens per example (summed over calls of a
layer), i inputs of a group, o outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from influence_calculator.maths.errors import CaptureMismatchError, UnsupportedModelError
from influence_calculator.maths.layers import (
    LayerSpec,
    supported_embeddings,
    supported_layers,
    uncaptured_parameters,
    weight_of,
)
from influence_calculator.maths.objective import Batch, Objective, batch_size, slice_batch
from influence_calculator.maths.row_owners import are_others, may_move_rows, weights
from influence_calculator.maths.shapes import EmbeddingShape, LayerShape, ModelShapes
from influence_calculator.maths.traced_gradients import positions

__all__ = [
    "CapturedLayer",
    "LayerCalls",
    "Recording",
    "captured_gradients",
    "captured_layers",
    "float_leaves",
    "measure",
    "of_the_losses",
    "record",
    "supported_layers",
    "uncaptured_parameters",
]

SHOW_IT_FIRST = (
    "put an example that it happens to among the first four, for its parameters are differentiated otherwise "
    "then, or leave them out (requires_grad_(False))"
)
"""The cure of what the probe would have found."""


@dataclass(frozen=True)
class CapturedLayer:
    """One layer's tensors of one backward pass."""

    spec: LayerSpec
    activations: Tensor
    """`[n·k, S, i]`."""
    gradients: Tensor
    """`[n·k, S, o/k]`."""
    taps: int = 1
    """K of inputs by tap of the kernel, then by channel, where the weight has the channel first."""

    def of_examples(self, start: int, stop: int) -> CapturedLayer:
        """What it holds of these examples, as views."""
        groups = slice(start * self.spec.groups, stop * self.spec.groups)
        return replace(self, activations=self.activations[groups], gradients=self.gradients[groups])

    def per_sample(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients `[n, numel]` of the tracked parameters: `Σ_s g_s a_sᵀ` and `Σ_s g_s`."""
        n = self.gradients.shape[0] // self.spec.groups
        if self.spec.weight is not None:
            g, a = self.gradients, self.activations
            products = (
                per_sample_products(a.to(g.dtype), g) if self.spec.transposed else per_sample_products(g, a)
            )
            yield self.spec.weight, by_channel(products, self.taps).reshape(n, -1)
        if self.spec.bias is not None:
            yield self.spec.bias, self.gradients.sum(1).reshape(n, -1)


def by_channel(values: Tensor, taps: int) -> Tensor:
    """`[…, i]` by tap of the kernel, then by channel, as the weight's columns are."""
    return values if taps == 1 else values.unflatten(-1, (taps, -1)).mT.flatten(-2)


def by_tap(values: Tensor, taps: int) -> Tensor:
    """The inverse of `by_channel`."""
    return values if taps == 1 else values.unflatten(-1, (-1, taps)).mT.flatten(-2)


def per_sample_products(g: Tensor, a: Tensor, out: Tensor | None = None) -> Tensor:
    """`Σ_s g_s a_sᵀ` of each example, `[n, o, i]`."""
    if g.shape[1] == 1:
        return torch.mul(g.mT, a, out=out)
    return torch.bmm(g.mT, a.to(g.dtype), out=out)


@dataclass(frozen=True)
class LayerCalls:
    """What one layer's tensors of one backward pass are made of: patches are several times their inputs."""

    spec: LayerSpec
    module: nn.Module
    rows: int
    """n of the batch."""
    taps: int | None
    """K, if inputs are to be by tap of the kernel, then by channel."""
    channels_last: bool
    """Whether they are so in memory."""
    pieces: tuple[tuple[Tensor, Tensor], ...] = ()
    """Of each call its inputs and the gradients by its outputs; none if no value depends on the layer."""

    def captured(self) -> CapturedLayer:
        """Tokens of all calls, one after the other; views where they can be."""
        taps = self.taps or 1
        if not self.pieces:
            # Not called for these examples: no token, its parameters' gradients are 0.
            return _empty(self.spec, self.module, self.rows, taps)
        tokens = [
            (self.activations(inputs), self.spec.output_gradients(gradients, self.rows))
            for inputs, gradients in self.pieces
        ]
        if len(tokens) == 1:
            return CapturedLayer(self.spec, *tokens.pop(), taps)
        a, g = (torch.cat(side, dim=1) for side in zip(*tokens, strict=True))
        return CapturedLayer(self.spec, a, g, taps)

    def activations(self, inputs: Tensor) -> Tensor:
        """`[n·k, S, i]` of one call's inputs.

        Raises:
            UnsupportedModelError: they are not as many rows for each example.
        """
        if self.spec.rows(self.module, inputs) % self.rows:
            raise UnsupportedModelError(
                f"layer {self.spec.name!r}: expected inputs with as many rows for each of the {self.rows} "
                f"examples of a batch, got shape {tuple(inputs.shape)}, as where a model removes padding, "
                "routes some examples or tokens to a layer, or calls it on what all examples share, and none "
                f"of the first examples shows it; {SHOW_IT_FIRST}"
            )
        if self.taps is None or self.channels_last:
            return self.spec.activations(self.module, inputs, self.rows, channels_last=self.taps is not None)
        return by_tap(self.spec.activations(self.module, inputs, self.rows), self.taps)


class _Call(NamedTuple):
    """One call of one layer."""

    inputs: Tensor
    edge: GradientEdge
    """Where the gradient by the call's output is read; stands before any in-place operation on it."""
    output: Tensor
    """Of the output's shape, without memory of its own."""


class Recording:
    """A forward pass whose layers were recorded."""

    def __init__(
        self, objective: Objective, rows: int, layers: Sequence[LayerSpec], channels_last: bool = False
    ) -> None:
        """`channels_last`: whether convolutions were called so, which are to be captured by tap."""
        self.channels_last = channels_last
        self.outputs: Any = None
        self.moves_rows = False
        """Whether it may hold rows of a layer at other examples' places, which was not looked into yet."""
        self.transformed: set[str] = set()
        """Layers that are called inside of a transform of `torch.func`, where hooks capture nothing."""
        self.layers = tuple(layers)
        self.rows = rows
        self.calls: dict[str, list[_Call]] = {layer.name: [] for layer in layers}
        self._untried = frozenset(objective.untried)
        self._layers = {
            layer.name: LayerCalls(
                layer,
                objective.model.get_submodule(layer.name),
                rows,
                kernel_taps(objective, layer),
                channels_last,
            )
            for layer in layers
        }

    def backward(
        self, values: Sequence[Tensor], cotangents: Sequence[Tensor | None], keep: bool = False
    ) -> Iterator[LayerCalls]:
        """The layers of the backward pass from `values` (outputs or losses) with their cotangents.

        With `keep` another backward pass may follow; without, a layer's tensors are let go as the
        iterator moves on.

        Raises:
            CaptureMismatchError: a layer's rows are other examples'.
            UnsupportedModelError: a layer is met that nobody tried.
        """
        asked = self.moves_rows
        gradients = self._output_gradients(values, cotangents, keep or asked)
        if asked and (others := self._with_rows_of_others(values, cotangents, gradients, keep)):
            raise CaptureMismatchError(
                f"layer {others[0]!r}: expected rows that stand at their own example's place in a batch, got "
                "some that other examples' losses depend on: the model sorts, packs or routes them by what "
                f"they hold, or lets examples influence each other; {SHOW_IT_FIRST}"
            )
        for layer in self.layers:
            if layer.name in self.transformed:
                raise UnsupportedModelError(
                    f"layer {layer.name!r}: expected a call outside of torch.func's transforms, got one "
                    "inside of torch.vmap or another, and none of the first examples shows it; "
                    f"{SHOW_IT_FIRST}"
                )
            calls = self.calls[layer.name] if keep else self.calls.pop(layer.name)
            found = zip(calls, gradients.pop(layer.name), strict=True)
            # What the values do not depend on is no call: an adapter's norm may be taken of it and detached.
            reached = tuple((call.inputs, g) for call, g in found if g is not None)
            if reached and layer.name in self._untried:
                raise UnsupportedModelError(
                    f"layer {layer.name!r}: none of the first training examples reaches it, and a later one "
                    "does, so that nobody tried whether its gradients are captured right; put an example "
                    "that reaches it first, or leave its parameters out (requires_grad_(False))"
                )
            made_of = [replace(self._layers[layer.name], pieces=reached)]
            del calls, found, reached
            yield made_of.pop()

    def _output_gradients(
        self, values: Sequence[Tensor], cotangents: Sequence[Tensor | None], keep: bool
    ) -> dict[str, list[Tensor | None]]:
        """By layer, for each of its calls; None where no value depends on it."""
        calls = [call for layer in self.layers for call in self.calls[layer.name]]
        roots = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(calls)
        if roots and calls:
            # Of products: to compare an output's shape with its cotangent's, torch loads sympy for a second.
            with torch.enable_grad():
                products = [(v if c is None else v * c).sum() for v, c in roots]
            found = torch.autograd.grad(
                products,
                [call.edge for call in calls],
                retain_graph=keep,
                allow_unused=True,
            )
        remaining = iter(found)
        return {layer.name: [next(remaining) for _ in self.calls[layer.name]] for layer in self.layers}

    def rows_called_with(self, values: Sequence[Tensor]) -> dict[str, list[int]]:
        """By layer, how many rows the inputs have of each call that the values depend on."""
        found = self._output_gradients(values, [None] * len(values), keep=True)
        return {
            layer.name: [
                layer.rows(self._layers[layer.name].module, call.inputs)
                for call, g in zip(self.calls[layer.name], found[layer.name], strict=True)
                if g is not None
            ]
            for layer in self.layers
        }

    def with_rows_of_others(self, losses: Tensor) -> list[str]:
        """Layers whose rows are not those of the examples at their places; a last backward pass."""
        if not self.moves_rows:
            return []
        return self._with_rows_of_others(
            [losses], [None], self._output_gradients([losses], [None], keep=True), keep=False
        )

    def _with_rows_of_others(
        self,
        values: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        gradients: Mapping[str, Sequence[Tensor | None]],
        keep: bool,
    ) -> list[str]:
        """The same of values with examples first, whose gradients are given."""
        self.moves_rows = False
        ε = weights(self.rows, values[0])
        by_example = [ε.to(v.dtype).view(-1, *[1] * (v.dim() - 1)) for v in values]
        others = [e if c is None else e * c for e, c in zip(by_example, cotangents, strict=True)]
        weighted = self._output_gradients(values, others, keep)
        return [
            name
            for name, own in gradients.items()
            if any(
                g is not None and w is not None and len(g) % self.rows == 0 and are_others(g, w, ε)
                for g, w in zip(own, weighted[name], strict=True)
            )
        ]

    def tokens(self, layer: LayerSpec) -> int:
        """S: tokens per example, over all calls of a layer."""
        made_of = self._layers[layer.name]
        return sum(made_of.activations(call.inputs).shape[1] for call in self.calls[layer.name])

    def sequences(self, layer: LayerSpec) -> tuple[int | None, ...]:
        """S of each call of a layer; None where its tokens are no sequence."""
        return tuple(layer.sequence(call.output.shape, self.rows) for call in self.calls[layer.name])


def _empty(layer: LayerSpec, module: nn.Module, rows: int, taps: int) -> CapturedLayer:
    weight = weight_of(module)
    outputs, inputs = layer.weight_shape(module)
    k = layer.groups
    return CapturedLayer(
        layer, weight.new_zeros(rows * k, 0, inputs), weight.new_zeros(rows * k, 0, outputs // k), taps
    )


def record(objective: Objective, batch: Batch, layers: Sequence[LayerSpec] | None = None) -> Recording:
    """A forward pass of `batch` that records `layers` (default: all that are supported).

    The hooks are gone when it returns or raises; no parameter is changed.
    """
    chosen = supported_layers(objective) if layers is None else layers
    if objective.channels_last:
        try:
            return _recorded(objective, batch, chosen, channels_last=True)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # Examples of other shapes than those that were tried may have no such view; or it fails again.
            pass
    return _recorded(objective, batch, chosen, channels_last=False)


def _recorded(
    objective: Objective, batch: Batch, layers: Sequence[LayerSpec], channels_last: bool
) -> Recording:
    recording = Recording(objective, batch_size(batch), layers, channels_last)
    handles = []
    try:
        for layer in layers:
            module = objective.model.get_submodule(layer.name)
            if channels_last and kernel_taps(objective, layer) is not None:
                # Last, as what hooks of the user's make of the inputs is what the layer is called with.
                handles.append(module.register_forward_pre_hook(_channels_last, with_kwargs=True))
            hook = _hook(recording, layer.name)
            # First, so that hooks of the user's see and change the output after it.
            handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        with torch.enable_grad():
            recording.outputs = objective.outputs(batch)
            if channels_last:
                # As a loss expects them that takes a view of them.
                recording.outputs = pytree.tree_map_only(Tensor, Tensor.contiguous, recording.outputs)
    finally:
        for handle in handles:
            handle.remove()
    rows = recording.rows
    recording.moves_rows = rows > 1 and may_move_rows(float_leaves(recording.outputs), rows)
    return recording


def kernel_taps(objective: Objective, layer: LayerSpec) -> int | None:
    """K, if a layer's inputs are captured with channels last."""
    if layer.weight is None or not objective.channels_last:
        return None
    return layer.taps(objective.model.get_submodule(layer.name))


def _channels_last(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A convolution's arguments with the channels of its inputs last in memory."""
    if args:
        return (args[0].contiguous(memory_format=torch.channels_last), *args[1:]), kwargs
    return args, kwargs | {"input": kwargs["input"].contiguous(memory_format=torch.channels_last)}


class _Start(torch.autograd.Function):
    """The same tensor at the start of a graph, and no leaf, for that may not be changed in place (inplace
    ReLU).
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, start: Tensor) -> Tensor:  # noqa: ARG004
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # noqa: ARG004
        return None, None


def _hook(recording: Recording, name: str) -> Any:
    calls = recording.calls[name]

    def record_call(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            # The model detaches this call from its loss.
            return output
        if is_functorch_wrapped_tensor(output):
            recording.transformed.add(name)
            return output
        # By keyword, whatever it is called.
        inputs = args[0] if args else next(it for it in kwargs.values() if isinstance(it, Tensor))
        if inputs.shape[0] == 0:
            # Of examples or tokens that a router sends here, there is none.
            return output
        if not output.requires_grad:
            output = _Start.apply(output, output.new_empty(0, requires_grad=True))
        calls.append(
            _Call(inputs.detach(), get_gradient_edge(output), output.new_empty(()).expand_as(output))
        )
        return output

    return record_call


def float_leaves(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of a model's outputs."""
    return [
        leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def captured_layers(
    objective: Objective, batch: Batch, layers: Sequence[LayerSpec] | None = None
) -> Iterator[CapturedLayer]:
    """What `layers` (default: all that are supported) see while each example's loss is differentiated.

    One layer's tensors are alive at a time.
    """
    recording = record(objective, batch, layers)
    if recording.layers:
        yield from of_the_losses(recording, objective, batch)


def of_the_losses(recording: Recording, objective: Objective, batch: Batch) -> Iterator[CapturedLayer]:
    """What the layers of a recording see while the losses of its outputs are differentiated."""
    with torch.enable_grad():
        losses = objective.losses(recording.outputs, batch)
    recording.outputs = None
    yield from map(LayerCalls.captured, recording.backward([losses], [None]))


def captured_gradients(objective: Objective, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Gradients `[n, numel]` of each example's loss by each captured parameter, layer by layer."""
    for layer in captured_layers(objective, batch):
        yield from layer.per_sample()


def measure(objective: Objective, batch: Batch) -> ModelShapes:
    """The sizes that a plan is made from, seen in a forward pass of the first example of `batch`."""
    example = slice_batch(batch, 0, 1)
    kept = _KeptStorages()
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        recording = record(objective, example)
        with torch.enable_grad():
            objective.losses(recording.outputs, example)
    for calls in recording.calls.values():
        for call in calls:
            kept.add(call.inputs)
    floats = float_leaves(recording.outputs)
    for leaf in floats:
        kept.add(leaf)
    model = objective.model
    everything = [*model.parameters(), *model.buffers()]
    tracked = objective.parameters()
    entries = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    return ModelShapes(
        parameters={name: tuple(value.shape) for name, value in tracked.items()},
        layers=tuple(_layer_shape(model, recording, layer) for layer in recording.layers),
        itemsize=max((value.element_size() for value in tracked.values()), default=4),
        model_bytes=sum(tensor.nbytes for tensor in everything) + _bytes_of(objective.checkpoints),
        activation_bytes=kept.bytes_beside([*everything, *entries]),
        example_bytes=sum(leaf.nbytes for leaf in entries),
        outputs=sum(leaf.numel() for leaf in floats),
        embeddings=_embedding_shapes(objective, example),
        checkpoints=0 if objective.checkpoints is None else len(objective.checkpoints),
    )


def _bytes_of(module: nn.Module | None) -> int:
    """Parameters and buffers."""
    return 0 if module is None else sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def _layer_shape(model: nn.Module, recording: Recording, layer: LayerSpec) -> LayerShape:
    outputs, inputs = layer.weight_shape(model.get_submodule(layer.name))
    return LayerShape(
        name=layer.name,
        inputs=inputs if layer.weight is not None else 0,
        outputs=outputs,
        tokens=recording.tokens(layer),
        bias=layer.bias is not None,
        groups=layer.groups,
    )


def _embedding_shapes(objective: Objective, example: Batch) -> tuple[EmbeddingShape, ...]:
    embeddings = supported_embeddings(objective)
    tokens = positions(objective, example, embeddings)
    return tuple(EmbeddingShape(e.name, e.rows, e.columns, tokens[e.name]) for e in embeddings)


class _KeptStorages:
    """Memory that a graph keeps alive, each storage once."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def add(self, tensor: Tensor) -> Tensor:
        # An operation that keeps its own output through a hook would keep itself alive by it.
        self._tensors.append(tensor.detach())
        return self._tensors[-1]

    def bytes_beside(self, others: Sequence[Tensor]) -> int:
        """Bytes of the storages, without those that `others` use."""
        kept = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in self._tensors)}
        for other in others:
            kept.pop(other.untyped_storage().data_ptr(), None)
        return sum(kept.values())
