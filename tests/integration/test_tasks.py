"""What a task may be besides a model of tensors: dicts, a part of the parameters, a measurement, bad luck."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn import functional as F

import feature_task
import stored
from dask_processes import DaskProcesses
from drives import Drives
from influence_job.worker import tensor_file
from jobs import Jobs

LAMBDA = 0.05
CHUNKS = {"test": 3, "train": 16}
DIRECT = {"name": "Direct", "regularization": LAMBDA, "secondOrder": "GeneralizedGaussNewton"}
CG = {**DIRECT, "name": "Cg", "rtol": 1e-10, "preconditioner": {"name": "Jacobi", "samples": 5}}


def changes(entrypoint: str, method: dict[str, Any] | None = None) -> dict[str, Any]:
    """A job of one of `feature_task`'s entry points."""
    return {
        "task": {"entrypoint": f"feature_task:{entrypoint}"},
        "method": method or DIRECT,
        "chunks": CHUNKS,
    }


@pytest.mark.parametrize("method", [DIRECT, CG], ids=["Direct", "Cg with Jacobi"])
def test_dicts_a_part_of_the_parameters_and_a_measurement_give_the_scores_of_the_formula(
    method: dict[str, Any], jobs: Jobs, tmp_path: Path
) -> None:
    """Token ids are integers, and no score is rounded to one; double precision stays double precision."""
    jobs.finish(jobs.manifest(changes("task", method)), output=tmp_path / "result.zarr", workers=1)
    found = xarray.open_zarr(tmp_path / "result.zarr")["influences"]
    assert found.dtype == np.float64
    _assert_close(found.values, _influences(feature_task.task().model))


def test_every_worker_calls_the_entry_point_once_and_the_driver_never_does(
    jobs: Jobs, tmp_path: Path
) -> None:
    """Neither model nor data passes through the scheduler; denormals are zero where the work is done."""
    calls = tmp_path / "calls"
    manifest = jobs.manifest(changes("notes_its_process"))
    run = jobs.finish(manifest, output=tmp_path / "result.zarr", workers=2, env={"CALLS": str(calls)})
    by_process = Counter(calls.read_text().split())
    assert set(by_process.values()) == {1}
    assert 1 <= len(by_process) <= 2
    assert str(run.process.pid) not in by_process
    opened = xarray.open_zarr(tmp_path / "result.zarr")
    for side in ("test", "train"):
        assert {str(pid) for pid in opened[f"{side}_process"].values} <= set(by_process)
        assert opened[f"{side}_flushes"].values.all()


def test_an_entry_point_that_trains_differently_each_time_gives_one_model_to_all_workers(
    jobs: Jobs, tmp_path: Path
) -> None:
    """Scores are those of the model in the store; another job there is refused."""
    path, manifest = tmp_path / "result.zarr", jobs.manifest(changes("trains_differently"))
    jobs.finish(manifest, output=path, workers=2)
    kept = stored.open_store(path).get("fit/model")
    assert kept is not None
    model = feature_task.task().model
    model.load_state_dict(dict(tensor_file.unpack(kept, stored.open_store(path), "fit/model")))
    _assert_close(xarray.open_zarr(path)["influences"].values, _influences(model))
    before = stored.result(stored.open_store(path))
    again = jobs.run(manifest, output=path, workers=1)
    assert again.code == 64
    assert "StoreMismatch" in again.stderr
    assert "model: " in again.stderr
    assert stored.result(stored.open_store(path)) == before


def test_a_later_attempt_of_a_job_that_trains_differently_takes_the_stored_model(
    drives: Drives, dask: DaskProcesses, tmp_path: Path
) -> None:
    """With workers that were all started anew; nothing that the first attempt computed is lost."""
    path = tmp_path / "result.zarr"
    small = {"chunks": {"test": 3, "train": 4}, "output": {"url": str(path)}}
    asked = {**changes("trains_differently"), **small}
    dask.environment["BARRIER_PACE"] = "0.6"
    dask.scheduler()
    dask.worker(), dask.worker()
    first = drives.start(drives.document(asked, attempt=1))
    first.wait_until(lambda: _regions(path) > 0, "a region in the ledger")
    first.kill()
    dask.kill()
    kept, held = stored.open_store(path).get("fit/model"), _regions(path)
    assert 0 < held < 15
    dask.environment["BARRIER_PACE"] = "0"
    dask.scheduler()
    dask.worker(), dask.worker()
    second = drives.start(drives.document(asked, attempt=2))
    assert second.wait().code == 0, second.stderr
    assert stored.open_store(path).get("fit/model") == kept
    model = feature_task.task().model
    model.load_state_dict(dict(tensor_file.unpack(kept or b"", stored.open_store(path), "fit/model")))
    _assert_close(xarray.open_zarr(path)["influences"].values, _influences(model))


