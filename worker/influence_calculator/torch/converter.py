"""Between torch tensors and numpy arrays, and what makes one tensor of a lazy sequence's chunks."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from influence_calculator.array import (
    LazyChunkSequence,
    NestedLazyChunkSequence,
    NestedSequenceAggregator,
    NumpyConverter,
    SequenceAggregator,
)


class TorchNumpyConverter(NumpyConverter[Tensor]):
    """Any tensor to numpy; arrays to tensors on one device.

    Args:
        device: where tensors are made; default: host memory.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = device

    def to_numpy(self, x: Tensor) -> NDArray[Any]:
        """The values, detached, in host memory; bfloat16, which numpy lacks, as float32."""
        host = x.detach().cpu()
        values: NDArray[Any] = (host.float() if host.dtype == torch.bfloat16 else host).numpy()
        return values

    def from_numpy(self, x: NDArray[Any]) -> Tensor:
        """The values as a tensor; memory is shared where the array is writable and torch has its layout."""
        if not x.dtype.isnative:
            x = x.astype(x.dtype.newbyteorder("="))
        # Torch cannot share what Dask received over the network, and steps forward by whole numbers alone.
        if not x.flags.writeable or any(stride < 0 or stride % x.itemsize for stride in x.strides):
            x = x.copy()
        tensor = torch.from_numpy(x)
        return tensor if self.device is None else tensor.to(self.device)


class TorchCatAggregator(SequenceAggregator[Tensor]):
    """The chunks as one tensor.

    Raises:
        ValueError: no chunk.
    """

    def __call__(self, tensor_sequence: LazyChunkSequence[Tensor]) -> Tensor:
        return _joined("data iterable", list(tensor_sequence.generator_factory()))


class NestedTorchCatAggregator(NestedSequenceAggregator[Tensor]):
    """Rows of chunks as one tensor.

    Raises:
        ValueError: no row, or rows without chunks.
    """

    def __call__(self, nested_sequence_of_tensors: NestedLazyChunkSequence[Tensor]) -> Tensor:
        rows = nested_sequence_of_tensors.generator_factory()
        joined = [_joined("training data iterable", list(row), dim=1) for row in rows]
        return _joined("test data iterable", joined)


def _joined(data: str, chunks: list[Tensor], dim: int = 0) -> Tensor:
    if not chunks:
        raise ValueError(
            f"sequence: expected at least one chunk, got none; the {data} is empty: give it a batch, "
            "or compute without an aggregator"
        )
    return torch.cat(chunks, dim=dim)
