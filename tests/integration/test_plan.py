"""`influence plan`: what it says is what a run does, and it leaves no trace."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import stored
from counted_reads_task import READS
from influence_calculator.maths.one_by_one import PROBED
from influence_job.plan import Plan
from jobs import Jobs

GROUPS = {
    "task": {"arguments": {"hidden": 40}},
    "workers": {"resources": {"limits": {"memory": "200Ki"}}},
}
"""So little memory that the factors of all test examples do not fit together."""


def test_the_plan_that_is_printed_is_the_one_that_a_run_stores(jobs: Jobs, tmp_path: Path) -> None:
    """Whatever machine and however many workers run it."""
    manifest = jobs.manifest(GROUPS)
    planned = json.loads(jobs.plan(manifest, "--json").stdout)
    jobs.finish(manifest, output=tmp_path / "result.zarr", workers=3)
    ran = stored.plan_of(stored.open_store(tmp_path / "result.zarr"))
    assert {name: planned[name] for name in ran.to_json()} == ran.to_json()
    assert (planned["groups"], planned["regions"]) == (ran.groups, ran.regions) == (2, 40)
    assert planned["resultBytes"] == 24 * 640 * 4


SOLVED = {"name": "Cg", "maxiter": 3, "rtol": 1e-12, "secondOrder": "GeneralizedGaussNewton"}
NO_RESTART = {"rank": 2, "krylovDimension": 12, "tol": 1e-12, "maxIter": 0}


def counted_reads(
    jobs: Jobs, path: Path, changes: dict[str, Any], workers: int = 1, **arguments: Any
) -> tuple[Plan, list[int], dict[tuple[int, int], int]]:
    """A run's plan, how often it read each training chunk, and what else it read of the training data."""
    counted = {"task": {"entrypoint": "counted_reads_task:task", "arguments": arguments}}
    reads = path.with_suffix(".reads")
    jobs.finish(
        jobs.manifest({**counted, "chunks": {"test": 8, "train": 64}, **changes}),
        output=path,
        workers=workers,
        env={READS: str(reads)},
    )
    plan = stored.plan_of(stored.open_store(path))
    times = Counter(tuple(map(int, line.split())) for line in reads.read_text().splitlines())
    of_chunks = [times.pop(plan.train_range(chunk)) for chunk in range(plan.train_chunks)]
    return plan, of_chunks, dict(times)


def test_what_loading_saw_of_the_model_at_work_no_other_worker_looks_for_again(
    jobs: Jobs, tmp_path: Path
) -> None:
    """A look takes gradients of some examples one by one, for which no stage has planned."""
    looks = [
        counted_reads(jobs, tmp_path / f"{workers}.zarr", {"method": {"name": "Ekfac"}}, workers)[2]
        for workers in (1, 2)
    ]
    assert looks[0] == looks[1]
    assert looks[0][0, PROBED] >= 1


@pytest.mark.parametrize(
    ("method", "little", "groups"),
    [
        ({"name": "GradDot", "regularization": None}, {}, 1),
        ({"name": "Ekfac"}, {"workers": GROUPS["workers"]}, 2),
        ({"name": "Arnoldi", **NO_RESTART}, {}, 1),
    ],
    ids=["GradDot", "Ekfac", "Arnoldi"],
)
def test_a_run_reads_each_training_chunk_as_often_as_the_plan_says(
    method: dict[str, Any], little: dict[str, Any], groups: int, jobs: Jobs, tmp_path: Path
) -> None:
    """Beside a few examples that Loading reads."""
    path = tmp_path / "result.zarr"
    plan, of_chunks, others = counted_reads(jobs, path, {"method": method, **little}, hidden=40)
    assert (plan.train_chunks, plan.groups) == (10, groups)
    assert plan.passes_per_iteration == 0
    assert of_chunks == [plan.training_passes] * plan.train_chunks
    assert max(stop - start for start, stop in others) <= PROBED


