"""Denormal numbers count as zero while influences are computed.

Examples that a model is certain of have gradients of 1e-20, and eigenvectors of unused inputs have entries
as small; their products, below 1.2e-38 in float32, change no result but take a processor ten times as long.
Entered by whoever calls the maths: the torch models and a job's workers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_LARGEST_ENVIRONMENT = 64
"""Bytes; C's `fenv_t` has 32 on x86-64 and 8 on AArch64."""


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """In this thread and in those that torch shares its operations with, while the context lasts; afterwards
    they do what this thread did before.
    """
    before = _flushing()
    _flush(True)
    try:
        yield
    finally:
        _flush(before)


def _flush(flushing: bool) -> None:
    torch.set_flush_denormal(flushing)
    if torch.get_num_threads() > 1:
        _shared()()


def _flushing() -> bool:
    """Whether this thread flushes now; torch tells only by what it computes."""
    smallest = torch.tensor(torch.finfo(torch.float32).tiny, dtype=torch.float32, device="cpu")
    return not bool(smallest * 0.5)


@cache
def _shared() -> Callable[[], None]:
    """What gives this thread's floating-point environment to the OpenMP threads that work for it.

    torch sets its own thread's alone, and the others were started with what it was then. Does nothing where
    torch does not bring GNU's OpenMP, or the C library has no such environment.
    """
    try:
        openmp = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libgomp*"))))
        c = ctypes.CDLL("libm.so.6")
        read, write, in_parallel = c.fegetenv, c.fesetenv, openmp.GOMP_parallel
    except (StopIteration, OSError, AttributeError):
        return lambda: None
    in_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    in_parallel.restype = None
    each = ctypes.cast(write, ctypes.c_void_p)

    def share() -> None:
        environment = ctypes.create_string_buffer(_LARGEST_ENVIRONMENT)
        read(environment)
        in_parallel(each, environment, torch.get_num_threads(), 0)

    return share
