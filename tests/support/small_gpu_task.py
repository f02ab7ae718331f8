"""The traced task with a layer so wide that gradients fill a GPU of 2 GiB: all that a process gets."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import traced_task
from influence_job.task import InfluenceTask

BYTES = 2 << 30
WIDTH = 2000


def task() -> InfluenceTask:
    """A gradient takes 16 MB."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(BYTES / torch.cuda.get_device_properties(0).total_memory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(traced_task.FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(WIDTH, traced_task.CLASSES))
    return replace(traced_task.task(), model=model.eval())