@pytest.mark.parametrize(
    ("method", "keeps", "repeated"),
    [(SOLVED, False, 3 + 1), ({"name": "InverseHarmonicMean"}, False, 1), (SOLVED, True, None)],
    ids=["Cg", "InverseHarmonicMean", "Cg, kept"],
)
def test_a_solver_reads_training_data_that_it_cannot_keep_in_each_of_its_passes(
    method: dict[str, Any], keeps: bool, repeated: int | None, jobs: Jobs, tmp_path: Path
) -> None:
    """One per test chunk and iteration, and one that checks what conjugate gradients end with; data that it
    can keep once. The first chunk shows which they are.
    """
    plan, of_chunks, _ = counted_reads(jobs, tmp_path / "result.zarr", {"method": method}, keeps=keeps)
    assert plan.passes_per_iteration == 3
    further = 1 if repeated is None else 3 * repeated
    assert of_chunks[1:] == [plan.training_passes + further] * (plan.train_chunks - 1)


def test_a_plan_in_words_names_grid_groups_passes_bytes_and_memory(jobs: Jobs) -> None:
    planned = jobs.plan(jobs.manifest(GROUPS))
    assert planned.returncode == 0, planned.stderr
    text = " ".join(planned.stdout.split())
    for words in (
        "traced: Influences (Up) with Ekfac on cpu",
        "24 test, 640 training; 403 parameters",
        "40 regions of 16 × 32 examples",
        "2 groups of test chunks",
        "4 over the training set (2 to fit, 2 to score)",
        "24 × 640 of float32, 60 KiB, in unused",
        "the budget on cpu is 100 KiB",
    ):
        assert words in text, f"expected {words!r} in\n{planned.stdout}"
    for stage in ("Loading", "Fitting", "Factors", "Scores"):
        assert stage in text


def test_a_plan_says_when_long_top_lists_make_its_groups(jobs: Jobs) -> None:
    many = {
        "task": {"entrypoint": "wide_task:task", "arguments": {"hidden": 8, "train": 8192, "test": 3000}},
        "method": {"name": "GradDot", "regularization": None},
        "workers": {"resources": {"limits": {"memory": "512Mi"}}},
    }
    said = "of more test examples the top 8192 would not fit a worker's memory"
    long, short = (jobs.plan(jobs.manifest({**many, "output": {"topK": k}})).stdout for k in (8192, 8))
    assert "14 groups of test chunks: one pass over the training set each; " + said in long
    assert "1 group of test chunks" in short
    assert "would not fit" not in short + jobs.plan(jobs.manifest(GROUPS)).stdout


def test_a_job_for_a_gpu_is_planned_where_there_is_none(jobs: Jobs) -> None:
    planned = jobs.plan(jobs.manifest(), "--device", "cuda")
    assert planned.returncode == 0, planned.stderr
    assert "with Ekfac on cuda" in planned.stdout


def test_planning_leaves_no_trace(jobs: Jobs, half_done: Any, tmp_path: Path) -> None:
    """Neither where nothing is, nor in a store that is there."""
    before = stored.contents(stored.open_store(half_done.path))
    manifest, there = jobs.manifest(), sorted(tmp_path.iterdir())
    for output in (half_done.path, tmp_path / "new.zarr"):
        planned = jobs.plan(manifest, "--output", str(output))
        assert planned.returncode == 0, planned.stderr
    assert sorted(tmp_path.iterdir()) == there
    assert stored.contents(stored.open_store(half_done.path)) == before


def test_a_job_that_does_not_fit_is_told_a_method_that_takes_less(jobs: Jobs) -> None:
    little = {"workers": {"resources": {"limits": {"memory": "4Ki"}}}}
    for method, other in (("Cg", "use Ekfac"), ("Ekfac", "use Logra")):
        planned = jobs.plan(jobs.manifest({**little, "method": {"name": method, "regularization": 0.1}}))
        assert planned.returncode == 64
        assert "PlanImpossible: spec.workers" in planned.stderr
        assert other in planned.stderr


def test_a_result_that_is_too_large_is_refused_by_the_plan(jobs: Jobs) -> None:
    planned = jobs.plan(jobs.manifest({"output": {"maxBytes": "10Ki"}}))
    assert planned.returncode == 64
    assert "error: PlanImpossible: spec.output.maxBytes" in planned.stderr
    assert str(24 * 640 * 4) in planned.stderr
