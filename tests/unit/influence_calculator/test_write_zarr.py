"""`write_zarr` stores a Dask array with one checksummed object per chunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import dask
import dask.array as da
import fsspec
import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from zarr.errors import ContainsArrayError, ContainsGroupError

from counting_model import FEATURES, CountingModel
from influence_calculator import (
    DaskInfluenceCalculator,
    DisableClientSingleThreadCheck,
    MisalignedChunksError,
    TorchNumpyConverter,
    UnknownChunksError,
    write_zarr,
)

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


def test_a_group_is_never_replaced_by_an_array(tmp_path: Path):
    place = str(tmp_path / "g.zarr")
    zarr.open_group(place, mode="w").create_array("other", data=VALUES)
    for overwrite in (False, True):
        with pytest.raises(ContainsGroupError, match=r"g\.zarr: expected no group there.*name a place in"):
            write_zarr(array(), place, overwrite=overwrite)
    assert np.array_equal(zarr.open_array(f"{place}/other", mode="r")[:], VALUES)
    assert np.array_equal(write_zarr(array(), f"{place}/mine")[:], VALUES)


READINGS: dict[str, Callable[[str], da.Array]] = {
    "url": da.from_zarr,
    "array": lambda place: da.from_array(zarr.open_array(place), chunks=(4, 3)),
    "inlined": lambda place: da.from_zarr(place, inline_array=True),
    "optimized": lambda place: dask.optimize(da.from_zarr(place) + 1)[0],
    "optimized and inlined": lambda place: dask.optimize(da.from_zarr(place, inline_array=True) + 1)[0],
    "another path": lambda place: da.from_zarr(f"{place}/../{Path(place).name}"),
}


@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS.keys())
def test_an_array_does_not_overwrite_what_it_reads_from(reading: Callable[[str], da.Array], tmp_path: Path):
    place = str(tmp_path / "a.zarr")
    write_zarr(array(), place)
    with pytest.raises(ValueError, match=r"array: expected one that does not read from .*a\.zarr.*persist"):
        write_zarr(reading(place) * 2, place, overwrite=True)
    assert np.array_equal(zarr.open_array(place, mode="r")[:], VALUES)


def test_an_array_in_memory_overwrites_what_it_was_read_from_and_others_what_they_do_not_read(tmp_path: Path):
    place, other = str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")
    write_zarr(array(), place)
    assert np.array_equal(write_zarr(da.from_zarr(place).persist() * 2, place, overwrite=True)[:], 2 * VALUES)
    for _ in range(2):
        assert np.array_equal(write_zarr(da.from_zarr(place), other, overwrite=True)[:], 2 * VALUES)


def test_an_array_whose_metadata_nobody_can_read_may_be_replaced(tmp_path: Path):
    place = tmp_path / "a.zarr"
    write_zarr(array(), str(place))
    (place / "zarr.json").write_text("{")
    assert np.array_equal(write_zarr(array(), str(place), overwrite=True)[:], VALUES)


def test_what_is_no_dask_array_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"array: expected a dask\.array\.Array, got ndarray"):
        write_zarr(VALUES, str(tmp_path / "a.zarr"))  # type: ignore[arg-type]


@pytest.mark.parametrize("examples", [522, 515, 1033, 64, 10])
def test_influences_are_written_as_they_come_from_the_calculator(examples: int, tmp_path: Path):
    """Test examples in chunks of 64, of which more than four fit into a group, but not five."""
    calculator = DaskInfluenceCalculator(
        CountingModel(), TorchNumpyConverter(), DisableClientSingleThreadCheck
    )
    calculator.group_bytes = 270 * 4 * (FEATURES + 8)

    def side(n: int, chunk: int) -> tuple[da.Array, da.Array]:
        return da.ones((n, FEATURES), chunks=(chunk, -1), dtype="f4"), da.ones(n, chunks=chunk, dtype="f4")

    influences = calculator.influences(*side(examples, 64), *side(20, 8))
    assert np.array_equal(
        write_zarr(influences, str(tmp_path / "a.zarr"))[:], np.full((examples, 20), FEATURES, np.float32)
    )


class _Spaces(MemoryFileSystem):
    """Memory in spaces, one of which has to be told: as a bucket that is found with options alone."""

    protocol = "spaces"
    cachable = False
    spaces: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, space: str, **options: Any) -> None:
        super().__init__(**options)
        self.store = self.spaces.setdefault(space, {})
        self.pseudo_dirs = [""]


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    fsspec.register_implementation("spaces", _Spaces, clobber=True)
    monkeypatch.setattr(_Spaces, "spaces", {})
    return {"space": "mine"}


def test_storage_options_reach_every_access(options: dict[str, Any]):
    def stored() -> Any:
        return zarr.open_array("spaces://a.zarr", mode="r", storage_options=options)[:]

    write_zarr(array(), "spaces://a.zarr", storage_options=options)
    assert np.array_equal(stored(), VALUES)
    with pytest.raises(ContainsArrayError):
        write_zarr(array(), "spaces://a.zarr", storage_options=options)
    read = da.from_zarr("spaces://a.zarr", storage_options=options)
    with pytest.raises(ValueError, match="does not read from"):
        write_zarr(read * 2, "spaces://a.zarr", overwrite=True, storage_options=options)
    assert np.array_equal(stored(), VALUES)
    write_zarr(array() * 2, "spaces://a.zarr", overwrite=True, storage_options=options)
    assert np.array_equal(stored(), 2 * VALUES)
    assert list(_Spaces.spaces) == ["mine"]


def test_a_group_that_options_lead_to_is_never_replaced(options: dict[str, Any]):
    zarr.open_group("spaces://g.zarr", mode="w", storage_options=options).create_array("other", data=VALUES)
    with pytest.raises(ContainsGroupError):
        write_zarr(array(), "spaces://g.zarr", overwrite=True, storage_options=options)
