"""Small immutable objects of named numpy arrays: segments of the ledger, partial results of sinks.

b"INFLREC1"  length of the header (8 bytes)  header (JSON)  arrays, C order, little-endian  crc32c
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from influence_job.storage.arrays import with_checksum, without_checksum

_MAGIC = b"INFLREC1"
Arrays = dict[str, np.ndarray[Any, Any]]


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Header and arrays as one object; arrays of that layout are copied once."""
    little = {
        name: np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        for name, array in arrays.items()
    }
    described = [[name, array.dtype.str, list(arrays[name].shape)] for name, array in little.items()]
    text = json.dumps({"arrays": described, **header}).encode()
    head = b"".join([_MAGIC, len(text).to_bytes(8, "little"), text])
    return with_checksum(head, *(array.reshape(-1).view(np.uint8).data for array in little.values()))


def unpack(data: bytes) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays, which share the memory of `data`.

    Raises:
        ValueError: a byte was changed or is missing.
    """
    body = without_checksum(data)
    if body is None or body[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{len(data)} bytes whose checksum does not match")
    start = len(_MAGIC) + 8
    stop = start + int.from_bytes(body[len(_MAGIC) : start], "little")
    header = json.loads(bytes(body[start:stop]))
    arrays: Arrays = {}
    for name, kind, shape in header.pop("arrays"):
        dtype, start = np.dtype(kind), stop
        stop = start + dtype.itemsize * math.prod(shape)
        arrays[name] = np.frombuffer(body[start:stop], dtype=dtype).reshape(shape)
    return header, arrays
