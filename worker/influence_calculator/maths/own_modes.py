"""The modes of torch that the maths computes in, whatever mode it is called in.

Under `inference_mode` nothing depends on a parameter, so that gradients would be 0; under `autocast` products
would have three digits.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from influence_calculator.maths.denormals import denormals_flushed
from influence_calculator.maths.kept_attributes import one_call


class _Eager:
    """Nothing compiled is called while anybody is inside: torch keeps one stance for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: Any = None

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._stance is not None:
                self._stance.__exit__(None, None, None)


_eager = _Eager()


@contextmanager
def eagerly() -> Iterator[None]:
    """What `torch.compile` made is called as it was written: compiled code calls no hooks and takes no other
    parameters.
    """
    if "torch._dynamo" not in sys.modules:
        # Nothing is compiled yet, and to load the compiler takes seconds.
        yield
        return
    _eager.enter()
    try:
        yield
    finally:
        _eager.leave()


@contextmanager
def own_modes() -> Iterator[None]:
    """Gradients are recorded, every operation has the dtype of what it is given, denormals count as zero,
    what is compiled is called as it was written; what passes store in a model is gone at the end.
    """
    with ExitStack() as entered:
        entered.enter_context(one_call())
        entered.enter_context(eagerly())
        entered.enter_context(denormals_flushed())
        entered.enter_context(torch.inference_mode(False))
        entered.enter_context(torch.enable_grad())
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                entered.enter_context(torch.autocast(device_type, enabled=False))
        yield
