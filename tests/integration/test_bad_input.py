"""Bad input ends with a documented code and a sentence that names place and cure; nothing is damaged."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import broken_task
import stored
from jobs import Barrier, Jobs, Run

TASK = {"task": {"entrypoint": "broken_task:faulty"}}


def entry(name: str, **arguments: Any) -> dict[str, Any]:
    """Changes that name another entry point of `broken_task`."""
    return {"task": {"entrypoint": f"broken_task:{name}", "arguments": arguments}}


IN_THE_FILE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a typo": ({"method": {"regularisation": 0.1}}, ("regularisation", "regularization", "line ")),
    "a chunk size of 0": ({"chunks": {"train": 0}}, ("spec.chunks.train", "greater than or equal to 1", "0")),
    "an unknown method": ({"method": {"name": "Ekfak"}}, ("spec.method", "Ekfak", "Ekfac")),
    "a missing λ": ({"method": {"regularization": None}}, ("spec.method", "regularization")),
    "a negative λ": ({"method": {"regularization": -1.0}}, ("spec.method", "regularization", "-1")),
    "a malformed entry point": (
        {"task": {"entrypoint": "traced_task.task"}},
        ("spec.task.entrypoint", "traced_task.task"),
    ),
    "a scheme nobody knows": (
        {"output": {"url": "ftp://host/x"}},
        ("spec.output.url", "ftp://host/x", "gs://"),
    ),
    "a scheme without a bucket": (
        {"output": {"url": "s3:///digits.zarr"}},
        ("line ", "spec.output.url: expected a bucket after s3://", "s3:///digits.zarr"),
    ),
    "a scheme with one slash": (
        {"output": {"url": "gs:/bucket/digits.zarr"}},
        ("spec.output.url: expected a path or a url that starts with gs://", "gs:/bucket/digits.zarr"),
    ),
    "a place that each process has for itself": (
        {"output": {"url": "memory://digits.zarr"}},
        ("spec.output.url", "memory://digits.zarr', which each process has for itself"),
    ),
    "factors without their store": (
        {"operation": "InfluencesFromFactors"},
        ("spec.factors", "InfluenceFactors"),
    ),
}
"""Name -> changes to the spec and what the message must say."""


@pytest.mark.parametrize("name", IN_THE_FILE)
def test_a_mistake_in_the_file_is_named_before_anything_starts(name: str, jobs: Jobs, tmp_path: Path) -> None:
    """With its field, and nothing is made at the output."""
    changes, words = IN_THE_FILE[name]
    run = jobs.run(jobs.manifest(changes), timeout=20, installed=name == "a typo")
    _assert_refused(run, "InvalidSpec", words)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("field", ["output", "factors"])
def test_a_home_of_nobody_is_refused_by_a_plan_and_a_run(field: str, jobs: Jobs) -> None:
    """By its field, and neither calls the task."""
    changes = {"operation": "InfluencesFromFactors", "factors": {"url": "factors.zarr"}}
    manifest = jobs.manifest({**changes, **entry("raises"), field: {"url": "~nosuchuser/x.zarr"}})
    run, planned = jobs.run(manifest, timeout=20), jobs.plan(manifest)
    for code, said in ((run.code, run.stderr), (planned.returncode, planned.stderr)):
        assert code == 64, said
        assert f"error: InvalidSpec: spec.{field}.url: expected a path below a home" in said
        assert "'~nosuchuser/x.zarr'" in said


def test_a_file_that_is_no_yaml_is_refused_with_the_line(jobs: Jobs) -> None:
    """The parser's place is kept."""
    manifest = jobs.manifest()
    manifest.write_text(manifest.read_text() + "\n  spec: [unclosed\n")
    _assert_refused(jobs.run(manifest, timeout=20), "InvalidSpec", ("line",))


