"""Arrays in a store: what zarr would write, what xarray reads, and that no changed byte goes unseen."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
import zarr.codecs

from influence_job.errors import PermanentError, Reason
from influence_job.storage import arrays
from influence_job.storage.store import Store

DIMS = ("test", "train", "feature_0")
CASES = [
    (shape, chunks, dtype)
    for shape, chunks in [((), ()), ((5,), (2,)), ((5, 7), (2, 3)), ((4, 6), (2, 3)), ((3, 4, 2), (2, 3, 2))]
    for dtype in ["float64", "float32", "float16", "int64", "int8", "uint8", "bool"]
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "x.zarr"))


def numbers(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)


def blocks(
    chunks: tuple[int, ...], shape: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    grid = [range(-(-n // c)) for n, c in zip(shape, chunks, strict=True)]
    return [
        (index, tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True)))
        for index in itertools.product(*grid)
    ]


@pytest.mark.parametrize(("shape", "chunks", "dtype"), CASES)
def test_objects_are_byte_for_byte_what_zarr_writes(
    store: Store, tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str
) -> None:
    values = numbers(shape, dtype)
    arrays.create_array(store, "a", shape, chunks, dtype, DIMS[: len(shape)])
    for index, place in blocks(chunks, shape):
        arrays.write_chunk(store, "a", index, values[place])
    theirs = zarr.create_array(
        str(tmp_path / "theirs"),
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=np.nan if dtype.startswith("float") else 0,
        compressors=zarr.codecs.Crc32cCodec(),
        config={"write_empty_chunks": True},
    )
    theirs[...] = values
    written = {p.relative_to(tmp_path / "theirs").as_posix() for p in (tmp_path / "theirs").rglob("*")}
    names = [name for name in written if (tmp_path / "theirs" / name).is_file() and name != "zarr.json"]
    assert sorted(f"a/{name}" for name in names) == [p for p in store.list("a/") if p != "a/zarr.json"]
    for name in names:
        assert store.get(f"a/{name}") == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize(("shape", "chunks", "dtype"), CASES)
def test_zarr_and_we_read_the_same_values(
    store: Store, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str
) -> None:
    values = numbers(shape, dtype)
    arrays.create_array(store, "a", shape, chunks, dtype, DIMS[: len(shape)])
    for index, place in blocks(chunks, shape):
        digest = arrays.write_chunk(store, "a", index, values[place])
        block = arrays.read_chunk(store, "a", index)
        np.testing.assert_array_equal(block, values[place])
        assert block.dtype == values.dtype
        assert digest == arrays.digest(block)
    np.testing.assert_array_equal(arrays.read_array(store, "a"), values)
    np.testing.assert_array_equal(zarr.open_array(f"{store.url}/a", mode="r")[...], values)


def test_xarray_opens_the_root_with_dims_and_nan_where_nothing_is_computed(store: Store) -> None:
    arrays.update_attributes(store, {"spec": {"mode": "Up"}})
    arrays.create_array(store, "influences", (4, 6), (2, 3), "float32", ("test", "train"), {"long_name": "i"})
    arrays.write_array(store, "test_label", np.arange(4), ("test",))
    arrays.write_array(store, "fit/pass/unit/A", np.eye(3), ("i", "j"))
    arrays.write_chunk(store, "influences", (1, 0), np.zeros((2, 3), "float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = xarray.open_zarr(store.url, consolidated=False)
    assert dict(data.sizes) == {"test": 4, "train": 6}
    assert set(data.data_vars) == {"influences", "test_label"}
    expected = np.full((4, 6), np.nan, "float32")
    expected[2:, :3] = 0
    np.testing.assert_array_equal(data.influences.values, expected)
    assert data.influences.attrs["long_name"] == "i"
    assert data.attrs["spec"] == {"mode": "Up"}


def test_every_flipped_bit_of_a_chunk_makes_the_region_unreadable(store: Store) -> None:
    arrays.create_array(store, "a", (3, 4), (3, 4), "float32", ("test", "train"))
    arrays.write_chunk(store, "a", (0, 0), numbers((3, 4), "float32"))
    whole = store.get("a/c/0/0")
    assert whole is not None
    for place, bit in itertools.product(range(len(whole)), range(8)):
        changed = bytearray(whole)
        changed[place] ^= 1 << bit
        store.put("a/c/0/0", bytes(changed))
        with pytest.raises(PermanentError, match="a/c/0/0") as raised:
            arrays.read_chunk(store, "a", (0, 0))
        assert raised.value.reason is Reason.STORE_CORRUPT
        with pytest.raises(PermanentError):
            arrays.read_array(store, "a")


def test_xarray_too_refuses_a_region_whichever_byte_was_flipped(store: Store) -> None:
    arrays.update_attributes(store, {})
    arrays.create_array(store, "a", (2, 2), (2, 2), "float32", ("test", "train"))
    arrays.write_chunk(store, "a", (0, 0), numbers((2, 2), "float32"))
    whole = store.get("a/c/0/0")
    assert whole is not None
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        store.put("a/c/0/0", bytes(changed))
        with pytest.raises(ValueError, match="checksum"):
            xarray.open_zarr(store.url, consolidated=False).a.load()


@pytest.mark.parametrize("data", [b"", b"abc", b"\0" * 15, b"\0" * 40])
def test_a_chunk_of_the_wrong_length_is_corrupt(store: Store, data: bytes) -> None:
    arrays.create_array(store, "a", (3,), (3,), "float32", ("test",))
    store.put("a/c/0", data if len(data) < 4 else arrays.with_checksum(data[:-4]))
    with pytest.raises(PermanentError, match="expected 12 bytes and their crc32c"):
        arrays.read_chunk(store, "a", (0,))


def test_a_changed_byte_of_the_metadata_is_an_error_or_changes_nothing(store: Store) -> None:
    values = numbers((5, 3), "float32")
    arrays.create_array(store, "a", (5, 3), (2, 3), "float32", ("test", "train"))
    for index, place in blocks((2, 3), (5, 3)):
        arrays.write_chunk(store, "a", index, values[place])
    whole = store.get("a/zarr.json")
    assert whole is not None
    refused = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        store.put("a/zarr.json", bytes(changed))
        arrays.forget(store)
        try:
            found = arrays.read_array(store, "a")
        except PermanentError:
            refused += 1
        else:
            np.testing.assert_array_equal(found, values)
    assert refused > len(whole) / 3


def test_what_is_corrupt_in_the_store_of_an_earlier_job_is_for_that_job_to_make_again(store: Store) -> None:
    """To overwrite the present job's result would delete that, and help nothing."""
    with pytest.raises(PermanentError) as caught:
        arrays.array_info(store, "a")
    place = f"{store.url}/a: expected an array, found no zarr.json; restore the object, or "
    assert caught.value.message == f"{place}start anew with output.onExisting: Overwrite"
    with pytest.raises(PermanentError) as caught:
        arrays.array_info(arrays.of_earlier_job(store, "spec.gradients.url"), "a")
    assert caught.value.reason is Reason.STORE_CORRUPT
    assert caught.value.message == (
        f"spec.gradients.url: {place}run the job that made it again with output.onExisting: Overwrite"
    )


