"""TrainingGradients once, then InfluencesFromGradients for one test set after another."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray
import zarr

import oracle
import queries_task
import stored
from explicit_projections import explicit_layer
from jobs import INFLUENCE, Barrier, Jobs, times_written
from resuming import kill_and_resume

LAMBDA, RANK = 0.05, 2
LOGRA = {"name": "Logra", "regularization": LAMBDA, "rank": RANK}
TASK = {"entrypoint": "queries_task:task"}
GONE = {"QUERIES_NO_TRAIN": "1"}
STORING: dict[str, Any] = {
    "task": TASK,
    "operation": "TrainingGradients",
    "method": LOGRA,
    "chunks": {"test": None, "train": 16},
}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Trak": ({"name": "Trak", "regularization": LAMBDA, "rank": 7}, {}),
    "Ekfac": ({"name": "Ekfac", "regularization": LAMBDA}, {}),
    "TracIn": ({"name": "TracIn", "regularization": None}, {"measured": True}),
}


OWN_TASK = """
import os
from dataclasses import replace

import queries_task
from influence_job.data import ArraySource


def task():
    own = queries_task.task()
    train = ArraySource(*own.train.read(0, 0)) if "NO_EXAMPLES" in os.environ else own.train
    return replace(own, train=train, parameters=os.environ.get("TRACKED"))
"""
"""Tracks what the environment says, of which no spec and no source tells."""


def storing(method: Mapping[str, Any] = LOGRA, **arguments: Any) -> dict[str, Any]:
    return {**STORING, "method": dict(method), "task": {**TASK, "arguments": arguments}}


def asking(store: Path, method: Mapping[str, Any] = LOGRA, **arguments: Any) -> dict[str, Any]:
    return {
        **storing(method, **arguments),
        "operation": "InfluencesFromGradients",
        "gradients": {"url": str(store)},
        "chunks": {"test": 4, "train": None},
    }


def at_once(method: Mapping[str, Any] = LOGRA, **arguments: Any) -> dict[str, Any]:
    return {**storing(method, **arguments), "operation": "Influences", "chunks": {"test": 4, "train": 16}}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gradient store that nobody may change."""
    made = Jobs(tmp_path_factory.mktemp("gradients"))
    path = made.folder / "gradients.zarr"
    made.finish(made.manifest(STORING), output=path)
    return path


