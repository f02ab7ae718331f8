"""`write_zarr` stores a Dask array with one checksummed object per chunk."""

from __future__ import annotations

from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from zarr.errors import ContainsArrayError

from influence_calculator import MisalignedChunksError, UnknownChunksError, write_zarr

VALUES = np.arange(70, dtype=np.float32).reshape(10, 7)


@pytest.fixture(autouse=True)
def _in_this_process():
    with dask.config.set(scheduler="synchronous"):
        yield


def array(chunks: tuple[object, ...] = (4, 3)) -> da.Array:
    return da.from_array(VALUES, chunks=chunks)


def objects(place: Path) -> list[Path]:
    return sorted(path for path in (place / "c").rglob("*") if path.is_file())


def test_the_stored_array_equals_the_computed_one_chunk_by_chunk(tmp_path: Path):
    stored = write_zarr(array(), str(tmp_path / "a.zarr"))
    assert np.array_equal(stored[:], VALUES)
    assert stored.chunks == (4, 3)
    assert len(objects(tmp_path / "a.zarr")) == 9


@pytest.mark.parametrize(("value", "dtype"), [(0, "float32"), (np.nan, "float32"), (0, "int64")])
def test_chunks_that_hold_the_fill_value_alone_are_objects_too(value: float, dtype: str, tmp_path: Path):
    """So that a missing object always means missing work."""
    write_zarr(da.full((4, 4), value, dtype=dtype, chunks=2), str(tmp_path / "a.zarr"))
    assert len(objects(tmp_path / "a.zarr")) == 4


def test_whichever_byte_of_an_object_changes_reading_fails(tmp_path: Path):
    stored = write_zarr(da.from_array(VALUES[:2, :2], chunks=2), str(tmp_path / "a.zarr"))
    (chunk,) = objects(tmp_path / "a.zarr")
    content = chunk.read_bytes()
    for position in range(len(content)):
        chunk.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(ValueError, match="checksum"):
            stored[:]


def test_what_is_not_written_yet_reads_as_nan(tmp_path: Path):
    writing = write_zarr(array(), str(tmp_path / "a.zarr"), compute=False)
    assert np.isnan(zarr.open_array(str(tmp_path / "a.zarr"), mode="r")[:]).all()
    assert np.array_equal(writing.compute()[:], VALUES)


@pytest.mark.parametrize(
    ("chunks", "dimension"), [(((3, 4, 3), (7,)), 0), (((10,), (2, 5)), 1), (((10, 0), (7,)), 0)]
)
def test_chunks_that_are_no_storage_objects_are_refused_before_anything_is_written(
    chunks, dimension: int, tmp_path: Path
):
    with pytest.raises(MisalignedChunksError, match=f"along dimension {dimension}.*rechunk"):
        write_zarr(array(chunks), str(tmp_path / "a.zarr"))
    assert list(tmp_path.iterdir()) == []


def test_unknown_chunks_are_refused(tmp_path: Path):
    with pytest.raises(UnknownChunksError, match="compute_chunk_sizes"):
        write_zarr(array()[array()[:, 0] > 0], str(tmp_path / "a.zarr"))


def test_an_array_that_is_there_stays_without_overwrite(tmp_path: Path):
    place = str(tmp_path / "a.zarr")
    write_zarr(array(), place)
    with pytest.raises(ContainsArrayError):
        write_zarr(-array(), place)
    assert np.array_equal(zarr.open_array(place, mode="r")[:], VALUES)
    assert np.array_equal(write_zarr(-array(), place, overwrite=True)[:], -VALUES)


def test_integers_are_stored_as_they_are(tmp_path: Path):
    stored = write_zarr(da.arange(5, chunks=2), str(tmp_path / "a.zarr"))
    assert stored.dtype.kind == "i"
    assert stored[:].tolist() == [0, 1, 2, 3, 4]
