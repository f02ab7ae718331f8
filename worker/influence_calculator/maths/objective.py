"""What is differentiated: the loss of one example as a function of the tracked parameters.

Everything above asks an `Objective` for outputs and per-example losses; nothing else calls the
user's model or loss. A *batch* is a pytree of tensors that share their leading dimension.

Shapes: n examples in a batch, P tracked parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from influence_calculator.maths.checkpoints import Checkpoints
from influence_calculator.maths.errors import UnsupportedModelError
from influence_calculator.maths.kept_attributes import attributes_kept, keep_for_this_call
from influence_calculator.maths.own_modes import eagerly
from influence_calculator.maths.vmapped_losses import GatheredLosses

T = TypeVar("T")

Batch = Any
"""A pytree (tensor, tuple, list, dict) of tensors that share their leading dimension."""

Loss = Callable[[Any, Batch], Tensor]
"""`loss(outputs, batch)`: a scalar, reduced over a batch in any way."""

Forward = Callable[[nn.Module, Batch], Any]
"""`forward(model, batch) -> outputs`: a pytree whose tensors have the leading dimension n."""


class IndexedBatch(NamedTuple):
    """A batch and the index of its first example in the training set.

    The index keys random draws, so that they do not depend on how the data is cut into batches.
    """

    start: int
    batch: Batch


class TrainingData(Protocol):
    """The training set as often as it is asked for, always in the same order."""

    @property
    def length(self) -> int:
        """Number of examples."""

    def batches(self) -> Iterator[IndexedBatch]:
        """One pass over all examples."""


def batch_size(batch: Batch) -> int:
    """The leading dimension that all leaves of `batch` share.

    Raises:
        ValueError: no tensor in it, something else, or leaves that disagree.
    """
    leaves = pytree.tree_leaves(batch)
    if not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        raise ValueError(_not_of_examples(batch))
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) != 1:
        raise ValueError(
            f"batch: expected tensors that share their first dimension, got first dimensions "
            f"{sorted(sizes)}; return one entry per example in every tensor"
        )
    return int(sizes.pop())


def _not_of_examples(batch: Batch) -> str:
    """Says what of a batch is no tensor with an entry per example."""
    path, leaf = next(
        (path, leaf)
        for path, leaf in pytree.tree_flatten_with_path(batch)[0]
        if not (isinstance(leaf, Tensor) and leaf.dim())
    )
    what = f"a number of shape {list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
    if isinstance(leaf, Mapping):
        cure = "give dict(...) of it, as a model that is called with keywords takes too"
    elif leaf is None:
        cure = "leave it out, or give a tensor that is not used, torch.zeros(n)"
    else:
        cure = "return one entry per example in every tensor"
    return f"batch{pytree.keystr(path)}: expected tensors with examples first, got {what}; {cure}"


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch there.

    Raises:
        ValueError: something in it that is no tensor; names its place.
    """
    if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(batch)):
        raise ValueError(_not_of_examples(batch))
    # What inference mode made cannot be kept for a backward pass.
    return pytree.tree_map(lambda leaf: (leaf.clone() if leaf.is_inference() else leaf).to(device), batch)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for what inference mode made, which does not tell."""
    return 0 if tensor.is_inference() else tensor._version


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Examples `start` to `stop` of a batch, as views."""
    return pytree.tree_map(lambda leaf: leaf[start:stop], batch)


def micro_batches(indexed: IndexedBatch, size: int) -> Iterator[IndexedBatch]:
    """`indexed` cut into pieces of at most `size` examples, in order."""
    for offset in range(0, batch_size(indexed.batch), size):
        piece = slice_batch(indexed.batch, offset, offset + size)
        yield IndexedBatch(indexed.start + offset, piece)


class _Around(nn.Module):
    """Whatever is computed with the model, as one module for `functional_call`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


def unsqueezed(tree: Any) -> Any:
    """One example's tensors as those of a batch of one."""
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.unsqueeze(0), tree)


