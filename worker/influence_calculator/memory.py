"""How much memory a device has to spare."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own limit."""

_FILES = [
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
]
"""Limit, use and what it consists of, in version 2 and in version 1."""


def available_bytes(device: torch.device, cgroup: Path = CGROUP) -> int:
    """What can be allocated now: on a processor what the machine and the container have left, on a GPU what
    is free of it, of another accelerator 0, because torch cannot tell.
    """
    match device.type:
        case "cpu":
            return max(0, min([psutil.virtual_memory().available, *_left_of_limits(cgroup)]))
        case "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        case _:
            return 0


def _left_of_limits(cgroup: Path) -> list[int]:
    left = []
    for names in _FILES:
        try:
            limit, use, parts = ((cgroup / name).read_text() for name in names)
            # Files that were read count as used until the memory is needed.
            cached = dict(line.split() for line in parts.splitlines())["inactive_file"]
            left.append(int(limit) - int(use) + int(cached))
        except (OSError, ValueError, KeyError):  # of the other version, or `max`
            continue
    return left
