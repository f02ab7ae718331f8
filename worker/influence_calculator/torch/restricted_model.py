"""A model, its loss, and the parameters that a building block is about.

Every operator, batch operation and gradient provider has one of these; what they compute is the maths'.

Shapes: q rows, P parameters restricted to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from influence_calculator.maths.blocks import BlockMode, block_layout
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.objective import batch_size, on_device, xy_objective
from influence_calculator.maths.own_modes import own_modes
from influence_calculator.maths.probe import probe, refuse_training_mode
from influence_calculator.torch.util import LossType

RestrictTo = Mapping[str, Tensor]
"""Parameters by name; the names count, and their order, which is that of columns."""


class RestrictedModel:
    """What is differentiated, and where each parameter's columns lie.

    Raises:
        ValueError: a name that is no parameter of the model, or none at all.
    """

    def __init__(self, model: nn.Module, loss: LossType, restrict_to: RestrictTo | None) -> None:
        self.model = model
        self.loss = loss
        names = None if restrict_to is None else _checked_names(model, restrict_to)
        self.objective = xy_objective(model, loss, names)
        self.layout = block_layout(self.objective, BlockMode.FULL)
        self._is_probed = False

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and where batches are moved."""
        return self.objective.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.objective.dtype

    @property
    def structure(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape, in the order of columns."""
        return {slot.name: slot.shape for slot in self.layout.slots}

    def to(self, device: torch.device | str) -> None:
        """Moves the model, and with it its parameters."""
        self.model.to(device)

    def rows(self, tensor: Tensor) -> Tensor:
        """Rows where the parameters are, in the dtype that gradients are summed in."""
        return tensor.detach().to(self.device, accumulation_dtype(self.dtype))

    @own_modes()
    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Examples where the parameters are; x may be a pytree of tensors.

        Raises:
            ValueError: the first examples ever seen cannot be differentiated in a batch (`probe`).
        """
        pair: tuple[Any, Any] = on_device((x, y), self.device)
        refuse_training_mode(self.model)
        if not self._is_probed and batch_size(pair) > 0:
            self.objective = probe(self.objective, pair)
            self._is_probed = True
        return pair


class RestrictedBlock:
    """What building blocks say of the model that they are about."""

    _restricted: RestrictedModel

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._restricted.model

    @property
    def loss(self) -> LossType:
        """The loss."""
        return self._restricted.loss

    @property
    def params_to_restrict_to(self) -> dict[str, Tensor]:
        """The parameters that this is about, detached, in the order of the columns."""
        return self._restricted.objective.parameters()

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and where batches and vectors are moved."""
        return self._restricted.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self._restricted.dtype

    def to(self, device: torch.device | str) -> Self:
        """Moves the model to a device, and returns this block."""
        self._restricted.to(device)
        return self


def _checked_names(model: nn.Module, restrict_to: RestrictTo) -> tuple[str, ...]:
    own = dict(model.named_parameters())
    unknown = [name for name in restrict_to if name not in own]
    if unknown or not restrict_to:
        raise ValueError(
            f"restrict_to: expected parameters of the model by name, got {unknown or 'none'}; "
            f"its parameters are {', '.join(own)}"
        )
    return tuple(restrict_to)
