"""Operators composed with gradients, block by block, for torch."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.torch.gradient_provider import TorchBatch, TorchGradientProvider
from influence_calculator.torch.tensor_operator import TorchOperatorType
from influence_calculator.types import BlockMapper, OperatorGradientComposition


class TorchOperatorGradientComposition(
    OperatorGradientComposition[Tensor, TorchBatch, TorchOperatorType, TorchGradientProvider]
):
    """One block of a torch model.

    Args:
        op: mostly `(H + λI)^-1` of the block's curvature.
        gp: gradients by the block's parameters, in the same order of columns.
    """

    def __init__(self, op: TorchOperatorType, gp: TorchGradientProvider) -> None:
        super().__init__(op, gp)

    def to(self, device: torch.device | str) -> Self:
        """Moves both to a device, and returns this composition."""
        self.gp = self.gp.to(device)
        self.op = self.op.to(device)
        return self


class TorchBlockMapper(BlockMapper[Tensor, TorchBatch, TorchOperatorGradientComposition[Any]]):
    """All blocks of a torch model.

    Args:
        composable_block_dict: block -> its operator and gradients; columns of factors of all blocks stand
            side by side in this order.
    """

    def __init__(
        self, composable_block_dict: OrderedDict[str, TorchOperatorGradientComposition[Any]]
    ) -> None:
        super().__init__(composable_block_dict)

    @override
    def _split_to_blocks(self, z: Tensor, dim: int = -1) -> OrderedDict[str, Tensor]:
        widths = [block.op.input_size for block in self.composable_block_dict.values()]
        if z.shape[dim] != sum(widths):
            raise ValueError(
                f"factors: expected {sum(widths)} columns, {widths} of the blocks "
                f"{list(self.composable_block_dict)}, got {z.shape[dim]}; pass what "
                "transformed_grads returned"
            )
        return OrderedDict(zip(self.composable_block_dict, z.split(widths, dim=dim), strict=True))

    def to(self, device: torch.device | str) -> Self:
        """Moves all blocks to a device, and returns this mapper."""
        for name, block in self.composable_block_dict.items():
            self.composable_block_dict[name] = block.to(device)
        return self
