"""What a process used at most since a mark: resident bytes, or on a GPU what torch allocated there."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

CPU = torch.device("cpu")
MIB = 1 << 20


def assert_planned(planned: int, seen: int, what: str = "") -> None:
    """That what was seen is within 20 % and 200 MiB of what was planned."""
    assert abs(planned - seen) <= 0.2 * planned + 200 * MIB, (
        f"{what} planned {planned / MIB:.0f} MiB, seen {seen / MIB:.0f} MiB"
    )


def mark(device: torch.device = CPU) -> int:
    """Forgets the largest so far, gives back what is free, and returns what is left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return forget("self")


def since(before: int, device: torch.device = CPU) -> int:
    """The largest use since the last mark, above what an earlier one found."""
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else largest("self")) - before


def forget(process: int | str) -> int:
    """Forgets the largest resident size of a process so far; returns the size now."""
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return _resident(process, "VmRSS")


def largest(process: int | str) -> int:
    """The largest resident size of a process since it was forgotten."""
    return _resident(process, "VmHWM")


def _resident(process: int | str, key: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)
