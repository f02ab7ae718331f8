"""What a worker of a whole job uses at most in each stage, against what `influence plan` says of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import stored
from jobs import Jobs, Run
from peak_memory import assert_planned, forget, largest

METHODS: dict[str, dict[str, Any]] = {
    "Ekfac": {"method": {"name": "Ekfac"}},
    "Ekfac, perturbations": {"method": {"name": "Ekfac"}, "mode": "Perturbation"},
    "Ekfac, of examples on themselves": {
        "method": {"name": "Ekfac"},
        "operation": "SelfInfluence",
        "chunks": {"test": None, "train": 64},
    },
    "Cg": {
        "method": {"name": "Cg", "maxiter": 1, "secondOrder": "GeneralizedGaussNewton"},
        "chunks": {"test": 12, "train": 128},
        "task": {"entrypoint": "wide_task:task", "arguments": {"test": 12}},
    },
    "Ekfac, a large buffer": {
        "method": {"name": "Ekfac"},
        "task": {"entrypoint": "wide_task:task", "arguments": {"hidden": 200, "buffer": 150_000_000}},
    },
    "GradDot": {"method": {"name": "GradDot", "regularization": None}},
    "GradDot, a large model": {
        "task": {"entrypoint": "wide_task:task", "arguments": {"hidden": 5000, "train": 8, "test": 2}},
        "method": {"name": "GradDot", "regularization": None},
        "chunks": {"test": 2, "train": 8},
    },
    "Cg, a large model": {
        "task": {"entrypoint": "wide_task:task", "arguments": {"hidden": 3000, "train": 8, "test": 2}},
        "method": {"name": "Cg", "maxiter": 1, "secondOrder": "Hessian"},
        "chunks": {"test": 2, "train": 8},
    },
    "GradDot, gradients": {
        "task": {"entrypoint": "wide_task:task", "arguments": {"train": 128}},
        "method": {"name": "GradDot", "regularization": None},
        "operation": "TrainingGradients",
        "chunks": {"test": None, "train": 128},
    },
    "GradDot, long top lists": {
        "task": {"entrypoint": "wide_task:task", "arguments": {"hidden": 8, "train": 8192, "test": 3000}},
        "method": {"name": "GradDot", "regularization": None},
        "chunks": {"test": 3000, "train": 512},
        "output": {"dense": False, "topK": 512},
    },
}


def stages_ended(run: Run) -> list[str]:
    """Those that the driver has told the duration of, in order."""
    return [line.partition(":")[0] for line in run.stderr.splitlines() if line.endswith(" s")]


def peaks(run: Run) -> tuple[int, dict[str, int]]:
    """Resident bytes of the idle worker, and the most in the stages, by how many had ended."""
    run.wait_until(lambda: stages_ended(run), "the preflight", 120)
    (worker,), ended = (process.pid for process in run.workers), len(stages_ended(run))
    idle, most = forget(worker), dict[int, int]()
    while run.code is None:
        try:
            if len(stages_ended(run)) > ended:
                ended = len(stages_ended(run))
                forget(worker)
            most[ended] = max(most.get(ended, 0), largest(worker))
        except OSError:
            break  # it has ended
        time.sleep(0.002)
    run.wait()
    assert run.code == 0, run.stderr
    return idle, {stage: most[i] for i, stage in enumerate(stages_ended(run)) if i in most}


@pytest.mark.parametrize("name", METHODS)
def test_a_worker_takes_what_the_plan_says(name: str, jobs: Jobs, tmp_path: Path) -> None:
    common = {"task": {"entrypoint": "wide_task:task"}, "chunks": {"test": 24, "train": 128}}
    manifest = jobs.manifest({**common, **METHODS[name]})
    path = tmp_path / "result.zarr"
    idle, seen = peaks(jobs.start(manifest, output=path, workers=1, installed=True))
    planned = stored.plan_of(stored.open_store(path)).memory
    for stage, memory in planned.items():
        assert_planned(memory.host, seen[stage] - idle, stage)