def test_a_region_that_kills_its_workers_ends_the_job_and_is_named(
    drives: Drives, dask: DaskProcesses, tmp_path: Path
) -> None:
    """Instead of killing every worker that ever comes; what is done is kept for a job that has the memory."""
    path = tmp_path / "result.zarr"
    asked = {**changes("may_die"), "output": {"url": str(path)}}
    dask.environment |= {"DEADLY": "yes", "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    dask.scheduler()
    dask.worker(), dask.worker(), dask.worker()
    run = drives.start(drives.document(asked))
    assert run.wait().code == 64, run.stderr
    words = run.last_words
    assert words.last_error is not None
    assert words.last_error.reason == "RegionFailed"
    for word in ("fit/curvature/range 0", "workers died", "out-of-memory", "raise spec.workers.resources"):
        assert word in words.last_error.message
    assert "Traceback" not in run.stderr
    del dask.environment["DEADLY"]
    dask.worker()
    again = drives.start(drives.document(asked, attempt=2))
    assert again.wait().code == 0, again.stderr
    _assert_close(xarray.open_zarr(path)["influences"].values, _influences(feature_task.task().model))


def test_data_that_cannot_be_read_for_a_moment_is_read_again(jobs: Jobs, tmp_path: Path) -> None:
    """The job finishes, and says what happened."""
    manifest, env = jobs.manifest(changes("breaks_once")), {"BROKEN_ONCE": str(tmp_path / "broken")}
    run = jobs.finish(manifest, "--json", output=tmp_path / "result.zarr", workers=1, env=env)
    document = json.loads(run.stdout)
    assert document["finished"]
    assert "the share is not mounted yet" in document["lastError"]["message"]
    found = xarray.open_zarr(tmp_path / "result.zarr")["influences"].values
    _assert_close(found, _influences(feature_task.task().model))


RESTLESS = """\
import os
from pathlib import Path

import traced_task

print("printed by the module")
Path("elsewhere").mkdir(exist_ok=True)
os.chdir("elsewhere")


def task():
    print("printed by the task")
    os.system("echo printed by a command")
    os.chdir("/")
    return traced_task.task()
"""


def test_a_task_that_changes_the_working_directory_and_prints_changes_no_url_and_no_document(
    jobs: Jobs, tmp_path: Path, undisturbed: Any
) -> None:
    """Relative urls are those of the folder that the command was started in."""
    (tmp_path / "restless.py").write_text(RESTLESS)
    task = {"task": {"entrypoint": "restless:task"}}
    factors = jobs.manifest({**task, "operation": "InfluenceFactors", "output": {"url": "factors.zarr"}})
    scores = jobs.manifest(
        {
            **task,
            "operation": "InfluencesFromFactors",
            "factors": {"url": "factors.zarr"},
            "output": {"url": "scores.zarr"},
        }
    )
    for manifest, store in ((factors, "factors.zarr"), (scores, "scores.zarr")):
        planned = jobs.plan(manifest, "--json")
        assert planned.returncode == 0, planned.stderr
        run = jobs.finish(manifest, "--json", workers=1, installed=True)  # whose workers inherit its stdout
        assert json.loads(planned.stdout)["regions"] >= 0
        assert json.loads(run.stdout)["result"]["url"] == str(tmp_path / store)
        for said in (planned.stderr, run.stderr):
            for source in ("the module", "the task", "a command"):
                assert f"printed by {source}" in said
    found = xarray.open_zarr(tmp_path / "scores.zarr")["influences"].values
    np.testing.assert_allclose(
        found, xarray.open_zarr(undisturbed.path)["influences"].values, rtol=1e-4, atol=1e-6
    )
    assert "printed by the task" in jobs.finish(factors, workers=1).stdout
    assert list(tmp_path.glob("elsewhere/**/*.zarr")) == []


def test_batches_that_are_dicts_need_a_forward(jobs: Jobs, tmp_path: Path) -> None:
    run = jobs.run(jobs.manifest(changes("forgets_forward")), output=tmp_path / "result.zarr", workers=1)
    assert run.code == 64
    for word in ("InvalidTask", "InfluenceTask.forward", "dict", "give forward(model, batch)"):
        assert word in run.stderr, run.stderr
    assert "Traceback" not in run.stderr


def _regions(path: Path) -> int:
    held = stored.held(stored.open_store(path)) if (path / "ledger").exists() else set()
    return sum(kind == "region" for kind, _ in held)


def _assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


def _influences(model: torch.nn.Module) -> np.ndarray:
    """`[T, N]`: `∇measurement · (H + λI)^-1 · ∇loss` over body and head, by torch.func alone."""
    everything = {name: p.detach().double() for name, p in model.named_parameters()}
    names = [name for name in everything if name.startswith(("body.", "head."))]
    flat = torch.cat([everything[name].reshape(-1) for name in names])

    def logits(parameters: Tensor, ids: Tensor) -> Tensor:
        pieces = parameters.split([everything[name].numel() for name in names])
        own = {n: piece.view(everything[n].shape) for n, piece in zip(names, pieces, strict=True)}
        found: Tensor = functional_call(model, {**everything, **own}, (ids[None],))["logits"]
        return found

    def gradients(function: Any, batch: dict[str, Tensor]) -> Tensor:
        def value(parameters: Tensor, ids: Tensor, label: Tensor) -> Tensor:
            result: Tensor = function({"logits": logits(parameters, ids)}, {"labels": label[None]})
            return result

        return vmap(grad(value), (None, 0, 0))(flat, batch["input_ids"], batch["labels"])

    train = feature_task.Sentences(feature_task.TRAIN, 1).read(0, feature_task.TRAIN)
    test = feature_task.Sentences(feature_task.TEST, 2).read(0, feature_task.TEST)
    jacobian = vmap(jacrev(logits), (None, 0))(flat, train["input_ids"])[:, 0]
    outputs = vmap(logits, (None, 0))(flat, train["input_ids"])[:, 0]
    second = vmap(hessian(lambda f, label: F.cross_entropy(f[None], label[None])), (0, 0))
    middle = second(outputs, train["labels"])
    curvature = torch.einsum("nop,noq,nqr->pr", jacobian, middle, jacobian) / feature_task.TRAIN
    shifted = curvature + LAMBDA * torch.eye(len(flat), dtype=torch.float64)
    factors = torch.linalg.solve(shifted, gradients(feature_task.margin, test).T).T
    return (factors @ gradients(feature_task.loss, train).T).numpy()
