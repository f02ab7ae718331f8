"""Lazy sequences compute on demand, in any order, and write what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor
from zarr.errors import ContainsArrayError, ContainsGroupError

from influence_calculator import (
    LazyChunkSequence,
    NestedLazyChunkSequence,
    NestedTorchCatAggregator,
    TorchCatAggregator,
    TorchNumpyConverter,
)

WHOLE = torch.arange(35, dtype=torch.float32).reshape(7, 5)


def chunks() -> Iterator[Tensor]:
    yield from WHOLE.split(3)


def rows() -> Iterator[Iterator[Tensor]]:
    yield from (iter(row.split(2, dim=1)) for row in WHOLE.split(3))


def refuse_to_compute() -> Iterator[Tensor]:
    raise AssertionError("computed although it must not")
    yield


def test_compute_returns_a_list_of_chunks_without_an_aggregator():
    computed = LazyChunkSequence(chunks).compute()
    assert [chunk.shape[0] for chunk in computed] == [3, 3, 1]
    nested = NestedLazyChunkSequence(rows).compute()
    assert [[chunk.shape[1] for chunk in row] for row in nested] == [[2, 2, 1]] * 3


def test_the_torch_aggregators_put_the_whole_together():
    assert torch.equal(LazyChunkSequence(chunks).compute(TorchCatAggregator()), WHOLE)
    assert torch.equal(NestedLazyChunkSequence(rows).compute(NestedTorchCatAggregator()), WHOLE)


def test_a_sequence_can_be_computed_twice():
    lazy = LazyChunkSequence(chunks, len_generator=3)
    assert torch.equal(lazy.compute(TorchCatAggregator()), lazy.compute(TorchCatAggregator()))


@pytest.mark.parametrize("sequence", [LazyChunkSequence(chunks), NestedLazyChunkSequence(rows)])
def test_to_zarr_writes_short_last_chunks_and_returns_the_array_only_when_asked(sequence, tmp_path: Path):
    stored = sequence.to_zarr(str(tmp_path / "a.zarr"), TorchNumpyConverter(), return_stored=True)
    assert np.array_equal(stored[:], WHOLE.numpy())
    assert stored.dtype == np.float32
    assert sequence.to_zarr(str(tmp_path / "b.zarr"), TorchNumpyConverter()) is None
    assert np.array_equal(zarr.open_array(str(tmp_path / "b.zarr"), mode="r")[:], WHOLE.numpy())


def test_to_zarr_refuses_an_array_that_is_there_before_computing_anything(tmp_path: Path):
    place = str(tmp_path / "a.zarr")
    LazyChunkSequence(chunks).to_zarr(place, TorchNumpyConverter())
    with pytest.raises(ContainsArrayError, match="overwrite=True"):
        LazyChunkSequence(refuse_to_compute).to_zarr(place, TorchNumpyConverter())
    assert np.array_equal(zarr.open_array(place, mode="r")[:], WHOLE.numpy())


def test_to_zarr_replaces_an_array_that_is_there_with_overwrite(tmp_path: Path):
    place = str(tmp_path / "a.zarr")
    LazyChunkSequence(chunks).to_zarr(place, TorchNumpyConverter())
    LazyChunkSequence(lambda: iter([-WHOLE])).to_zarr(place, TorchNumpyConverter(), overwrite=True)
    assert np.array_equal(zarr.open_array(place, mode="r")[:], -WHOLE.numpy())


def test_what_to_zarr_wrote_is_not_readable_after_a_byte_changed(tmp_path: Path):
    place = tmp_path / "a.zarr"
    LazyChunkSequence(chunks).to_zarr(str(place), TorchNumpyConverter())
    chunk = place / "c" / "0" / "0"
    damaged = bytearray(chunk.read_bytes())
    damaged[5] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(str(place), mode="r")[:]


def test_a_sequence_without_chunks_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one chunk"):
        LazyChunkSequence(lambda: iter(())).to_zarr(str(tmp_path / "a.zarr"), TorchNumpyConverter())


def test_to_zarr_refuses_a_group_that_is_there_before_computing_anything(tmp_path: Path):
    place = str(tmp_path / "g.zarr")
    zarr.open_group(place, mode="w").create_array("other", data=WHOLE.numpy())
    with pytest.raises(ContainsGroupError, match=r"g\.zarr: expected no group there"):
        LazyChunkSequence(refuse_to_compute).to_zarr(place, TorchNumpyConverter())
    with pytest.raises(ContainsGroupError):
        LazyChunkSequence(chunks).to_zarr(place, TorchNumpyConverter(), overwrite=True)
    assert np.array_equal(zarr.open_array(f"{place}/other", mode="r")[:], WHOLE.numpy())


def test_the_torch_aggregators_say_which_side_is_empty():
    with pytest.raises(ValueError, match=r"at least one chunk, got none; the data iterable is empty"):
        LazyChunkSequence(lambda: iter(())).compute(TorchCatAggregator())
    with pytest.raises(ValueError, match="the test data iterable is empty"):
        NestedLazyChunkSequence(lambda: iter(())).compute(NestedTorchCatAggregator())
    with pytest.raises(ValueError, match="the training data iterable is empty"):
        NestedLazyChunkSequence(lambda: iter([iter(())])).compute(NestedTorchCatAggregator())
