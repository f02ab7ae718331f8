"""What makes a worker's numbers the same every time, and what it leaves out."""

from __future__ import annotations

import subprocess
import sys

DETERMINISM = """
import torch
from influence_job.worker.environment import make_deterministic
make_deterministic(tf32=False)
assert torch.are_deterministic_algorithms_enabled()
assert torch.is_deterministic_algorithms_warn_only_enabled()
assert torch.get_num_threads() == 1
same = torch.full((1000,), 3.0)
del same
# Torch would fill with NaN what nobody has written.
assert not torch.empty(1000).isnan().all()
"""


def test_algorithms_are_deterministic_and_memory_is_not_filled_before_it_is_written() -> None:
    run = subprocess.run([sys.executable, "-c", DETERMINISM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