def test_two_test_sets_are_scored_from_one_store_without_training_data(
    jobs: Jobs, tmp_path: Path, gradients: Path
) -> None:
    """Scores, top, statistics and coordinates are those of one job; the store is read and never written."""
    before = stored.contents(stored.open_store(gradients))
    for first in (0, 12):
        path, whole = tmp_path / f"{first}.zarr", tmp_path / f"whole-{first}.zarr"
        run = jobs.finish(jobs.manifest(asking(gradients, first=first)), "--json", output=path, env=GONE)
        jobs.finish(jobs.manifest(at_once(first=first)), output=whole)
        assert not [name for name in times_written(run, path) if name.startswith(("gradients/0", "fit/p"))]
        assert json.loads(run.stdout)["solver"]["converged"] == 8
        found, expected = (xarray.open_zarr(place, consolidated=False) for place in (path, whole))
        scale = np.abs(expected["influences"].values).max()
        for name in ("influences", "most_harmful_score", "most_helpful_score", "score_mean"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6 * scale)
        assert found["influences"].dims == ("test", "train")
        for name in ("train_label", "train_confidence", "test_label", "test_confidence", "solver_status"):
            np.testing.assert_array_equal(found[name], expected[name])
        assert set(found.variables) == set(expected.variables)
        assert set(found["influences"].coords) == set(expected["influences"].coords)
    assert stored.contents(stored.open_store(gradients)) == before


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_solves_by_its_fit_alone_takes_both_steps(
    name: str, jobs: Jobs, tmp_path: Path
) -> None:
    method, arguments = METHODS[name]
    store, path, whole = (tmp_path / f"{place}.zarr" for place in ("gradients", "result", "whole"))
    jobs.finish(jobs.manifest(storing(method, **arguments)), output=store)
    jobs.finish(jobs.manifest(asking(store, method, **arguments)), output=path, env=GONE)
    jobs.finish(jobs.manifest(at_once(method, **arguments)), output=whole)
    found, expected = (zarr.open_group(place, mode="r")["influences"][:] for place in (path, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_in_float64_gradients_and_scores_are_those_of_explicit_projections(
    jobs: Jobs, tmp_path: Path
) -> None:
    """`φ = Sᵀg`; `Σ_b φ_test · ((1/N) Σ φ φᵀ + λI)^-1 φ_train`, from gradients of one example at a time."""
    store, path = tmp_path / "gradients.zarr", tmp_path / "result.zarr"
    jobs.finish(jobs.manifest(storing(double=True)), output=store)
    jobs.finish(jobs.manifest(asking(store, double=True)), output=path, env=GONE)
    task = queries_task.task(double=True)
    train, test = (
        oracle.example_gradients(task.model, F.cross_entropy, *source.read(0, len(source)))
        for source in (task.train, task.test)
    )
    opened = zarr.open_group(store, mode="r")
    expected = torch.zeros(len(test), len(train), dtype=torch.float64)
    for number, (block, o, i) in enumerate((("0", 5, 6), ("2", 3, 5))):
        columns = oracle.columns_of(task.model, (f"{block}.weight", f"{block}.bias"))
        S = explicit_layer(o, i, True, RANK, 0, block)
        φ, tests = train[:, columns] @ S, test[:, columns] @ S
        array = opened[f"gradients/{number}"]
        assert (array.attrs["block"], array.attrs["basis"]) == (block, "method")
        oracle.assert_close(torch.from_numpy(array[:]), φ, 1e-9)
        expected += oracle.influences(φ.T @ φ / len(φ), LAMBDA, tests, φ)
    found = torch.from_numpy(zarr.open_group(path, mode="r")["influences"][:])
    oracle.assert_close(found, expected, 1e-9)


@pytest.mark.parametrize(
    ("operation", "array"), [("TrainingGradients", "gradients"), ("InfluenceFactors", "factors")]
)
def test_chunks_that_rot_before_they_are_verified_are_computed_again(
    operation: str, array: str, jobs: Jobs, tmp_path: Path
) -> None:
    """Of gradients and factors, which other jobs take weeks later."""
    chunks = STORING["chunks"] if array == "gradients" else {"test": 4, "train": 16}
    changes = {**STORING, "operation": operation, "chunks": chunks, "output": {"verify": "All"}}
    manifest, path, whole = jobs.manifest(changes), tmp_path / "result.zarr", tmp_path / "whole.zarr"
    jobs.finish(manifest, output=whole)
    run = jobs.start(manifest, "--json", output=path, barrier=Barrier("enter", "before", "Verifying"))
    run.wait_for_barrier()
    (path / array / "1" / "c" / "1" / "0").unlink()
    run.open_barrier()
    assert run.wait().code == 0, run.stderr
    assert any(f"1 chunks of {array}" in said for said in json.loads(run.stdout)["warnings"])
    assert stored.differing(*(stored.result(stored.open_store(place)) for place in (path, whole))) == []


def test_a_killed_job_that_stores_gradients_computes_the_rest_alone(jobs: Jobs, tmp_path: Path) -> None:
    kill_and_resume(jobs, tmp_path, STORING, "gradients", "^gradients/0/c/", 6)


def test_a_killed_job_that_scores_stored_gradients_computes_the_rest_alone(
    jobs: Jobs, tmp_path: Path, gradients: Path
) -> None:
    kill_and_resume(jobs, tmp_path, asking(gradients), objects="^influences/c/0/", last=5)


def test_gradients_of_another_model_or_method_are_refused(
    jobs: Jobs, tmp_path: Path, gradients: Path
) -> None:
    """Both values are named."""
    path = tmp_path / "result.zarr"
    other = {"TRACED_MODEL_SCALE": "0.6"}
    run = jobs.run(jobs.manifest(asking(gradients)), output=path, env=other, workers=1)
    assert run.code == 64
    assert "spec.gradients.url" in run.stderr
    assert "model: the store was made with" in run.stderr
    for field, value, was in (("rank", 3, RANK), ("regularization", 0.1, LAMBDA), ("seed", 1, 0)):
        changed = asking(gradients, {**LOGRA, field: value})
        run = jobs.run(jobs.manifest(changed), output=path, workers=1)
        assert run.code == 64
        assert f"method.{field}: the store was made with {was}, this job says {value}" in run.stderr
        assert "run a TrainingGradients job with the same task and method" in run.stderr


@pytest.fixture
def own_task(jobs: Jobs) -> dict[str, Any]:
    (jobs.folder / "own_task.py").write_text(OWN_TASK)
    return {"entrypoint": "own_task:task"}


def test_other_tracked_parameters_neither_resume_nor_score_a_store(
    own_task: dict[str, Any], jobs: Jobs, tmp_path: Path
) -> None:
    """Projections of both are as wide, and the model is the same."""
    store, (trak, _) = tmp_path / "gradients.zarr", METHODS["Trak"]
    first, other = {"TRACKED": "^0"}, {"TRACKED": "^2"}
    manifest = jobs.manifest({**STORING, "method": trak, "task": own_task})
    begun = jobs.start(manifest, output=store, env=first, barrier=Barrier("enter", "before", "Gradients"))
    begun.wait_for_barrier()
    begun.kill()
    resumed = jobs.run(manifest, output=store, env=other, workers=1)
    jobs.finish(manifest, output=store, env=first)
    again = jobs.run(manifest, output=store, env=other, workers=1)
    query = jobs.manifest({**asking(store, trak), "task": own_task})
    scored = jobs.run(query, output=tmp_path / "result.zarr", env=other, workers=1)
    for refused in (resumed, again, scored):
        assert refused.code == 64, refused.stderr
        assert "StoreMismatch" in refused.stderr
        said = " ".join(refused.stderr.split())
        assert "the store alone leaves out 2 (2.weight, 2.bias)" in said
        assert "this job alone leaves out 2 (0.weight, 0.bias)" in said
    assert f"spec.gradients.url: {store} holds the gradients of another job" in scored.stderr


def test_factors_as_narrow_as_another_operation_takes_them_are_refused(jobs: Jobs, tmp_path: Path) -> None:
    """Scores with the rest of the columns would be of whatever lay in memory."""
    path, (trak, _) = tmp_path / "influences.zarr", METHODS["Trak"]
    jobs.finish(jobs.manifest(at_once(trak)), output=path)
    result = tmp_path / "result.zarr"
    shutil.copytree(path, result)
    from_factors = {
        **at_once(trak),
        "operation": "InfluencesFromFactors",
        "factors": {"url": str(path)},
        "output": {"onExisting": "Overwrite"},
    }
    run = jobs.run(jobs.manifest(from_factors), output=result, workers=1)
    planned = jobs.plan(jobs.manifest(from_factors), "--output", str(result))
    for code, said in ((run.code, run.stderr), (planned.returncode, planned.stderr)):
        assert code == 64
        assert (
            f"StoreMismatch: spec.factors.url: {path}/factors/0 holds 7 columns of block '', this job has 53 "
            "of block ''; take the store of an InfluenceFactors job" in " ".join(said.split())
        )
    before, after = (stored.contents(stored.open_store(store)) for store in (path, result))
    assert before.items() <= after.items()


@pytest.mark.parametrize("written", ["file://{}/", "{}/../gradients.zarr", "{folder}/link", "{folder}"])
def test_the_store_that_is_read_is_never_overwritten(
    written: str, jobs: Jobs, tmp_path: Path, gradients: Path
) -> None:
    """However its url is written, and whatever holds it."""
    store = tmp_path / "gradients.zarr"
    shutil.copytree(gradients, store)
    (tmp_path / "link").symlink_to(store)
    before = stored.contents(stored.open_store(store))
    manifest = jobs.manifest({**asking(store), "output": {"onExisting": "Overwrite"}})
    output = written.format(store, folder=tmp_path)
    run = jobs.run(manifest, output=output, workers=1)
    planned = jobs.plan(manifest, "--output", output)
    for code, said in ((run.code, run.stderr), (planned.returncode, planned.stderr)):
        assert code == 64
        assert "InvalidSpec: spec.output.url: expected another place than that of spec.gradients.url" in said
    assert stored.contents(stored.open_store(store)) == before


@pytest.mark.parametrize(
    "path", ["gradients/0/c/1/0", "train_label/c/1", "gradients/0/zarr.json", "fit/projected_layers/0"]
)
def test_a_damaged_object_is_to_be_made_again_by_the_job_that_made_it(
    path: str, jobs: Jobs, tmp_path: Path, gradients: Path
) -> None:
    store = tmp_path / "gradients.zarr"
    shutil.copytree(gradients, store)
    data = (store / path).read_bytes()
    damaged = data.replace(b"96", b"95", 1) if path.endswith("json") else bytes([data[0] ^ 1]) + data[1:]
    (store / path).write_bytes(damaged)
    run = jobs.run(jobs.manifest(asking(store)), output=tmp_path / "result.zarr", workers=1)
    assert run.code == 64
    said = " ".join(run.stderr.split())
    assert f"StoreCorrupt: spec.gradients.url: {store}/{path}: " in said
    assert "or run the job that made it again with output.onExisting: Overwrite" in said


def test_a_side_that_is_not_read_may_be_empty(
    own_task: dict[str, Any], jobs: Jobs, tmp_path: Path, gradients: Path
) -> None:
    """The other may not, and is refused by name."""
    jobs.finish(jobs.manifest(storing(test=0)), output=tmp_path / "gradients.zarr", workers=1)
    jobs.finish(
        jobs.manifest({**asking(gradients), "task": own_task}),
        output=tmp_path / "result.zarr",
        env={"NO_EXAMPLES": ""},
        workers=1,
    )
    refused = jobs.run(jobs.manifest(at_once(test=0)), output=tmp_path / "whole.zarr", workers=1)
    planned = jobs.plan(jobs.manifest(at_once(test=0)))
    for code, said in ((refused.code, refused.stderr), (planned.returncode, planned.stderr)):
        assert code == 64
        assert "InvalidData: test: expected examples, got an empty data set" in said


def test_a_store_without_gradients_is_refused(
    jobs: Jobs, tmp_path: Path, half_done: Any, undisturbed: Any, gradients: Path
) -> None:
    """Before any worker starts and by the plan, with what to do; a gradient store holds no factors either."""
    for place, words in (
        (half_done.path, "not finished; run it again first"),
        (tmp_path / "nothing.zarr", "found none"),
        (undisturbed.path, "of operation Influences, which holds no gradients"),
    ):
        run = jobs.run(jobs.manifest(asking(place)), output=tmp_path / "result.zarr")
        assert run.code == 64
        planned = jobs.plan(jobs.manifest(asking(place)))
        assert planned.returncode == 64
        for refused in (run.stderr, planned.stderr):
            assert "spec.gradients.url" in refused
            assert words in refused
    factors = {"operation": "InfluencesFromFactors", "factors": {"url": str(gradients)}}
    run = jobs.run(jobs.manifest(factors), output=tmp_path / "result.zarr")
    assert run.code == 64
    assert "spec.factors.url" in run.stderr
    assert "of operation TrainingGradients, which holds no factors" in run.stderr


def test_a_store_that_holds_other_gradients_now_does_not_finish_what_it_began(
    jobs: Jobs, tmp_path: Path
) -> None:
    """The result would be of two training sets."""
    store, path = tmp_path / "gradients.zarr", tmp_path / "result.zarr"
    jobs.finish(jobs.manifest(STORING), output=store)
    jobs.finish(jobs.manifest(asking(store)), output=path)
    again = {**STORING, "output": {"onExisting": "Overwrite"}}
    jobs.finish(jobs.manifest(again), output=store, env={"TRACED_DATA_SHIFT": "0.5"})
    run = jobs.run(jobs.manifest(asking(store)), output=path, workers=1)
    assert run.code == 64
    assert "\n  gradients: the store was made with" in run.stderr


def test_a_store_that_is_filled_anew_while_it_is_scored_is_noticed(jobs: Jobs, tmp_path: Path) -> None:
    """Also where each of its chunks is read once."""
    store, path = tmp_path / "gradients.zarr", tmp_path / "result.zarr"
    jobs.finish(jobs.manifest(STORING), output=store)
    scoring = jobs.start(
        jobs.manifest(asking(store)), output=path, barrier=Barrier("enter", "before", "Scores")
    )
    scoring.wait_for_barrier()
    again = {**STORING, "output": {"onExisting": "Overwrite"}}
    jobs.finish(jobs.manifest(again), output=store, env={"TRACED_DATA_SHIFT": "0.5"})
    scoring.open_barrier()
    assert scoring.wait().code == 64
    assert f"spec.gradients.url: the gradients in {store} changed while they were scored" in scoring.stderr
    assert "finished" not in stored.open_store(path).get_json("zarr.json")["attributes"]["influence_operator"]


def test_gradients_that_change_between_two_groups_are_refused(jobs: Jobs, tmp_path: Path) -> None:
    """Whoever changes them: the rows of the result would be of two training sets."""
    store, path = tmp_path / "gradients.zarr", tmp_path / "result.zarr"
    jobs.finish(jobs.manifest(STORING), output=store)
    two_groups = {**asking(store, test=24), "workers": {"resources": {"limits": {"memory": "4Ki"}}}}
    first = jobs.start(
        jobs.manifest(two_groups),
        output=path,
        workers=1,
        barrier=Barrier("put", "before", "^influences/c/1/"),
    )
    first.wait_for_barrier()
    plan = stored.plan_of(stored.open_store(path))
    assert plan.groups == 2
    chunk = ("region", plan.region(0, 3))
    first.wait_until(lambda: chunk in stored.held(stored.open_store(path)), "a chunk of the first group")
    first.kill()
    start, stop = plan.train_range(3)
    zarr.open_group(store)["gradients/0"][start:stop] += 1
    run = jobs.run(jobs.manifest(two_groups), output=path, workers=1)
    assert run.code == 64
    assert "StoreMismatch" in run.stderr
    assert f"spec.gradients.url: the gradients of training examples {start} to {stop - 1} in" in run.stderr
    assert "changed while they were scored" in run.stderr


def test_show_says_what_a_gradient_store_is_for(gradients: Path) -> None:
    shown = subprocess.run([INFLUENCE, "show", str(gradients)], capture_output=True, text=True, check=True)
    text = " ".join(shown.stdout.split())
    assert "TrainingGradients (Up), complete 96 training examples, 8 columns, float32" in text
    assert f"operation: InfluencesFromGradients, gradients: {{url: {gradients}}}" in text


def test_the_plan_of_each_step_tells_its_passes(jobs: Jobs, gradients: Path) -> None:
    planned = jobs.plan(jobs.manifest(STORING))
    assert planned.returncode == 0, planned.stderr
    text = " ".join(planned.stdout.split())
    assert "examples 96 training; 53 parameters" in text
    assert "2 over the training set (1 to fit, 1 to differentiate)" in text
    assert "result 96 × 8 of float32" in text
    planned = jobs.plan(jobs.manifest(asking(gradients)))
    assert planned.returncode == 0, planned.stderr
    text = " ".join(planned.stdout.split())
    assert "8 test, 96 training" in text
    assert "one pass over the stored gradients each" in text
    assert "0 over the training set" in text