def test_a_chunk_that_was_never_written_is_no_region(store: Store) -> None:
    arrays.create_array(store, "a", (4,), (2,), "float32", ("test",))
    with pytest.raises(PermanentError, match="a/c/1: expected a chunk, found no object"):
        arrays.read_chunk(store, "a", (1,))
    assert np.isnan(arrays.read_array(store, "a")).all()


def test_making_an_array_again_keeps_its_chunks(store: Store) -> None:
    for _ in range(2):
        arrays.create_array(store, "a", (2,), (2,), "float32", ("test",))
        if store.get("a/c/0") is None:
            arrays.write_chunk(store, "a", (0,), np.ones(2, "float32"))
    np.testing.assert_array_equal(arrays.read_array(store, "a"), [1, 1])


@pytest.mark.parametrize(
    ("index", "block"),
    [
        ((0, 0), np.ones((2, 3), "float64")),
        ((0, 0), np.ones((2, 2), "float32")),
        ((2, 0), np.ones((2, 3), "float32")),
        ((3, 0), np.ones((2, 3), "float32")),
        ((0, -1), np.ones((2, 3), "float32")),
        ((0,), np.ones((2, 3), "float32")),
    ],
)
def test_a_block_of_another_shape_dtype_or_place_is_refused(
    store: Store, index: tuple[int, ...], block: np.ndarray[Any, Any]
) -> None:
    arrays.create_array(store, "a", (5, 6), (2, 3), "float32", ("test", "train"))
    with pytest.raises(ValueError, match="expected"):
        arrays.write_chunk(store, "a", index, block)
    assert store.list("a/c") == []


