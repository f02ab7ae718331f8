"""Arrays that are computed chunk by chunk, on demand, and where the chunks go.

The sequential calculator returns these. A sequence is a recipe: every `compute` and every `to_zarr`
asks the generator factory for the chunks anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic

import zarr
from numpy.typing import NDArray
from zarr.storage import StoreLike

from influence_calculator.storage import create_array, require_free
from influence_calculator.types import TensorType


class NumpyConverter(Generic[TensorType], ABC):
    """Between a framework's tensors and numpy arrays."""

    @abstractmethod
    def to_numpy(self, x: TensorType) -> NDArray[Any]:
        """The tensor's values in host memory."""

    @abstractmethod
    def from_numpy(self, x: NDArray[Any]) -> TensorType:
        """A tensor of the array's values; the array may be read-only."""


class SequenceAggregator(Generic[TensorType], ABC):
    """Makes one value of a sequence of chunks."""

    @abstractmethod
    def __call__(self, tensor_sequence: LazyChunkSequence[TensorType]) -> Any:
        """The value."""


class NestedSequenceAggregator(Generic[TensorType], ABC):
    """Makes one value of rows of chunks."""

    @abstractmethod
    def __call__(self, nested_sequence_of_tensors: NestedLazyChunkSequence[TensorType]) -> Any:
        """The value."""


class ListAggregator(SequenceAggregator[TensorType]):
    """The chunks as a list."""

    def __call__(self, tensor_sequence: LazyChunkSequence[TensorType]) -> list[TensorType]:
        return list(tensor_sequence.generator_factory())


class NestedListAggregator(NestedSequenceAggregator[TensorType]):
    """The chunks as a list (rows) of lists (columns)."""

    def __call__(
        self, nested_sequence_of_tensors: NestedLazyChunkSequence[TensorType]
    ) -> list[list[TensorType]]:
        return [list(row) for row in nested_sequence_of_tensors.generator_factory()]


class LazyChunkSequence(Generic[TensorType]):
    """An array `[n, ...]` in chunks along the first dimension.

    Args:
        generator_factory: yields the chunks in order, from the start at every call.
        len_generator: number of chunks, if known.
    """

    def __init__(
        self, generator_factory: Callable[[], Iterator[TensorType]], len_generator: int | None = None
    ) -> None:
        self.generator_factory = generator_factory
        self.len_generator = len_generator

    def compute(self, aggregator: SequenceAggregator[TensorType] | None = None) -> Any:
        """Computes all chunks and hands them to `aggregator` (default: a list)."""
        return (aggregator or ListAggregator())(self)

    def to_zarr(
        self,
        path_or_url: StoreLike,
        converter: NumpyConverter[TensorType],
        return_stored: bool = False,
        overwrite: bool = False,
    ) -> zarr.Array[Any] | None:
        """Computes chunk after chunk into a Zarr array; one chunk is in memory at a time.

        Args:
            path_or_url: a path, a URL or a zarr store.
            converter: from the framework's tensors.
            return_stored: return the array, else None.
            overwrite: replace an array that is there.

        Raises:
            ContainsArrayError: there is an array and `overwrite` is False; nothing is computed.
            ContainsGroupError: there is a group, which is never replaced; nothing is computed.
            ValueError: there is no chunk.
        """
        writer = _GrowingArray(path_or_url, overwrite)
        row = 0
        for chunk in self.generator_factory():
            block = converter.to_numpy(chunk)
            writer.write((row,), block)
            row += block.shape[0]
        stored = writer.finished()
        return stored if return_stored else None


class NestedLazyChunkSequence(Generic[TensorType]):
    """An array `[m, n, ...]` in chunks along the first two dimensions.

    Args:
        generator_factory: yields rows in order, each an iterator over the row's chunks; rows may be
            consumed after the next one was asked for.
        len_outer_generator: number of rows of chunks, if known.
    """

    def __init__(
        self,
        generator_factory: Callable[[], Iterator[Iterator[TensorType]]],
        len_outer_generator: int | None = None,
    ) -> None:
        self.generator_factory = generator_factory
        self.len_outer_generator = len_outer_generator

    def compute(self, aggregator: NestedSequenceAggregator[TensorType] | None = None) -> Any:
        """Computes all chunks and hands them to `aggregator` (default: a list of lists)."""
        return (aggregator or NestedListAggregator())(self)

    def to_zarr(
        self,
        path_or_url: StoreLike,
        converter: NumpyConverter[TensorType],
        return_stored: bool = False,
        overwrite: bool = False,
    ) -> zarr.Array[Any] | None:
        """As `LazyChunkSequence.to_zarr`, row of chunks after row of chunks."""
        writer = _GrowingArray(path_or_url, overwrite)
        row = 0
        for chunks in self.generator_factory():
            column, height = 0, 0
            for chunk in chunks:
                block = converter.to_numpy(chunk)
                writer.write((row, column), block)
                column += block.shape[1]
                height = block.shape[0]
            row += height
        stored = writer.finished()
        return stored if return_stored else None


class _GrowingArray:
    """A Zarr array that is created by the first block and grows with the others.

    Raises:
        ContainsArrayError, ContainsGroupError: its place is taken, which is said before there is a block.
    """

    def __init__(self, path_or_url: StoreLike, overwrite: bool) -> None:
        require_free(path_or_url, overwrite=overwrite)
        self._place = path_or_url
        self._overwrite = overwrite
        self._array: zarr.Array[Any] | None = None

    def write(self, origin: tuple[int, ...], block: NDArray[Any]) -> None:
        """Writes `block` with its first element at `origin` (leading dimensions; the rest start at 0)."""
        if self._array is None:
            self._array = create_array(
                self._place, block.shape, block.shape, block.dtype, overwrite=self._overwrite
            )
        starts = origin + (0,) * (block.ndim - len(origin))
        stops = tuple(start + extent for start, extent in zip(starts, block.shape, strict=True))
        grown = tuple(map(max, self._array.shape, stops))
        if grown != self._array.shape:
            self._array.resize(grown)
        self._array[tuple(map(slice, starts, stops))] = block

    def finished(self) -> zarr.Array[Any]:
        """The array with everything written.

        Raises:
            ValueError: nothing was written.
        """
        if self._array is None:
            raise ValueError("sequence: expected at least one chunk, got none; the data iterable is empty")
        return self._array