def only_tensors(outputs: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a model's outputs, and what makes outputs of others in their place.

    Whatever else the outputs hold (None, numbers, a language model's cache) stays in its place.
    """
    leaves, structure = pytree.tree_flatten(outputs)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuilt(tensors: Sequence[Tensor]) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return pytree.tree_unflatten(filled, structure)

    return [leaves[place] for place in places], rebuilt


class Seen(NamedTuple):
    """What a look at a few examples found of a model at work; the fields of `Objective` of these names."""

    by_hand: tuple[str, ...] = ()
    untried: tuple[str, ...] = ()
    channels_last: bool = False


@dataclass(frozen=True)
class Objective:
    """`ℓ_i(θ) = loss(forward(model, batch[i:i+1]), batch[i:i+1])`.

    The user's reduction applies inside ONE example, so a loss that means and one that sums over the
    batch are the same objective.
    """

    model: nn.Module
    loss: Loss
    forward: Forward
    names: tuple[str, ...]
    """Tracked parameters, in the order of `model.named_parameters()`."""
    checkpoints: Checkpoints | None = None
    """States of the model, for methods that sum over them."""
    by_hand: tuple[str, ...] = ()
    """Parameters that the model uses otherwise than by calling their layer or embedding on its examples, as
    far as somebody looked."""
    untried: tuple[str, ...] = ()
    """Layers that none of the examples reached that somebody looked at."""
    channels_last: bool = False
    """Whether two-dimensional convolutions are captured with channels last in memory, as somebody tried."""
    _module: _Around = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_module", _Around(self.model))

    def parameters(self) -> dict[str, Tensor]:
        """The tracked parameters, detached (they share memory with the model)."""
        own = dict(self.model.named_parameters())
        return {name: own[name].detach() for name in self.names}

    @property
    def device(self) -> torch.device:
        """Where the tracked parameters are."""
        return self.model.get_parameter(self.names[0]).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tracked parameter."""
        return self.model.get_parameter(self.names[0]).dtype

    def with_loss(self, loss: Loss) -> Objective:
        """The same model under another loss (a job's `measurement`)."""
        return replace(self, loss=loss)

    @property
    def seen(self) -> Seen:
        """For whoever has not looked."""
        return Seen(self.by_hand, self.untried, self.channels_last)

    def with_seen(self, seen: Seen) -> Objective:
        """The same model as somebody saw it."""
        return replace(self, **seen._asdict())

    def in_state_of(self, model: nn.Module) -> Objective:
        """The objective with another state of the same model."""
        return replace(self, model=model, checkpoints=None)

    def outputs(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Any:
        """The model's outputs; with `parameters`, these in place of the tracked ones.

        Parameters that are not tracked take no gradient.
        """
        with self._passing(is_whole=torch._C._functorch.maybe_current_level() is not None):
            return self._holding(parameters or {}, lambda: self._answered(batch))

    def _answered(self, batch: Batch) -> Any:
        try:
            return self.forward(self.model, batch)
        except RuntimeError as error:
            if "mutate a captured Tensor" not in str(error):
                raise
            raise UnsupportedModelError(self._changes_a_buffer()) from error

    def _holding(self, parameters: Mapping[str, Tensor], compute: Callable[[], T]) -> T:
        """`compute()` while the model holds these in place of its own parameters, and all others detached."""
        own = dict(self.model.named_parameters())
        given = {id(own[name]): value for name, value in parameters.items()}
        # Every module once and every parameter of it: `functional_call`, left to tie weights itself, does not
        # give a module that has two names its parameters back.
        values = {
            f"{prefix}.{name}": given.get(id(p), p.detach())
            for prefix, module in self.model.named_modules(prefix="model")
            for name, p in module._parameters.items()
            if p is not None
        }
        result: T = functional_call(self._module, values, (compute,), tie_weights=False)
        return result

    @contextmanager
    def _passing(self, *, is_whole: bool) -> Iterator[None]:
        """Around a forward pass. `is_whole`: nobody reads afterwards what it stores in the model."""
        with ExitStack() as entered:
            entered.enter_context(eagerly())
            entered.enter_context(self._differentiable())
            keep_for_this_call(self.model, self._modules())
            if is_whole:
                entered.enter_context(attributes_kept(self.model.modules()))
            yield

    def _modules(self) -> Iterator[nn.Module]:
        """Those of the model, and of a loss that is one."""
        yield from self.model.modules()
        loss = self.loss.loss if isinstance(self.loss, _XYLoss) else self.loss
        if isinstance(loss, nn.Module):
            yield from loss.modules()

    def _changes_a_buffer(self) -> str:
        names = [name for name, _ in self.model.named_buffers()]
        return (
            f"forward changes a tensor in place that it did not make, one of the buffers {names[:5]}: torch "
            "does not differentiate that in this way; change it only if self.training, or count in a number "
            "of Python"
        )

    def _differentiable(self) -> AbstractContextManager[None]:
        """Recurrent layers of cuDNN have a backward pass in training mode alone, and no second derivative.

        In a model with such layers the others do without cuDNN too.
        """
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Per-example losses `[n]` of outputs that came from `batch`."""
        with eagerly():
            return self._losses(outputs, batch)

    def _losses(self, outputs: Any, batch: Batch) -> Tensor:
        tensors, rebuilt = only_tensors(outputs)

        def one(own: list[Tensor], example: Batch) -> Tensor:
            return self.one_loss(rebuilt(own), example)

        try:
            with GatheredLosses():
                return vmap(one)(tensors, batch)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):
            # A loss with data-dependent control flow (`.item()`, `if`) cannot be vmapped.
            n = batch_size(batch)
            rows = [
                one([tensor[i] for tensor in tensors], pytree.tree_map(lambda leaf, i=i: leaf[i], batch))
                for i in range(n)
            ]
            return torch.stack(rows)

    def losses_at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Per-example losses `[n]` at the given parameters, which the loss sees in the model too."""
        with self._passing(is_whole=True):
            return self._holding(parameters, lambda: self.losses(self._answered(batch), batch))

    def example_loss(self, parameters: Mapping[str, Tensor], example: Batch) -> Tensor:
        """`ℓ_i(θ)` of one example, given without its batch dimension."""
        batch = unsqueezed(example)
        with self._passing(is_whole=True):
            return self._holding(parameters, lambda: self.loss(self._answered(batch), batch).sum())

    def loss_as_written(self, batch: Batch) -> Tensor:
        """The loss of a batch by the model's own parameters, which nothing takes the place of."""
        with self._passing(is_whole=True):
            return self.loss(self._answered(batch), batch).sum()

    def one_loss(self, output: Any, example: Batch) -> Tensor:
        """One example's loss of its output, both given without their batch dimension."""
        return self.loss(unsqueezed(output), unsqueezed(example)).sum()


def xy_objective(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], names: tuple[str, ...] | None = None
) -> Objective:
    """The objective of pyDVL's convention: batches are `(x, y)`, the loss is `loss(model(x), y)`."""
    if names is None:
        names = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    return Objective(model, _XYLoss(loss), _forward_x, names)


def _forward_x(model: nn.Module, batch: Batch) -> Any:
    return model(batch[0])


@dataclass(frozen=True)
class _XYLoss:
    """A class, not a closure: objectives travel to Dask workers by pickle."""

    loss: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        return self.loss(outputs, batch[1])
