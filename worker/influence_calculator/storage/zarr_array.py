"""Zarr v3 arrays as this library writes them: checksummed chunks, nothing unfinished that reads as zero.

Who writes blocks, and from where, is the caller's matter: the lazy sequences one after the other,
`write_zarr` one Dask task per chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import FsspecStore, LocalStore, StoreLike

_NO_SUCH_NODE = (FileNotFoundError, KeyError, ValueError)
"""Nothing there, a node of the other kind, or metadata that nobody can read, which may be replaced."""


def create_array(
    url: StoreLike,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    overwrite: bool,
    storage_options: Mapping[str, Any] | None = None,
) -> zarr.Array[Any]:
    """A new array at `url`: one storage object per chunk, crc32c behind each, no compression.

    Chunks not yet written read as NaN (0 for integers). Chunks of zeros are written like any other, so
    that a missing object always means missing work.

    Raises:
        ContainsArrayError: there is an array already and `overwrite` is False.
        ContainsGroupError: there is a group, which is never replaced.
    """
    require_free(url, storage_options, overwrite=overwrite)
    return zarr.create_array(
        url,
        shape=shape,
        chunks=tuple(max(1, extent) for extent in chunks),
        dtype=dtype,
        compressors=Crc32cCodec(),
        fill_value=np.nan if dtype.kind == "f" else 0,
        zarr_format=3,
        overwrite=overwrite,
        storage_options=_options(storage_options),
        config={"write_empty_chunks": True},
    )


def require_free(
    url: StoreLike, storage_options: Mapping[str, Any] | None = None, *, overwrite: bool
) -> None:
    """Refuses a place that holds an array that is not to be replaced, or a group, before anything is computed
    for it.

    Raises:
        ContainsArrayError, ContainsGroupError: naming the place and the cure.
    """
    _require_no_group(url, storage_options)
    if not overwrite and stored_at(url, storage_options) is not None:
        raise ContainsArrayError(
            f"{url}: expected no array there, found one; pass overwrite=True to replace it"
        )


def _require_no_group(url: StoreLike, storage_options: Mapping[str, Any] | None) -> None:
    """Refuses a place that holds a group: in its place an array would delete all arrays of the group.

    Raises:
        ContainsGroupError: naming the place and the cure.
    """
    try:
        zarr.open_group(url, mode="r", storage_options=_options(storage_options))
    except _NO_SUCH_NODE:
        return
    raise ContainsGroupError(
        f"{url}: expected no group there, found one, which may hold other arrays; name a place in the group, "
        "or remove it first"
    )


def stored_at(url: StoreLike, storage_options: Mapping[str, Any] | None = None) -> zarr.Array[Any] | None:
    """The array at `url`, to be read; None if there is none."""
    try:
        return zarr.open_array(url, mode="r", storage_options=_options(storage_options))
    except _NO_SUCH_NODE:
        return None


def place_of(array: zarr.Array[Any]) -> str:
    """Where an array is stored: the same for two arrays that were opened in different ways."""
    store, path = array.store_path.store, array.store_path.path
    if isinstance(store, LocalStore):
        return str((store.root / path).resolve())
    if isinstance(store, FsspecStore):
        place = f"{store.path.rstrip('/')}/{path}".rstrip("/")
        protocols = [store.fs.protocol] if isinstance(store.fs.protocol, str) else store.fs.protocol
        return str(Path(place).resolve()) if "file" in protocols else f"{protocols[0]}://{place}"
    return str(array.store_path)


def _options(storage_options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return dict(storage_options) if storage_options else None
