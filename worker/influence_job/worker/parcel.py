"""A call as bytes, which the scheduler passes on unopened.

Dask's scheduler unpickles the functions that it is given, and ours import torch: seconds in which it serves
nobody, and 600 MB that it would hold for ever. So the driver submits `call` with a packed call, and this
module imports the standard library alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any


def pack(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    """The call of a function of a module with these arguments."""
    return pickle.dumps((function, arguments))


def call(parcel: bytes) -> Any:
    """What the packed call gives; runs on a worker."""
    function, arguments = pickle.loads(parcel)
    return function(*arguments)
