"""What a job does with a store that is there: resume, overwrite, refuse, or give way to another driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stored
import traced_task
from jobs import Barrier, Jobs, Run, times_written

OTHER_INPUTS: dict[str, tuple[dict[str, Any], dict[str, str], tuple[str, ...]]] = {
    "another λ": ({"method": {"regularization": 0.1}}, {}, ("method.regularization", "0.05", "0.1")),
    "another method": (
        {"method": {"name": "Direct", "regularization": 0.05}},
        {},
        ("method.name", "Ekfac", "Direct"),
    ),
    "another grid": ({"chunks": {"train": 16}}, {}, ("chunks.train", "32", "16")),
    "another argument": ({"task": {"arguments": {"hidden": 6}}}, {}, ("task.arguments.hidden", "6")),
    "an argument whose word is that of none": (
        {"task": {"arguments": {"hidden": "nothing"}}},
        {},
        ('task.arguments.hidden: the store was made with nothing, this job says "nothing"',),
    ),
    "a larger top k": (
        {"output": {"topK": 101}},
        {},
        ("output.topK: the store was made with 100, this job says 101",),
    ),
    "another model": ({}, {"TRACED_MODEL_SCALE": "0.51"}, ("model: ",)),
    "other data": ({}, {"TRACED_DATA_SHIFT": "0.01"}, ("data.train.examples", "data.test.examples")),
    "more data": ({"task": {"arguments": {"train": 641}}}, {}, ("task.arguments.train", "641")),
}
"""Name -> changes to the spec, to the environment, and what the refusal must say."""


@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_resuming_with_other_inputs_is_refused_naming_the_difference(
    name: str, jobs: Jobs, half_done: Any
) -> None:
    """Scores of two models never mix in one matrix, and the store stays as it was."""
    changes, env, words = OTHER_INPUTS[name]
    before = _without_claims(half_done.path)
    run = jobs.run(jobs.manifest(changes), output=half_done.path, env=env, workers=1)
    assert run.code == 64
    assert "StoreMismatch" in run.stderr
    for word in (*words, "output.onExisting: Overwrite"):
        assert word in run.stderr, run.stderr
    assert "Traceback" not in run.stderr
    assert stored.differing(_without_claims(half_done.path), before) == []


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_store_without_the_matrix_is_not_resumed_by_a_job_that_asks_for_it(
    is_finished: bool, jobs: Jobs, tmp_path: Path
) -> None:
    """It would end well, without `influences`; the job that began goes on, whenever it was killed."""
    path, manifest = tmp_path / "result.zarr", jobs.manifest({"output": {"dense": False, "topK": 5}})
    begun = jobs.start(manifest, output=path, barrier=Barrier("enter", "before", "Scores"))
    begun.wait_for_barrier()
    begun.kill()
    if is_finished:
        jobs.finish(manifest, output=path)
    before = _without_claims(path)
    refused = jobs.run(jobs.manifest({"output": {"topK": 5}}), output=path)
    assert refused.code == 64
    assert "error: StoreMismatch" in refused.stderr
    assert "output.dense: the store was made with false, this job says true" in refused.stderr
    assert stored.differing(_without_claims(path), before) == []
    jobs.finish(manifest, output=path)


def test_a_job_that_needs_no_matrix_resumes_a_store_that_has_one(
    half_done: Any, resume: Callable[..., Run]
) -> None:
    """The store ends with all that its first job asked for."""
    resume(half_done.path, changes={"output": {"dense": False}})


def test_resuming_with_edited_code_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    """The module of the entry point determines the numbers as much as the spec does."""
    module, path = tmp_path / "own_task.py", tmp_path / "result.zarr"
    source = Path(traced_task.__file__).read_text()
    module.write_text(source)
    manifest = jobs.manifest({"task": {"entrypoint": "own_task:task"}})
    run = jobs.start(manifest, output=path, barrier=Barrier("enter", "before", "Factors"))
    run.wait_for_barrier()
    run.kill()
    module.write_text(source + "\n# edited\n")
    refused = jobs.run(manifest, output=path)
    assert refused.code == 64
    assert "task.source" in refused.stderr


def test_a_second_driver_takes_the_store_over_and_the_first_stops(
    jobs: Jobs, tmp_path: Path, undisturbed: Any
) -> None:
    """One writer: the older driver finds the newer claim before its next flush."""
    path = tmp_path / "result.zarr"
    flushing = Barrier("flush", "before", "region", 2)
    first = jobs.start(jobs.manifest(), output=path, pace=0.3, barrier=flushing)
    first.wait_for_barrier()
    held = stored.held(stored.open_store(path))
    assert "region" in {kind for kind, _ in held}
    second = jobs.start(jobs.manifest(), output=path, barrier=Barrier("put", "before", "^influences/c/"))
    second.wait_for_barrier()
    first.open_barrier()
    assert first.wait().code == 64, first.stderr
    assert "StoreClaimed" in first.stderr
    assert "Traceback" not in first.stderr
    second.open_barrier()
    assert second.wait().code == 0, second.stderr
    store = stored.open_store(path)
    done = stored.held_objects(store, held)
    assert not [name for name in times_written(second, path) if done.fullmatch(name)]
    assert stored.differing(stored.result(store), undisturbed.result) == []


def test_two_drivers_that_start_at_once_leave_one_right_result(
    jobs: Jobs, tmp_path: Path, undisturbed: Any
) -> None:
    """Whoever claims last finishes; the other stops or, when it was done before, has finished too."""
    path = tmp_path / "result.zarr"
    runs = [jobs.start(jobs.manifest(), output=path, workers=1) for _ in range(2)]
    codes = sorted(run.wait().code or 0 for run in runs)
    assert codes in ([0, 0], [0, 64]), [run.stderr for run in runs]
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []


def test_on_existing_fail_leaves_a_store_alone(jobs: Jobs, half_done: Any) -> None:
    """`onExisting: Fail` refuses before anything is claimed."""
    before = stored.contents(stored.open_store(half_done.path))
    run = jobs.run(jobs.manifest({"output": {"onExisting": "Fail"}}), output=half_done.path)
    assert run.code == 64
    assert "StoreExists" in run.stderr
    assert stored.contents(stored.open_store(half_done.path)) == before


def test_on_existing_fail_writes_to_an_empty_place(jobs: Jobs, tmp_path: Path, undisturbed: Any) -> None:
    """And a rerun of that run is a new job, so it is refused."""
    path = tmp_path / "result.zarr"
    manifest = jobs.manifest({"output": {"onExisting": "Fail"}})
    jobs.finish(manifest, output=path)
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []
    assert jobs.run(manifest, output=path).code == 64


def test_overwrite_replaces_a_store_of_other_inputs_as_a_whole(
    jobs: Jobs, tmp_path: Path, undisturbed: Any
) -> None:
    """Nothing of the old store is left, although its grid had more objects."""
    path = tmp_path / "result.zarr"
    other = jobs.manifest({"task": {"arguments": {"hidden": 7}}, "chunks": {"train": 16}})
    run = jobs.start(other, output=path, barrier=Barrier("enter", "before", "Verifying"))
    run.wait_for_barrier()
    run.kill()
    jobs.finish(jobs.manifest({"output": {"onExisting": "Overwrite"}}), output=path)
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []


def test_an_overwrite_that_fails_before_it_computes_leaves_the_result(jobs: Jobs, tmp_path: Path) -> None:
    """A misspelt argument must not cost what took days; nor does the next job delete it."""
    path, manifest = tmp_path / "result.zarr", jobs.manifest()
    jobs.finish(manifest, output=path)
    before = _without_claims(path)
    changes = {"output": {"onExisting": "Overwrite"}, "task": {"arguments": {"misspelt": 1}}}
    refused = jobs.run(jobs.manifest(changes), output=path)
    assert refused.code == 64, refused.stderr
    assert "misspelt" in refused.stderr
    assert stored.differing(_without_claims(path), before) == []
    again = jobs.finish(manifest, output=path)
    assert not [name for name in times_written(again, path) if name.startswith("influences/")]
    assert stored.differing(_without_claims(path), before) == ["fit/model.json"]  # whose it is now


@pytest.mark.parametrize("on_existing", ["Resume", "Overwrite", "Fail"])
def test_a_folder_that_is_no_store_of_ours_is_left_alone(
    on_existing: str, jobs: Jobs, tmp_path: Path
) -> None:
    """Not even Overwrite deletes what no job wrote."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    run = jobs.run(jobs.manifest({"output": {"onExisting": on_existing}}), output=folder)
    assert run.code == 64
    assert "StoreExists" in run.stderr
    assert "thesis.tex" in run.stderr
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]


def test_a_store_that_was_moved_resumes_where_it_is_now(
    jobs: Jobs, half_done: Any, tmp_path: Path, resume: Callable[..., Run]
) -> None:
    """Nothing in a store depends on where it lies."""
    moved = tmp_path / "elsewhere" / "moved.zarr"
    moved.parent.mkdir()
    shutil.move(half_done.path, moved)
    resume(moved)


def _without_claims(path: Path) -> dict[str, bytes]:
    found = stored.contents(stored.open_store(path))
    return {name: data for name, data in found.items() if not name.startswith("ledger/epoch-")}
