"""EK-FAC's definition said slowly: loops over examples, tokens and outputs, explicit Kronecker products.

Independent of the calculator's code: plain calls of the model, autograd for one example at a time,
patches of convolutions cut out one by one. Only the eigenvectors are taken from the fit, after a
check that they are eigenvectors of the covariances found here: eigenvalues may coincide, and then
any basis satisfies the definition while Λ depends on which.

A convolution with groups is as many layers, each of its own channels and of its own rows of the weight.
Hugging Face's `Conv1D` is a Linear layer whose weight is `[i, o]`; so is an embedding, of one-hot inputs; a
position that holds `padding_idx` is no token.

Shapes: d output elements of one example, o outputs, j inputs (one more with a bias) of a layer or group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from oracle import columns_of, output_hessian

Loss = Callable[[Tensor, Tensor], Tensor]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR = (nn.Linear, Conv1D)
TRANSPOSED = (Conv1D, nn.Embedding)
PseudoGradients = Callable[[int, Tensor, Tensor], list[Tensor]]
"""(example's index, outputs of a batch of one, its label) -> v's with `Σ v vᵀ` in place of `∇²_f ℓ`."""


def exact(loss: Loss) -> PseudoGradients:
    """`√μ_k u_k` for every eigenpair of the output Hessian."""

    def made(_: int, outputs: Tensor, y: Tensor) -> list[Tensor]:
        values, vectors = torch.linalg.eigh(output_hessian(loss, outputs, y))
        pairs = zip(values.clamp(min=0), vectors.T, strict=True)
        return [(value.sqrt() * vector).reshape(outputs.shape) for value, vector in pairs]

    return made


def empirical(loss: Loss) -> PseudoGradients:
    """The gradient at the label."""

    def made(_: int, outputs: Tensor, y: Tensor) -> list[Tensor]:
        leaf = outputs.clone().requires_grad_()
        return list(torch.autograd.grad(loss(leaf, y).sum(), leaf))

    return made


@dataclass(frozen=True)
class TokenPairs:
    """What one layer saw of one example: `ã` and, per pseudo-gradient, g, token by token."""

    inputs: list[Tensor]
    gradients: list[list[Tensor]]


@dataclass(frozen=True)
class DenseLayer:
    """The curvature of one layer, or of one group of it."""

    activations: Tensor
    """A, `[j, j]`."""
    gradients: Tensor
    """G, `[o, o]`."""
    pairs: list[TokenPairs]
    """What Λ is summed over."""

    def eigenvalues(self, Q_A: Tensor, Q_G: Tensor) -> Tensor:
        """Λ, `[o, j]`."""
        total = torch.zeros(Q_G.shape[0], Q_A.shape[0], dtype=torch.float64)
        for example in self.pairs:
            for gradients in example.gradients:
                product = sum(
                    (torch.outer(g, a) for g, a in zip(gradients, example.inputs, strict=True)),
                    torch.zeros_like(total),
                )
                total += (Q_G.T @ product @ Q_A) ** 2
        return total / len(self.pairs)


def groups_of(module: nn.Module) -> int:
    """Into how many parts a layer falls."""
    return module.groups if isinstance(module, CONVOLUTIONS) else 1


def dense_layer(
    model: nn.Module,
    name: str,
    x: Tensor,
    y: Tensor,
    pseudo_gradients: PseudoGradients,
    group: int = 0,
    corrections: PseudoGradients | None = None,
) -> DenseLayer:
    """A, G and the token pairs of one layer, or of one group of it, over a training set.

    `corrections` are the pseudo-gradients of Λ, where those are others than A's and G's.
    """
    pairs = _pairs(model, name, x, y, pseudo_gradients, group)
    every_input = [a for example in pairs for a in example.inputs]
    every_gradient = [g for example in pairs for gs in example.gradients for g in gs]
    A = sum((torch.outer(a, a) for a in every_input), torch.zeros(())) / len(every_input)
    G = sum((torch.outer(g, g) for g in every_gradient), torch.zeros(())) / len(pairs)
    corrected = pairs if corrections is None else _pairs(model, name, x, y, corrections, group)
    return DenseLayer(A, G, corrected)


def _pairs(
    model: nn.Module, name: str, x: Tensor, y: Tensor, pseudo_gradients: PseudoGradients, group: int
) -> list[TokenPairs]:
    module = model.get_submodule(name)
    pairs = []
    for index in range(x.shape[0]):
        calls: list[tuple[Tensor, Tensor]] = []
        handle = module.register_forward_hook(
            lambda _, args, kwargs, out: calls.append((*args, *kwargs.values(), out)),  # noqa: B023
            with_kwargs=True,
        )
        outputs = model(x[index : index + 1].clone().requires_grad_(x.is_floating_point()))
        handle.remove()
        per_direction = []
        for v in pseudo_gradients(index, outputs.detach(), y[index : index + 1]):
            reached = [out for _, out in calls]
            found = torch.autograd.grad(outputs, reached, v, retain_graph=True) if reached else ()
            pieces = zip(calls, found, strict=True)
            per_direction.append(
                [g for (given, _), piece in pieces for g in _output_tokens(module, given, piece, group)]
            )
        inputs = [a for given, out in calls for a in _input_tokens(module, given.detach(), out, group)]
        pairs.append(TokenPairs([_extended(module, a) for a in inputs], per_direction))
    return pairs


def _extended(module: nn.Module, a: Tensor) -> Tensor:
    """`ã`: the part whose parameters require grad."""
    one = torch.ones(1, dtype=a.dtype)
    parts = [a] if module.weight.requires_grad else []
    if _bias(module) is not None and _bias(module).requires_grad:
        parts.append(one)
    return torch.cat(parts)


def _bias(module: nn.Module) -> Tensor | None:
    return getattr(module, "bias", None)


def _looked_up(module: nn.Module, ids: Tensor) -> list[int]:
    """The positions that hold tokens."""
    return [place for place, token in enumerate(ids.reshape(-1).tolist()) if token != module.padding_idx]


def _input_tokens(module: nn.Module, inputs: Tensor, outputs: Tensor, group: int) -> list[Tensor]:
    if isinstance(module, LINEAR):
        return list(inputs.reshape(-1, inputs.shape[-1]))
    if isinstance(module, nn.Embedding):
        one_hot = torch.eye(module.num_embeddings, dtype=torch.float64)
        return [one_hot[inputs.reshape(-1)[place]] for place in _looked_up(module, inputs)]
    width = module.weight.shape[1]
    channels = inputs[0, group * width : (group + 1) * width]
    return [_patch(module, channels, place) for place in _positions(outputs)]


def _positions(outputs: Tensor) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(extent) for extent in outputs.shape[2:])))


def _patch(module: nn.Module, channels: Tensor, place: tuple[int, ...]) -> Tensor:
    """What the kernel sees at one output position, number by number."""
    patch = torch.zeros(channels.shape[0], *module.kernel_size, dtype=channels.dtype)
    for offset in itertools.product(*(range(size) for size in module.kernel_size)):
        found = []
        for axis, extent in enumerate(channels.shape[1:]):
            if module.padding == "same":
                before = module.dilation[axis] * (module.kernel_size[axis] - 1) // 2
            else:
                before = module.padding[axis]
            at = place[axis] * module.stride[axis] + offset[axis] * module.dilation[axis] - before
            found.append(_inside(at, extent, module.padding_mode))
        if None not in found:
            patch[(slice(None), *offset)] = channels[(slice(None), *found)]
    return patch.reshape(-1)


def _inside(at: int, extent: int, mode: str) -> int | None:
    """Which element stands at a place that may be outside; None is a zero."""
    match mode:
        case "circular":
            return at % extent
        case "replicate":
            return min(max(at, 0), extent - 1)
        case "reflect":
            mirrored = abs(at)
            return mirrored if mirrored < extent else 2 * (extent - 1) - mirrored
        case _:
            return at if 0 <= at < extent else None


def _output_tokens(module: nn.Module, inputs: Tensor, gradients: Tensor, group: int) -> list[Tensor]:
    if isinstance(module, LINEAR):
        return list(gradients.reshape(-1, gradients.shape[-1]))
    if isinstance(module, nn.Embedding):
        return [gradients.reshape(-1, gradients.shape[-1])[place] for place in _looked_up(module, inputs)]
    rows = gradients.shape[1] // module.groups
    own = gradients[0, group * rows : (group + 1) * rows]
    return [own[(slice(None), *place)] for place in _positions(gradients)]


def curvature(
    model: nn.Module, layers: Mapping[tuple[str, int], tuple[DenseLayer, Tensor, Tensor, Tensor]]
) -> Tensor:
    """`[P, P]` from the `(·, Q_A, Q_G, Λ)` of each layer's groups: blocks of explicit Kronecker products,
    zero between.
    """
    width = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = torch.zeros(width, width, dtype=torch.float64)
    for (name, group), (_, Q_A, Q_G, eigenvalues) in layers.items():
        # `torch.kron` raises a RuntimeError where only one of two matrices is contiguous.
        basis = torch.kron(Q_G.contiguous(), Q_A.contiguous())
        block = basis @ torch.diag(eigenvalues.reshape(-1)) @ basis.T
        places = _places(model, name, group)
        total[places[:, None], places] = block
    return total


def _places(model: nn.Module, name: str, group: int) -> Tensor:
    """Flat columns of a group's rows of the layer's `[o, j]` matrix, row by row."""
    module = model.get_submodule(name)
    prefix = f"{name}." if name else ""
    transposed = isinstance(module, TRANSPOSED)
    o = module.weight.shape[1 if transposed else 0]
    parts = []
    if module.weight.requires_grad:
        weight = columns_of(model, (prefix + "weight",))
        parts.append(weight.reshape(-1, o).T if transposed else weight.reshape(o, -1))
    if _bias(module) is not None and _bias(module).requires_grad:
        parts.append(columns_of(model, (prefix + "bias",)).reshape(o, 1))
    rows = o // groups_of(module)
    return torch.cat(parts, dim=1)[group * rows : (group + 1) * rows].reshape(-1)
