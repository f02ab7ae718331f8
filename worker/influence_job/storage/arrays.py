"""Zarr v3 arrays in a store: one chunk is one object, written once, with a checksum.

zarr writes and defines the metadata; `xarray.open_zarr` and zarr read everything. Chunks pass through
here instead of zarr's pipeline, because a job writes each one exactly once and in one piece: bytes in
C order, little-endian, then crc32c (`tests` hold this equal, byte for byte, to what zarr writes).
Chunks at the end of an axis are stored at full size, padded with the fill value.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import google_crc32c
import numpy as np
import zarr
import zarr.codecs
import zarr.storage

from influence_job.errors import PermanentError, Reason
from influence_job.storage.store import Store

OURS = "influence_operator"
"""The attribute that marks a root group, and an array, as written by a job."""
CONTRACT_VERSION = 1
"""Raised when a reader of the previous version would misread the store."""
GROUPS = ("factors", "fit", "gradients", "ledger", "partials")
"""Folders of the root that hold no arrays of their own; declared so that zarr knows what they are."""
_SEALED = (
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "fill_value",
    "codecs",
    "dimension_names",
)


@dataclass(frozen=True)
class ArrayInfo:
    """The shape of an array and of its chunks, as its metadata says."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    fill_value: Any
    dims: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-extent // chunk) for extent, chunk in zip(self.shape, self.chunks, strict=True))

    def extent(self, index: Sequence[int]) -> tuple[int, ...]:
        """The shape of one chunk's part inside the array."""
        if len(index) != len(self.shape) or not all(
            0 <= i < g for i, g in zip(index, self.grid, strict=True)
        ):
            raise ValueError(f"chunk index: expected one inside the grid {self.grid}, got {tuple(index)}")
        parts = zip(index, self.shape, self.chunks, strict=True)
        return tuple(min(chunk, extent - i * chunk) for i, extent, chunk in parts)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """All chunk indices, the last axis fastest."""
        return itertools.product(*(range(count) for count in self.grid))


_known: WeakKeyDictionary[Store, dict[str, ArrayInfo]] = WeakKeyDictionary()
"""Metadata does not change while a store is open, so it is read once."""
_fields: WeakKeyDictionary[Store, str] = WeakKeyDictionary()
"""The fields that name stores of earlier jobs."""


def create_array(
    store: Store,
    path: str,
    shape: Sequence[int],
    chunks: Sequence[int],
    dtype: Any,
    dims: Sequence[str],
    attributes: Mapping[str, Any] | None = None,
    fill_value: Any = None,
) -> None:
    """Writes an array's metadata, and nothing else: chunks of an array that is there already stay.

    The fill value is NaN for floats unless given: what is not computed never reads as a number. Other
    types have none to tell it by: give one that cannot occur.
    """
    dtype = np.dtype(dtype)
    if fill_value is None:
        fill_value = math.nan if dtype.kind == "f" else dtype.type(0)
    memory: dict[str, Any] = {}
    zarr.create_array(
        zarr.storage.MemoryStore(memory),
        shape=tuple(shape),
        chunks=tuple(chunks),
        dtype=dtype,
        fill_value=fill_value,
        serializer=zarr.codecs.BytesCodec(endian="little"),
        compressors=(zarr.codecs.Crc32cCodec(),),
        filters=None,
        dimension_names=tuple(dims),
        attributes=dict(attributes or {}),
        config={"write_empty_chunks": True},
    )
    document = json.loads(memory["zarr.json"].to_bytes())
    document["attributes"][OURS] = {"crc32c": _seal(document)}
    store.put_json(f"{path}/zarr.json", document)
    _known.setdefault(store, {})[path] = _parse(store, path, document)


def array_info(store: Store, path: str) -> ArrayInfo:
    """What an array's metadata says.

    Raises:
        PermanentError: there is no such array, it is not ours, or its metadata was changed.
    """
    known = _known.setdefault(store, {})
    if path not in known:
        document = store.get_json(f"{path}/zarr.json")
        if document is None:
            raise corrupt(store, path, "expected an array, found no zarr.json")
        known[path] = _parse(store, path, document)
    return known[path]


def has_array(store: Store, path: str) -> bool:
    """Whether an array's metadata is there."""
    return path in _known.get(store, {}) or store.get(f"{path}/zarr.json") is not None


def forget(store: Store) -> None:
    """Drops what was remembered of the store's arrays, for they were deleted."""
    _known.pop(store, None)


