"""How a model of influence travels to Dask workers: its tensors as buffers beside the pickle.

Torch pickles a tensor by writing a file of its own into the pickle, several copies of its memory; numpy
hands its memory over as it is, and Dask sends that without copying (pickle's protocol 5, PEP 574).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_IN_NUMPY = frozenset(
    [
        *(torch.float64, torch.float32, torch.float16, torch.complex128, torch.complex64, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    ]
)


def packed(value: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """The pickle of `value`, and the memory of its tensors and arrays."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return file.getvalue(), buffers


def unpacked(pickled: bytes, buffers: Sequence[Any]) -> Any:
    """What `packed` was given; tensors in memory of their own."""
    return pickle.loads(pickled, buffers=buffers)


T = TypeVar("T")


def with_state(kind: type[T], state: dict[str, Any]) -> T:
    """An object of this class with these attributes, not initialised anew."""
    made = kind.__new__(kind)
    made.__dict__.update(state)
    return made


def by_reference(value: Any) -> Callable[[], Any]:
    """Makes copies of `value` as it is now, which share its tensors and arrays and nothing else."""
    kept: list[Any] = []
    file = io.BytesIO()
    _ByReference(file, kept).dump(value)
    pickled = file.getvalue()
    return lambda: _OfReferences(io.BytesIO(pickled), kept).load()


class _ByReference(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, kept: list[Any]) -> None:
        super().__init__(file, protocol=5)
        self._kept = kept

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor | np.ndarray):
            return None
        self._kept.append(obj)
        return len(self._kept) - 1


class _OfReferences(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: Sequence[Any]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, pid: int) -> Any:
        return self._kept[pid]


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and _is_plain(obj):
            return _copied, (obj.numpy(),)
        return super().reducer_override(obj)


def _is_plain(tensor: Tensor) -> bool:
    """Whether numpy can stand for it: what else a tensor may be is left to torch."""
    dense = tensor.device.type == "cpu" and tensor.layout == torch.strided
    special = tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
    return dense and not special and tensor.dtype in _IN_NUMPY


def _copied(array: NDArray[Any]) -> Tensor:
    """In memory of its own: a received buffer may be read-only, and lies at any address."""
    return torch.from_numpy(np.array(array))