def test_integers_are_filled_with_what_the_caller_says_cannot_occur(store: Store) -> None:
    arrays.create_array(store, "a", (3,), (3,), "int64", ("test",), fill_value=-1)
    np.testing.assert_array_equal(arrays.read_array(store, "a"), [-1, -1, -1])
    np.testing.assert_array_equal(zarr.open_array(f"{store.url}/a", mode="r")[:], [-1, -1, -1])


def test_an_empty_array_has_no_chunks(store: Store) -> None:
    arrays.write_array(store, "a", np.empty((0, 3)), ("test", "train"))
    assert arrays.read_array(store, "a").shape == (0, 3)


def test_memory_order_and_byte_order_of_a_block_do_not_matter(store: Store) -> None:
    values = numbers((2, 3), "float32")
    arrays.create_array(store, "a", (2, 3), (2, 3), "float32", ("test", "train"))
    plain = arrays.write_chunk(store, "a", (0, 0), values), store.get("a/c/0/0")
    assert (arrays.write_chunk(store, "a", (0, 0), np.asfortranarray(values)), store.get("a/c/0/0")) == plain


def test_root_attributes_are_merged_and_marked_as_ours(store: Store) -> None:
    assert arrays.read_attributes(store) == {}
    arrays.update_attributes(store, {"spec": 1, "plan": 2})
    arrays.update_attributes(store, {"plan": 3, arrays.OURS: {"finished": True}})
    assert arrays.read_attributes(store) == {
        "spec": 1,
        "plan": 3,
        arrays.OURS: {"contractVersion": arrays.CONTRACT_VERSION, "finished": True},
    }
    assert json.loads(store.get("zarr.json") or b"")["node_type"] == "group"


def test_an_array_that_zarr_wrote_in_its_own_way_is_not_read_as_ours(store: Store) -> None:
    zarr.create_array(f"{store.url}/a", shape=(2,), chunks=(2,), dtype="float32")
    with pytest.raises(PermanentError, match="no array metadata as a job writes it"):
        arrays.read_array(store, "a")
    assert arrays.has_array(store, "a")
    assert not arrays.has_array(store, "b")


def test_names_along_a_dimension_are_its_coordinate(store: Store) -> None:
    names = ["", "head", "encoder.0", "größer", '["x"]']
    arrays.update_attributes(store, {})
    arrays.write_names(store, "block", names)
    arrays.create_array(store, "a", (5, 2), (5, 2), "float32", ("block", "test"))
    arrays.write_chunk(store, "a", (0, 0), numbers((5, 2), "float32"))
    opened = xarray.open_zarr(store.url, consolidated=False)
    assert [str(name) for name in opened["block"].values] == names
    assert opened["a"].sel(block="größer").values.tolist() == numbers((5, 2), "float32")[3].tolist()


def test_a_copy_is_the_same_array_and_a_damaged_chunk_is_not_copied(tmp_path: Path) -> None:
    source, target = (Store.open(str(tmp_path / name)) for name in ("source.zarr", "target.zarr"))
    values = np.arange(70, dtype=np.int16)
    arrays.create_array(source, "train_label", (70,), (2,), "int16", ("train",), {"a": 1}, fill_value=-1)
    for index in range(35):
        arrays.write_chunk(source, "train_label", (index,), values[2 * index : 2 * index + 2])
    guarded: list[None] = []
    arrays.copy_array(source, target, "train_label", lambda: guarded.append(None))
    assert len(guarded) == 35
    assert target.list() == source.list()
    assert all(target.get(path) == source.get(path) for path in source.list())
    source.put("train_label/c/7", b"damaged")
    with pytest.raises(PermanentError, match="train_label/c/7: expected 4 bytes and their crc32c"):
        arrays.copy_array(source, target, "train_label", lambda: None)
    source.delete("train_label/c/7")
    with pytest.raises(PermanentError, match="train_label/c/7: expected a chunk, found no object"):
        arrays.copy_array(source, target, "train_label", lambda: None)