IN_THE_TASK: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "an unknown module": (
        {"task": {"entrypoint": "no_such_module:task"}},
        "InvalidTask",
        ("spec.task.entrypoint", "no_such_module", "PYTHONPATH"),
    ),
    "an unknown function": (
        entry("tsak"),
        "InvalidTask",
        ("spec.task.entrypoint", "tsak", "has_short_labels"),
    ),
    "an entry point that returns a model": (
        entry("returns_a_model"),
        "InvalidTask",
        ("spec.task.entrypoint", "InfluenceTask", "Sequential"),
    ),
    "an entry point that raises": (
        entry("raises"),
        "InvalidTask",
        ("spec.task.entrypoint", "broken_task:raises", "FileNotFoundError", "/models/last.pt"),
    ),
    "arguments it does not take": (
        entry("takes_a_path", folder="x"),
        "InvalidTask",
        ("spec.task.arguments", "path", "folder"),
    ),
    "data that can only be iterated over": (
        entry("returns_a_loader"),
        "InvalidTask",
        ("train", "iterated over", "read(start, stop)"),
    ),
    "an iterable data set in an adapter": (
        entry("adapts_an_iterable_dataset"),
        "InvalidTask",
        ("TorchDatasetSource", "Stream", "read(start, stop)"),
    ),
    "labels of the wrong length": (
        entry("has_short_labels"),
        "InvalidTask",
        ("640", "639", "one label for every example"),
    ),
    "no examples": (entry("has_no_examples"), "InvalidData", ("test", "empty")),
    "dropout left on": (
        entry("leaves_dropout_on"),
        "UnsupportedModel",
        ("dropout is on in 1", "model.eval()"),
    ),
    "batch norm left on": (
        entry("leaves_batch_norm_on"),
        "UnsupportedModel",
        ("1: ", "statistics of the batch", "model.eval()"),
    ),
    "a selection of no parameter": (
        entry("selects_nothing"),
        "InvalidTask",
        ("InfluenceTask.parameters", "lora_", "0.weight"),
    ),
    "inputs of another width": (
        entry("has_the_wrong_inputs"),
        "InvalidData",
        ("train example 0", "1x5 and 6x5", "entry point"),
    ),
    "a layer that EK-FAC cannot treat": (
        entry("has_a_layer_norm"),
        "UnsupportedModel",
        ("1.weight (LayerNorm)", "unsupported='diagonal' or 'exclude'"),
    ),
    "token ids that are to be perturbed": (
        {**entry("takes_token_ids"), "mode": "Perturbation"},
        "InvalidTask",
        ("spec.mode", "[0]: int64", "embeddings"),
    ),
    "an example that cannot be read": (
        entry("cannot_be_read"),
        "InvalidData",
        ("train example 0", "OSError", "no such share"),
    ),
    "data that leaves when it is read": (
        entry("leaves_when_read"),
        "InvalidData",
        ("train example 0: reading raised SystemExit: 0",),
    ),
    "annotations of the wrong length": (
        entry("annotates_too_little"),
        "InvalidTask",
        ("InfluenceTask.annotate", "label", "(4,)", "(1,)"),
    ),
}
"""Name -> changes to the spec, reason, and what the message must say."""
AS_INSTALLED = "an entry point that raises"
"""The one that the installed commands meet, too."""


@pytest.mark.parametrize("name", IN_THE_TASK)
def test_a_mistake_in_the_task_is_found_before_the_old_result_is_deleted(
    name: str, jobs: Jobs, half_done: Any
) -> None:
    """Although the job was to overwrite it."""
    changes, reason, words = IN_THE_TASK[name]
    before = _without_claims(half_done.path)
    manifest = jobs.manifest({**changes, "output": {"onExisting": "Overwrite"}})
    run = jobs.run(manifest, output=half_done.path, workers=1, installed=name == AS_INSTALLED)
    _assert_refused(run, reason, words)
    assert stored.differing(_without_claims(half_done.path), before) == []


@pytest.mark.parametrize("name", IN_THE_TASK)
def test_a_plan_refuses_the_same_mistake_and_makes_nothing(name: str, jobs: Jobs, tmp_path: Path) -> None:
    """Nobody asks a cluster for GPUs to learn that."""
    changes, reason, words = IN_THE_TASK[name]
    manifest = jobs.manifest(changes)
    before = sorted(tmp_path.rglob("*"))
    planned = jobs.plan(manifest, installed=name == AS_INSTALLED)
    assert planned.returncode == 64, planned.stderr
    assert "Traceback" not in planned.stderr
    for word in (f"error: {reason}", *words):
        assert word in planned.stderr, f"expected {word!r} in\n{planned.stderr}"
    assert sorted(tmp_path.rglob("*")) == before


FAULTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "raises": ("InvalidData", ("train example 333", "OSError", "image 0333.png is truncated")),
    "nan": ("NotFinite", ("train example 333", "not finite", "NaN")),
    "class": ("InvalidData", ("train example 333", "IndexError", "Target 7 is out of bounds")),
    "short": ("InvalidData", ("train", "first dimension")),
}
"""What is wrong with one example -> reason, and what the message must say."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_example_is_named_and_once_it_is_mended_the_job_resumes(
    fault: str, jobs: Jobs, tmp_path: Path, undisturbed: Any
) -> None:
    """What was computed from it never counts: the rerun ends with the bits of a job that never saw it."""
    reason, words = FAULTS[fault]
    path, manifest = tmp_path / "result.zarr", jobs.manifest(TASK)
    run = jobs.run(manifest, output=path, env={"FAULT": fault}, installed=fault == "raises")
    _assert_refused(run, reason, words)
    jobs.finish(manifest, output=path)
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []


def test_data_that_is_away_for_seconds_ends_no_job(jobs: Jobs, tmp_path: Path, undisturbed: Any) -> None:
    """What raises is tried again when the share may be back, not three times at once."""
    path, manifest = tmp_path / "result.zarr", jobs.manifest(TASK)
    jobs.finish(manifest, output=path, env={"FAULT": f"away {tmp_path / 'since'}"})
    assert (tmp_path / "since").exists()
    assert stored.differing(stored.result(stored.open_store(path)), undisturbed.result) == []


@pytest.mark.parametrize("method", ["Direct", "Cg"])
def test_nan_in_a_gradient_is_named_whatever_the_method(method: str, jobs: Jobs, tmp_path: Path) -> None:
    """One such example would make every score of these methods NaN."""
    changes = {
        **TASK,
        "method": {"name": method, "regularization": 0.05, "secondOrder": "GeneralizedGaussNewton"},
    }
    run = jobs.run(jobs.manifest(changes), output=tmp_path / "result.zarr", workers=1, env={"FAULT": "nan"})
    _assert_refused(run, *FAULTS["nan"])


def test_nan_in_a_test_example_is_named(jobs: Jobs, tmp_path: Path) -> None:
    """With its index on the test side."""
    run = jobs.run(jobs.manifest(TASK), output=tmp_path / "result.zarr", workers=1, env={"FAULT": "nan-test"})
    _assert_refused(run, "NotFinite", ("test example 23", "not finite", "NaN"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_data_set_that_answers_differently_the_second_time_is_refused(
    workers: int, jobs: Jobs, tmp_path: Path
) -> None:
    """In one process or in two: the range is named."""
    run = jobs.run(
        jobs.manifest(TASK), output=tmp_path / "result.zarr", workers=workers, env={"FAULT": "differs"}
    )
    _assert_refused(run, "InvalidData", ("train examples", "dataset not deterministic or changed"))
    start, stop = _named_range(run.stderr)
    assert start <= broken_task.FAULTY_EXAMPLE <= stop


SHARED = {"name": "Cg", "regularization": 0.05, "products": "Distributed", "rtol": 1e-2}
CHANGED_AFTER: dict[str, tuple[Barrier, str, dict[str, Any]]] = {
    "half of a pass": (Barrier("read", "before", "", 8), "factors", {}),
    "an iteration of a solve": (
        Barrier("put", "before", "^fit/solve/0/2/partial/"),
        "factors",
        {"method": {**SHARED, "secondOrder": "GeneralizedGaussNewton"}},
    ),
    "the fit": (Barrier("enter", "before", "Scores"), "merge", {}),
}
"""When the first run is killed -> rows that the second one must not get to, and changes to the job."""


@pytest.mark.parametrize("when", CHANGED_AFTER)
def test_data_that_changed_since_an_earlier_run_is_refused(when: str, jobs: Jobs, tmp_path: Path) -> None:
    """In an example that is none of those by which the data is known; no curvature of one data set and no
    score of another come together.
    """
    barrier, never, changes = CHANGED_AFTER[when]
    path, manifest = tmp_path / "result.zarr", jobs.manifest({**TASK, **changes})
    first = jobs.start(manifest, output=path, barrier=barrier)
    first.wait_for_barrier()
    first.kill()
    run = jobs.run(manifest, output=path, env={"FAULT": "changed"})
    _assert_refused(run, "InvalidData", ("train examples", "dataset not deterministic or changed"))
    start, stop = _named_range(run.stderr)
    assert start <= broken_task.FAULTY_EXAMPLE <= stop
    assert not [kind for kind, _ in stored.held(stored.open_store(path)) if kind == never]


def test_a_loss_without_a_finite_gradient_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    """Before the fit, when every example has it."""
    run = jobs.run(jobs.manifest(entry("logs_a_probability")), output=tmp_path / "result.zarr", workers=1)
    _assert_refused(run, "NotFinite", ("train example 0", "loss"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused_and_computes_nothing(
    jobs: Jobs, tmp_path: Path, half_done: Any
) -> None:
    """It never falls back to the processor in silence; what it was to overwrite is still there."""
    path, before = tmp_path / "result.zarr", _without_claims(half_done.path)
    options = ("--device", "cuda", "--on-existing", "Overwrite")
    for output in (path, half_done.path):
        run = jobs.run(jobs.manifest(), *options, output=output, workers=1)
        _assert_refused(run, "GpuNotVisible", ("spec.device", "nvidia.com/gpu", "device: cpu"))
    assert not stored.held(stored.open_store(path))
    assert stored.differing(_without_claims(half_done.path), before) == []


def test_an_output_below_a_file_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    """A folder that cannot be made is as bad as one without permission."""
    (tmp_path / "file").write_text("content")
    run = jobs.run(jobs.manifest(), output=tmp_path / "file" / "result.zarr", workers=1)
    _assert_refused(run, "StoreExists", (str(tmp_path / "file" / "result.zarr"), "output.url"))
    assert (tmp_path / "file").read_text() == "content"


WITHOUT_PRIVILEGES = (
    ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
)
"""Root may write anywhere, unless the capability is taken from it."""


@pytest.mark.parametrize("there", ["nothing", "a store"])
def test_an_output_without_permission_is_refused_and_left_alone(
    there: str, jobs: Jobs, tmp_path: Path, half_done: Any
) -> None:
    """In Preflight, before a worker starts; with the permission back, the job goes on."""
    folder = half_done.path if there == "a store" else tmp_path / "read-only"
    folder.mkdir(exist_ok=True)
    path = folder if there == "a store" else folder / "result.zarr"
    manifest, before = jobs.manifest(), sorted(folder.rglob("*"))
    places = [folder, *(place for place in before if place.is_dir())]
    for place in places:
        place.chmod(0o555)
    try:
        run = jobs.run(manifest, output=path, workers=1, prefix=WITHOUT_PRIVILEGES, timeout=60)
        _assert_refused(run, "StoreUnreachable", (str(path), "Permission denied", "grant this identity"))
        assert sorted(folder.rglob("*")) == before
    finally:
        for place in places:
            place.chmod(0o755)
    jobs.finish(manifest, output=path)


def test_a_result_above_max_bytes_is_refused_with_its_size(jobs: Jobs, half_done: Any) -> None:
    """And the store that it was to overwrite is still there."""
    before = _without_claims(half_done.path)
    manifest = jobs.manifest({"output": {"maxBytes": "10Ki", "onExisting": "Overwrite"}})
    run = jobs.run(manifest, output=half_done.path, workers=1)
    _assert_refused(
        run, "PlanImpossible", ("spec.output.maxBytes", "10Ki", str(24 * 640 * 4), "dense: false")
    )
    assert stored.differing(_without_claims(half_done.path), before) == []


def test_a_damaged_ledger_segment_is_named(jobs: Jobs, half_done: Any) -> None:
    """What is done is never guessed."""
    store = stored.open_store(half_done.path)
    segment = next(
        path for path in store.list("ledger/") if not path.startswith(("ledger/epoch", "ledger/zarr"))
    )
    data = bytearray(store.get(segment) or b"")
    data[len(data) // 2] ^= 4
    store.put(segment, bytes(data))
    run = jobs.run(jobs.manifest(), output=half_done.path, workers=1)
    _assert_refused(run, "StoreCorrupt", (segment, "delete it"))


def test_a_damaged_fit_is_named(jobs: Jobs, half_done: Any) -> None:
    """A fit that lost a byte would give wrong scores everywhere."""
    fits = [file for file in half_done.path.glob("fit/*/*") if file.is_file() and file.name.isdigit()]
    assert fits
    for fit in fits:
        data = bytearray(fit.read_bytes())
        data[len(data) // 2] ^= 4
        fit.write_bytes(data)
    run = jobs.run(jobs.manifest(), output=half_done.path, workers=1)
    _assert_refused(run, "StoreCorrupt", ("fit/",))


def test_more_output_is_shown_only_when_asked_for(jobs: Jobs, tmp_path: Path) -> None:
    """`-v` shows where a user's code raised."""
    run = jobs.run(jobs.manifest(entry("raises")), "-v", output=tmp_path / "result.zarr", workers=1)
    assert run.code == 64
    assert "Traceback" in run.stderr
    assert "broken_task.py" in run.stderr


def _assert_refused(run: Run, reason: str, words: tuple[str, ...]) -> None:
    assert run.code == 64, f"exit code {run.code}:\n{run.stderr}"
    assert "Traceback" not in run.stderr, run.stderr
    for word in (f"error: {reason}", *words):
        assert word in run.stderr, f"expected {word!r} in\n{run.stderr}"


def _without_claims(path: Path) -> dict[str, bytes]:
    found = stored.contents(stored.open_store(path))
    return {name: data for name, data in found.items() if not name.startswith("ledger/epoch-")}


def _named_range(text: str) -> tuple[int, int]:
    found = re.search(r"train examples (\d+) to (\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def test_nan_in_a_gradient_is_named_where_nothing_is_fitted(jobs: Jobs, tmp_path: Path) -> None:
    """No fit sees the example first: its column of scores would be NaN."""
    manifest = jobs.manifest({**TASK, "method": {"name": "GradDot", "regularization": None}})
    run = jobs.run(manifest, output=tmp_path / "result.zarr", workers=1, env={"FAULT": "nan"})
    _assert_refused(run, *FAULTS["nan"])
