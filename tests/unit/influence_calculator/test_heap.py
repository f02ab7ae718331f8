"""Memory that a worker has freed is used again, not cleared anew: seen in the faults of its pages."""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import dedent

import pytest

MEASURE = """
    import pickle, resource, threading
    import numpy as np

    def faults():
        for _ in range(50):
            np.full(2**17, 1.0)  # 1 MiB
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(50):
            np.full(2**17, 1.0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def in_a_thread():
        found = []
        thread = threading.Thread(target=lambda: found.append(faults()))
        thread.start(), thread.join()
        return found[0]
"""
ALLOCATED = 50 * 2**20 // os.sysconf("SC_PAGESIZE")
"""Pages that are faulted in when every buffer is mapped anew."""
DASK = {"MALLOC_TRIM_THRESHOLD_": "65536"}
"""What Dask's nannies set."""
ARRIVES = """
    from influence_calculator.chunk_tasks import WorkerSide
    class Model:
        def at_rest(self):
            return lambda: self
    pickle.loads(pickle.dumps(WorkerSide(Model(), None, np.dtype("float32"))))
"""
BUILDS = """
    from influence_job.spec import InfluenceJobSpec
    from influence_job.worker.session import build
    build(InfluenceJobSpec.model_validate({
        "task": {"entrypoint": "influence_job.examples.digits:task", "arguments": {"epochs": 1}},
        "method": {"name": "Ekfac", "regularization": 0.05},
        "device": "cpu",
        "output": {"url": "unused"},
    }))
"""


def measured(before: str, environment: dict[str, str]) -> tuple[int, int]:
    """Faults in the main thread and in another one of a process that has run `before`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    code = dedent(MEASURE) + dedent(before) + "\nprint(faults(), in_a_thread())"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**own, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    main, other = ran.stdout.split()
    return int(main), int(other)


@pytest.mark.parametrize("environment", [{}, DASK], ids=["plain", "of a nanny"])
@pytest.mark.parametrize("before", [ARRIVES, BUILDS], ids=["a model comes", "a job's session"])
def test_freed_memory_is_kept(before: str, environment: dict[str, str]) -> None:
    assert max(measured(before, environment)) < ALLOCATED / 10


def test_without_that_every_buffer_is_cleared_anew() -> None:
    """What the other tests measure is there."""
    assert min(measured("", DASK)) >= ALLOCATED


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"])
def test_what_a_user_chose_is_left_alone(name: str) -> None:
    assert min(measured(ARRIVES, {name: "131072"})) >= ALLOCATED
