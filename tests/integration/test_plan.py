"""`influence plan`: what it says is what a run does, and it leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import stored
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