def of_earlier_job(store: Store, field: str) -> Store:
    """The same store, known as that of an earlier job, which `field` names: what is corrupt there only the
    job that made it makes again.
    """
    _fields[store] = field
    return store


def earlier_field(store: Store) -> str | None:
    """The field that names the store, if it is that of an earlier job."""
    return _fields.get(store)


def write_chunk(store: Store, path: str, chunk_index: Sequence[int], block: np.ndarray[Any, Any]) -> str:
    """Writes one chunk in one PUT and returns the digest of the block's C-order bytes."""
    info = array_info(store, path)
    extent = info.extent(chunk_index)
    if block.shape != extent or block.dtype != info.dtype:
        raise ValueError(
            f"{path}: chunk {tuple(chunk_index)}: expected {info.dtype} {extent}, "
            f"got {block.dtype} {block.shape}"
        )
    block = np.ascontiguousarray(block)
    padded = block
    if extent != info.chunks:
        padded = np.full(info.chunks, info.fill_value, dtype=info.dtype)
        padded[tuple(slice(stop) for stop in extent)] = block
    store.put(_chunk_path(path, chunk_index), with_checksum(_bytes(padded)))
    return digest(block)


def read_chunk(store: Store, path: str, chunk_index: Sequence[int]) -> np.ndarray[Any, Any]:
    """The chunk's part inside the array.

    Raises:
        PermanentError: there is no such object, or a byte of it was changed.
    """
    info = array_info(store, path)
    block = _read(store, path, info, chunk_index)
    if block is None:
        raise corrupt(store, _chunk_path(path, chunk_index), "expected a chunk, found no object")
    return block


def read_array(store: Store, path: str) -> np.ndarray[Any, Any]:
    """The whole array; chunks that were never written hold the fill value.

    Raises:
        PermanentError: a byte was changed.
    """
    info = array_info(store, path)
    result = np.full(info.shape, info.fill_value, dtype=info.dtype)
    paths = [_chunk_path(path, index) for index in info.indices()]
    for index, (_, data) in zip(info.indices(), store.get_many(paths), strict=True):
        if data is not None:
            block = _decode(store, path, info, index, data)
            corner = zip(index, info.chunks, block.shape, strict=True)
            result[tuple(slice(i * chunk, i * chunk + length) for i, chunk, length in corner)] = block
    return result


def copy_array(source: Store, store: Store, path: str, guard: Callable[[], None]) -> None:
    """Copies an array to another store, many chunks at once; `guard` is called before each.

    Raises:
        PermanentError: a chunk is missing, or a byte of one was changed.
    """
    info = array_info(source, path)
    create_array(
        store, path, info.shape, info.chunks, info.dtype, info.dims, info.attributes, info.fill_value
    )

    def chunks() -> Iterator[tuple[str, bytes]]:
        paths = [_chunk_path(path, index) for index in info.indices()]
        for index, (name, data) in zip(info.indices(), source.get_many(paths), strict=True):
            guard()
            if data is None:
                raise corrupt(source, name, "expected a chunk, found no object")
            _decode(source, path, info, index, data)
            yield name, data

    store.put_many(chunks())


def write_array(
    store: Store,
    path: str,
    values: np.ndarray[Any, Any],
    dims: Sequence[str],
    attributes: Mapping[str, Any] | None = None,
) -> str:
    """Writes a small array as one chunk and returns its digest."""
    create_array(store, path, values.shape, [max(1, n) for n in values.shape], values.dtype, dims, attributes)
    if values.size == 0:
        return digest(values)
    return write_chunk(store, path, (0,) * values.ndim, values)


def write_names(store: Store, dim: str, names: Iterable[str]) -> None:
    """Writes the coordinate of a dimension along which things have names: strings, under the same name."""
    memory: dict[str, Any] = {}
    values = np.array(list(names), dtype=np.dtypes.StringDType())
    zarr.create_array(
        zarr.storage.MemoryStore(memory),
        name=dim,
        data=values,
        chunks=values.shape,
        compressors=(zarr.codecs.Crc32cCodec(),),
        filters=None,
        dimension_names=(dim,),
    )
    for path in (f"{dim}/zarr.json", f"{dim}/c/0"):
        store.put(path, memory[path].to_bytes())


def digest(block: np.ndarray[Any, Any]) -> str:
    """Identifies a block by its C-order bytes: 32 hexadecimal digits."""
    return hashlib.blake2b(_bytes(np.ascontiguousarray(block)), digest_size=16).hexdigest()


def joined_digest(digests: Iterable[str]) -> str:
    """Identifies several blocks by their digests, in order."""
    state = hashlib.blake2b(digest_size=16)
    for own in digests:
        state.update(own.encode())
    return state.hexdigest()


