"""W4: many regions of a tiny model through a whole job on this machine, and what the driver's memory does.

Every training example is a region of its own. The scheduler lives in the driver's process (LocalCluster),
so that its memory is measured with the driver's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import psutil
import tiny_linear
import zarr

from influence_job.local import run_local
from influence_job.progress import Progress, Stage
from influence_job.spec import InfluenceJob

REGULARIZATION = 0.01
SETTLED = 1000
"""Regions after which whatever is allocated once has been."""


def main() -> None:
    """Runs the job and writes what was measured to standard output as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--regions", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    process = psutil.Process()
    samples: list[tuple[int, int]] = []

    def sample(progress: Progress) -> None:
        if progress.stage is Stage.SCORES:
            samples.append((progress.regions.done, process.memory_info().rss))

    start = time.perf_counter()
    last = run_local(_job(options.regions, options.store), workers=options.workers, on_progress=sample)
    seconds = time.perf_counter() - start
    stages = {
        times.name.value: (times.end - times.start).total_seconds() for times in last.stages if times.end
    }
    print(
        json.dumps(
            {
                "regions": options.regions,
                "seconds": seconds,
                "stages": stages,
                "memory": samples[:: max(1, len(samples) // 100)],
                "memory_growth": memory_growth(samples),
                "largest_error": largest_error(options.store, options.regions),
            }
        )
    )


def memory_growth(samples: list[tuple[int, int]]) -> int:
    """Bytes from the first sample after `SETTLED` regions to the largest that follows."""
    after = [rss for done, rss in samples if done >= SETTLED]
    return max(after) - after[0]


def largest_error(store: Path, regions: int) -> float:
    """The largest difference between the stored influences and their closed form, relative to the largest.

    Squared error of a line: `g = 2 (w x + b − y) (x, 1)`, `H = (2/N) Σ (x, 1)(x, 1)ᵀ`.
    """
    source = tiny_linear.task(regions)
    weight, bias = (parameter.item() for parameter in source.model.parameters())
    x, y = (array.double().numpy()[:, 0] for array in source.train.read(0, regions))
    x_test, y_test = (array.double().numpy()[:, 0] for array in source.test.read(0, 1))

    def gradients(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (2 * (weight * x + bias - y))[:, None] * np.stack([x, np.ones_like(x)], axis=1)

    design = np.stack([x, np.ones_like(x)], axis=1)
    curvature = 2 / regions * design.T @ design + REGULARIZATION * np.eye(2)
    expected = gradients(x_test, y_test) @ np.linalg.solve(curvature, gradients(x, y).T)
    stored = np.asarray(zarr.open_group(store, mode="r")["influences"])
    return float(np.abs(stored - expected).max() / np.abs(expected).max())


def _job(regions: int, store: Path) -> InfluenceJob:
    return InfluenceJob.model_validate(
        {
            "apiVersion": "influence-operator.dev/v1alpha1",
            "kind": "InfluenceJob",
            "metadata": {"name": "regions"},
            "spec": {
                "task": {"entrypoint": "tiny_linear:task", "arguments": {"train": regions}},
                "operation": "Influences",
                "method": {"name": "Direct", "regularization": REGULARIZATION},
                "device": "cpu",
                "chunks": {"test": 1, "train": 1},
                "output": {"url": str(store)},
            },
        }
    )


if __name__ == "__main__":
    main()
