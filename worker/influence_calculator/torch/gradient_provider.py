"""Per-example gradients of a torch model as a building block: by parameter, flat, by input, and multiplied.

Shapes: n examples of a batch, q rows, P parameters restricted to, F... feature dimensions of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from influence_calculator.maths.denormals import denormals_flushed
from influence_calculator.maths.gradients import collected, projected
from influence_calculator.maths.layout import tensors_of
from influence_calculator.maths.perturbation import perturbations
from influence_calculator.torch.restricted_model import RestrictedBlock, RestrictedModel, RestrictTo
from influence_calculator.torch.util import LossType
from influence_calculator.types import Batch, GradientProvider


@dataclass(frozen=True)
class TorchBatch(Batch[Tensor]):
    """Inputs and labels of the same examples.

    Raises:
        ValueError: x and y of different lengths.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.x.shape[0] != self.y.shape[0]:
            raise ValueError(
                f"y: expected one label for each of the {self.x.shape[0]} examples of x, got "
                f"{self.y.shape[0]}; give both of the same examples"
            )

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.y))

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def to(self, device: torch.device | str) -> TorchBatch:
        """The batch on a device."""
        return TorchBatch(self.x.to(device), self.y.to(device))


class TorchGradientProvider(RestrictedBlock, GradientProvider[TorchBatch, Tensor]):
    """Gradients of one example each, `∇θ ℓ_i` with `ℓ_i = loss(model(x[i:i+1]), y[i:i+1])`.

    Args:
        model: in eval mode.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        restrict_to: parameters by name, in the order of the columns; None: all that require grad. The names
            count: gradients are taken at the model's own values.

    The first batch is probed as `fit` of an influence model probes its data. Not thread-safe: differentiating
    puts hooks on the model's layers.
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
        return {
            slot.name: flat[..., slot.start : slot.start + slot.size].reshape(*batch.x.shape, *slot.shape)
            for slot in self._restricted.layout.slots
        }

    @override
    @denormals_flushed()
    def jacobian_prod(self, batch: TorchBatch, g: Tensor) -> Tensor:
        """`g_k · g(x_i)`, `[q, n]`: parameter by parameter, so that no gradient is held as a whole."""
        own = self._restricted
        pair, rows = own.batch(*batch), self._checked(g)
        return projected(own.objective, pair, own.layout, {"": rows})[""].T

    @override
    @denormals_flushed()
    def flat_grads(self, batch: TorchBatch) -> Tensor:
        """`[n, P]`; float32 for parameters of half precision."""
        own = self._restricted
        return collected(own.objective, own.batch(*batch), own.layout)[""]

    @override
    def flat_mixed_grads(self, batch: TorchBatch) -> Tensor:
        """`[n, F..., P]`, n · F · P numbers: `mixed_grads_prod` takes far less.

        Raises:
            UnsupportedInputError: x is no floating-point tensor, such as token ids.
        """
        width = self._restricted.layout.width
        return self.mixed_grads_prod(batch, torch.eye(width, dtype=self.dtype, device=self.device)).movedim(
            0, -1
        )

    @override
    @denormals_flushed()
    def mixed_grads_prod(self, batch: TorchBatch, g: Tensor) -> Tensor:
        """`∇x (g_k · g(x_i))`, `[q, n, F...]`: two backward passes per row, and no gradient is formed.

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
