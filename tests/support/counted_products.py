"""How many floating-point operations the matrix products of a piece of code take, counted as they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ADDED = (aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_)
"""Products that are added to their first argument."""


class CountedProducts(TorchDispatchMode):
    """Counts while it is entered: 2 for each multiplication, in place and of batches too."""

    flop = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        packet = getattr(func, "overloadpacket", None)
        if packet in (*ADDED, aten.mm, aten.bmm):
            left, right = args[1:3] if packet in ADDED else args[:2]
            self.flop += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))
