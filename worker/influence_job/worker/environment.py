"""The numerical environment of a worker process: what must be equal for results to be equal bit for bit."""

from __future__ import annotations

import os

import torch


def make_deterministic(tf32: bool) -> None:
    """One intra-op thread and deterministic algorithms, for this process."""
    torch.set_num_threads(1)
    # As use_deterministic_algorithms(True, warn_only=True), without its import of torch's compiler: a second
    # or two in every process.
    torch.set_deterministic_debug_mode("warn")
    # Or every torch.empty is filled first, a fifth of EK-FAC's time; nothing reads what it did not write.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  mypy does not see it
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False


def describe(device: torch.device) -> str:
    """One line that stands in every ledger row: torch, the library below it, and the processor."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"torch {torch.__version__}; cuda {torch.version.cuda}; {name}; deterministic"
    capability = torch.backends.cpu.get_cpu_capability()
    blas = "mkl" if torch.backends.mkl.is_available() else "openblas"
    return (
        f"torch {torch.__version__}; {blas} {os.environ.get('MKL_CBWR', '')}; cpu {capability}; "
        f"{torch.get_num_threads()} thread"
    )
