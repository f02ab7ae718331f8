"""The modes of torch that the maths computes in, whatever mode it is called in.

Under `inference_mode` nothing depends on a parameter, so that gradients would be 0; under `autocast` products
would have three digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from influence_calculator.maths.denormals import denormals_flushed


@contextmanager
def own_modes() -> Iterator[None]:
    """Gradients are recorded, every operation has the dtype of what it is given, denormals count as zero."""
    with ExitStack() as entered:
        entered.enter_context(denormals_flushed())
        entered.enter_context(torch.inference_mode(False))
        entered.enter_context(torch.enable_grad())
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                entered.enter_context(torch.autocast(device_type, enabled=False))
        yield