def with_checksum(*data: bytes | memoryview) -> bytes:
    """The data, in pieces, followed by its crc32c, as zarr's codec stores it."""
    return b"".join((*data, _crc32c(*data)))


def without_checksum(data: bytes) -> memoryview | None:
    """The data before its crc32c, None if they do not belong together."""
    body = memoryview(data)[:-4]
    return body if len(data) >= 4 and _crc32c(body) == data[-4:] else None


def _crc32c(*data: bytes | memoryview) -> bytes:
    checksum = 0
    for piece in data:
        # google_crc32c takes no memoryview, but arrays without a copy.
        checksum = google_crc32c.extend(checksum, np.frombuffer(piece, dtype=np.uint8))
    return checksum.to_bytes(4, "little")


def read_attributes(store: Store) -> dict[str, Any]:
    """The root group's attributes; empty if there is no root group."""
    document = store.get_json("zarr.json")
    attributes = document.get("attributes") if isinstance(document, dict) else None
    return attributes if isinstance(attributes, dict) else {}


def update_attributes(store: Store, changes: Mapping[str, Any]) -> None:
    """Sets root attributes in one PUT, making the root group, marked as ours, if there is none.

    The value of the mark itself (`influence_operator`) is merged key by key.
    """
    attributes = read_attributes(store)
    if not attributes:
        for group in GROUPS:
            store.put_json(f"{group}/zarr.json", _group({}))
    ours = {"contractVersion": CONTRACT_VERSION} | attributes.get(OURS, {}) | changes.get(OURS, {})
    store.put_json("zarr.json", _group(attributes | dict(changes) | {OURS: ours}))


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _chunk_path(path: str, index: Sequence[int]) -> str:
    return "/".join([path, "c", *map(str, index)])


def _bytes(block: np.ndarray[Any, Any]) -> memoryview:
    little = block.astype(block.dtype.newbyteorder("<"), copy=False)
    return little.reshape(-1).view(np.uint8).data


def _read(store: Store, path: str, info: ArrayInfo, index: Sequence[int]) -> np.ndarray[Any, Any] | None:
    info.extent(index)
    data = store.get(_chunk_path(path, index))
    return None if data is None else _decode(store, path, info, index, data)


def _decode(
    store: Store, path: str, info: ArrayInfo, index: Sequence[int], data: bytes
) -> np.ndarray[Any, Any]:
    body = without_checksum(data)
    expected = math.prod(info.chunks) * info.dtype.itemsize
    if body is None or len(body) != expected:
        raise corrupt(
            store,
            _chunk_path(path, index),
            f"expected {expected} bytes and their crc32c, got {len(data)} bytes that do not match",
        )
    block = np.frombuffer(body, dtype=info.dtype.newbyteorder("<")).reshape(info.chunks)
    return block[tuple(slice(stop) for stop in info.extent(index))].astype(info.dtype, order="C")


def _parse(store: Store, path: str, document: Mapping[str, Any]) -> ArrayInfo:
    try:
        attributes = document["attributes"]
        if attributes[OURS]["crc32c"] != _seal(document):
            raise ValueError("its checksum does not match")
        dtype = np.dtype(document["data_type"])
        return ArrayInfo(
            shape=tuple(document["shape"]),
            chunks=tuple(document["chunk_grid"]["configuration"]["chunk_shape"]),
            dtype=dtype,
            fill_value=dtype.type(document["fill_value"]),
            dims=tuple(document.get("dimension_names") or ()),
            attributes={name: value for name, value in attributes.items() if name != OURS},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise corrupt(store, f"{path}/zarr.json", f"no array metadata as a job writes it: {error}") from error


def _seal(document: Mapping[str, Any]) -> str:
    """Checksum of what decides how chunks are read; attributes and the document's layout may change."""
    sealed = json.dumps({name: document.get(name) for name in _SEALED}, sort_keys=True)
    return f"{google_crc32c.value(sealed.encode()):08x}"


def corrupt(store: Store, path: str, what: str) -> PermanentError:
    """The error for an object that is missing or damaged, with who makes it again."""
    found, field = f"{store.url}/{path}: {what}; restore the object, or ", earlier_field(store)
    if field is None:
        return PermanentError(Reason.STORE_CORRUPT, f"{found}start anew with output.onExisting: Overwrite")
    return PermanentError(
        Reason.STORE_CORRUPT,
        f"{field}: {found}run the job that made it again with output.onExisting: Overwrite",
    )
