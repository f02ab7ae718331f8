"""Per-example gradients of a torch model as a building block: by parameter, flat, by input, and multiplied.

Shapes: n examples of a batch, q rows, P parameters restricted to, F... feature dimensions of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from influence_calculator.maths.gradients import accumulation_dtype, collected, projected
from influence_calculator.maths.layout import Slot, tensors_of
from influence_calculator.maths.objective import batch_size, on_device
from influence_calculator.maths.own_modes import own_modes
from influence_calculator.maths.perturbation import perturbations
from influence_calculator.torch.restricted_model import RestrictedBlock, RestrictedModel, RestrictTo
from influence_calculator.torch.util import LossType
from influence_calculator.types import Batch, GradientProvider


@dataclass(frozen=True)
class TorchBatch(Batch[Tensor]):
    """Inputs and labels of the same examples: tensors, or dicts, lists or tuples of tensors.

    Raises:
        ValueError: x and y of different lengths, or something in them that is no tensor with examples first.
    """

    x: Any
    y: Any

    def __post_init__(self) -> None:
        examples, labels = batch_size({"x": self.x}), batch_size({"y": self.y})
        if examples != labels:
            raise ValueError(
                f"y: expected one label for each of the {examples} examples of x, got "
                f"{labels}; give both of the same examples"
            )

    def __iter__(self) -> Iterator[Any]:
        return iter((self.x, self.y))

    def __len__(self) -> int:
        return batch_size(self.x)

    def to(self, device: torch.device | str) -> TorchBatch:
        """The batch on a device."""
        return TorchBatch(*on_device((self.x, self.y), torch.device(device)))


class TorchGradientProvider(RestrictedBlock, GradientProvider[TorchBatch, Tensor]):
    """Gradients of one example each, `∇θ ℓ_i` with `ℓ_i = loss(model(x[i:i+1]), y[i:i+1])`.

    Args:
        model: in eval mode.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        restrict_to: parameters by name, in the order of the columns; None: all that require grad. The names
            count: gradients are taken at the model's own values.

    The first batch is probed as `fit` of an influence model probes its data; one without examples has no row,
    and is not shown to the model. Not thread-safe: differentiating puts hooks on the model's layers.
    """

    def __init__(self, model: nn.Module, loss: LossType, restrict_to: RestrictTo | None) -> None:
        self._restricted = RestrictedModel(model, loss, restrict_to)

    def grads(self, batch: TorchBatch) -> dict[str, Tensor]:
        """Parameter -> gradients `[n, *shape]`."""
        flat = self.flat_grads(batch)
        return tensors_of(flat, self._restricted.layout.slots, flat.dtype)

    def mixed_grads(self, batch: TorchBatch) -> dict[str, Tensor]:
        """Parameter -> derivatives of the gradients by the input, `[n, F..., *shape]`."""
        flat = self.flat_mixed_grads(batch)

        def own_columns(slot: Slot) -> Any:
            columns = slice(slot.start, slot.start + slot.size)
            return pytree.tree_map_only(
                Tensor, lambda leaf: leaf[..., columns].reshape(*leaf.shape[:-1], *slot.shape), flat
            )

        return {slot.name: own_columns(slot) for slot in self._restricted.layout.slots}

    @override
    @own_modes()
    def jacobian_prod(self, batch: TorchBatch, g: Tensor) -> Tensor:
        """`g_k · g(x_i)`, `[q, n]`: parameter by parameter, so that no gradient is held as a whole."""
        own = self._restricted
        pair, rows = own.batch(*batch), self._checked(g)
        if len(batch) == 0:
            return rows.new_zeros(len(rows), 0)
        return projected(own.objective, pair, own.layout, {"": rows})[""].T

    @override
    @own_modes()
    def flat_grads(self, batch: TorchBatch) -> Tensor:
        """`[n, P]`; float32 for parameters of half precision."""
        own = self._restricted
        pair = own.batch(*batch)
        if len(batch) == 0:
            dtype = accumulation_dtype(own.dtype)
            return torch.zeros(0, own.layout.width, dtype=dtype, device=own.device)
        return collected(own.objective, pair, own.layout)[""]

    @override
    def flat_mixed_grads(self, batch: TorchBatch) -> Tensor:
        """`[n, F..., P]`, n · F · P numbers: `mixed_grads_prod` takes far less. One each of several inputs.

        Raises:
            UnsupportedInputError: x is no floating-point tensor, such as token ids.
        """
        width = self._restricted.layout.width
        mixed = self.mixed_grads_prod(batch, torch.eye(width, dtype=self.dtype, device=self.device))
        by_column: Tensor = pytree.tree_map_only(Tensor, lambda leaf: leaf.movedim(0, -1), mixed)
        return by_column

    @override
    @own_modes()
    def mixed_grads_prod(self, batch: TorchBatch, g: Tensor) -> Tensor:
        """`∇x (g_k · g(x_i))`, `[q, n, F...]`: two backward passes per row, and no gradient is formed.

        Of several inputs that move one each, in the structure of x.

        Raises:
            UnsupportedInputError: x is no floating-point tensor, such as token ids.
        """
        own = self._restricted
        pair, rows = own.batch(*batch), self._checked(g)
        return perturbations(own, own.objective, {"": rows}, pair, max(1, len(batch)))

    def _checked(self, g: Tensor) -> Tensor:
        width = self._restricted.layout.width
        if g.ndim != 2 or g.shape[1] != width:
            raise ValueError(
                f"g: expected rows [q, {width}], one column per parameter, got {list(g.shape)}; "
                "give one row for each product"
            )
        return self._restricted.rows(g)
