"""Operation InfluencesByToken: the part of each training token, and how it is planned and shown."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import xarray

import tokens_task
from influence_calculator import EkfacInfluence
from jobs import INFLUENCE, Jobs
from resuming import kill_and_resume

TRAIN, TEST, S = 90, 12, tokens_task.TOKENS
TASK: dict[str, Any] = {"entrypoint": "tokens_task:task", "arguments": {"train": TRAIN, "test": TEST}}
JOB: dict[str, Any] = {
    "task": TASK,
    "operation": "InfluencesByToken",
    "chunks": {"test": 8, "train": 32},
}


def test_a_job_gives_the_librarys_parts(jobs: Jobs, tmp_path: Path) -> None:
    """And what is ranked, counted and shown is their sum."""
    path = tmp_path / "parts.zarr"
    run = jobs.finish(jobs.manifest({**JOB, "output": {"verify": "All"}}), "--json", output=path)
    assert json.loads(run.stdout)["result"]["shape"] == [TEST, TRAIN, S]
    task = tokens_task.task(TRAIN, TEST)
    test, train = (source.read(0, len(source))["ids"] for source in (task.test, task.train))
    model = EkfacInfluence(
        task.model, update_diagonal=True, hessian_regularization=0.05, loss=tokens_task.loss_of_ids
    ).fit([(train, train)])
    expected = model.influences_by_token(test, test, train, train).numpy()
    found = xarray.open_zarr(path, consolidated=False)
    assert found["influences"].dims == ("test", "train", "token")
    np.testing.assert_allclose(found["influences"].values, expected, rtol=2e-3, atol=1e-4)
    assert not found["influences"].values[:, train.numpy() == 0].any()
    whole = model.influences(test, test, train, train).numpy()
    np.testing.assert_allclose(found["most_helpful_score"][:, 0], whole.max(1), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(found["score_mean"], whole.mean(1), rtol=2e-3, atol=1e-4)
    shown = subprocess.run([INFLUENCE, "show", str(path)], capture_output=True, text=True, check=True)
    text = " ".join(shown.stdout.split())
    assert "InfluencesByToken (Up), complete" in text
    assert f"{TEST} test × {TRAIN} training examples × {S} tokens, 67 parameters" in text
    assert "It is the sum over the tokens" in text


def test_a_killed_job_computes_what_was_in_flight_and_nothing_else(jobs: Jobs, tmp_path: Path) -> None:
    kill_and_resume(jobs, tmp_path, JOB)


def test_the_plan_counts_every_token(jobs: Jobs) -> None:
    planned = jobs.plan(jobs.manifest(JOB))
    assert planned.returncode == 0, planned.stderr
    text = " ".join(planned.stdout.split())
    assert "InfluencesByToken (Up) with Ekfac" in text
    assert f"3 regions of {TEST} × 32 examples × {S} tokens" in text
    assert f"result {TEST} × {TRAIN} × {S} of float32" in text


def test_a_model_without_tokens_is_refused_before_anything_is_computed(jobs: Jobs) -> None:
    planned = jobs.plan(jobs.manifest({"operation": "InfluencesByToken"}))
    assert planned.returncode == 64
    assert "InfluenceTask.model: influences by token need" in planned.stderr
    assert "'0' (Linear), called without a token dimension" in " ".join(planned.stderr.split())


def test_texts_of_another_length_are_refused(jobs: Jobs, tmp_path: Path) -> None:
    """A batch that is cut to its longest text has no place for its tokens in the result."""
    task = {**TASK, "arguments": {**TASK["arguments"], "trimmed": True}}
    run = jobs.run(jobs.manifest({**JOB, "task": task}), output=tmp_path / "x.zarr")
    assert run.code == 64
    assert "expected 2 tokens, as the first one has, got 6; pad all" in " ".join(run.stderr.split())
