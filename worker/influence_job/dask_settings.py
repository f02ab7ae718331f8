"""How Dask's processes are set up for a job, on this machine and in a cluster: configuration and environment.

Read by `influence_job.local` and by the operator, whose image has neither torch nor Dask: the standard
library only.
"""

from __future__ import annotations

ALLOWED_DEATHS = 20
"""Workers that may die under one task before it, and with it the job, is given up."""

SETTINGS: dict[str, object] = {
    "distributed.scheduler.allowed-failures": ALLOWED_DEATHS,
    # Memory is planned; a worker that spilled or paused would only hide a wrong plan.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.comm.timeouts.connect": "60s",
    # It looks at all threads every 10 ms, and CPython before 3.12.4 may wait for itself while it does
    # (sys._current_frames collecting a threading.local, gh-106883): a worker that hangs for minutes.
    "distributed.worker.profile.enabled": False,
    # Each connection and topic keeps its last messages for debugging; 1000 of ours are tens of megabytes.
    "distributed.admin.low-level-log-length": 100,
    # All workers import torch while they start, side by side, instead of each with its first task.
    "distributed.worker.preload": ["influence_job.worker.loading"],
}
"""Dask configuration of scheduler, workers and client."""

THREAD_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Fixed code paths inside MKL whatever the load of the machine.
    "MKL_CBWR": "AUTO",
    # cuBLAS is deterministic only with a workspace of its own per stream.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Environment variables that must stand before torch is imported; set for every worker process."""

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
"""What CUDA shows a process, from its first call on: of several, each worker of one machine keeps one."""
