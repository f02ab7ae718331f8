"""The command line: what it asks of the job, what it prints, and the code it exits with."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from influence_job.cli.main import execute
from influence_job.cli.progress_bar import ProgressBar, describe
from influence_job.errors import InfrastructureError, PermanentError, Reason
from influence_job.progress import Progress, Regions, Stage, StageTimes
from influence_job.spec import InfluenceJob
from influence_job.storage import arrays
from influence_job.storage.claim import Claim, claim
from influence_job.storage.ledger import Ledger, Row
from influence_job.storage.store import Store
from influence_job.units import clock, in_words
from manifests import manifest

START = datetime(2026, 1, 1, tzinfo=UTC)
DONE = Progress(
    job_uid="u",
    attempt=0,
    stage=Stage.VERIFYING,
    stages=[StageTimes(name=Stage.VERIFYING, start=START, end=START + timedelta(seconds=2.5))],
    finished=True,
    result={"url": "x", "shape": [3, 7], "dtype": "float32", "bytes": 84, "digest": "d"},
)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A job file."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(manifest()))
    return str(path)


class Local:
    """Stands in for `influence_job.local`: keeps what it was asked, and ends as it is told."""

    def __init__(self) -> None:
        self.job: InfluenceJob | None = None
        self.arguments: dict[str, Any] = {}
        self.error: BaseException | None = None

    def run_local(
        self, job: InfluenceJob, *, on_progress: Callable[[Progress], None], **rest: Any
    ) -> Progress:
        self.job, self.arguments = job, rest
        on_progress(DONE)
        if self.error is not None:
            raise self.error
        return DONE


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Local:
    stand_in = Local()
    monkeypatch.setitem(sys.modules, "influence_job.local", SimpleNamespace(run_local=stand_in.run_local))
    return stand_in


def test_run_gives_the_job_with_the_options_in_place_of_its_own_values(local: Local, file: str) -> None:
    options = ["--device", "cuda", "--output", "here.zarr", "--on-existing", "overwrite", "--workers", "3"]
    ports = ["--progress-port", "8001", "--metrics-port", "8002"]
    assert execute(["run", file, *options, *ports]) == 0
    assert local.job is not None
    spec = local.job.spec
    assert (spec.device, spec.output.url, spec.output.on_existing) == ("cuda", "here.zarr", "Overwrite")
    assert local.arguments == {"workers": 3, "progress_port": 8001, "metrics_port": 8002}


def test_run_without_options_gives_the_job_as_it_is_written(local: Local, file: str) -> None:
    assert execute(["run", file]) == 0
    assert local.job == InfluenceJob.model_validate(manifest())
    assert local.arguments == {"workers": None, "progress_port": None, "metrics_port": None}


def test_run_reads_a_job_from_standard_input(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    text = yaml.safe_dump(manifest()).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    assert execute(["run", "-"]) == 0
    assert local.job is not None


def test_run_says_what_it_made_and_what_to_do_next(
    local: Local, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(["run", file, "--output", "here.zarr"])
    assert capsys.readouterr().out == (
        "done in 2.5 s: 3 × 7 float32 in here.zarr\nnext: influence show here.zarr\n"
    )


def test_run_prints_the_last_progress_document_for_scripts_also_when_it_fails(
    local: Local, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    local.error = InfrastructureError(Reason.WORKERS_LOST, "no worker for 60 s")
    assert execute(["run", file, "--json"]) == 75
    captured = capsys.readouterr()
    assert Progress.model_validate_json(captured.out) == DONE
    assert captured.err.endswith("error: WorkersLost: no worker for 60 s\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermanentError(Reason.INVALID_TASK, "spec.task: no"), 64, "error: InvalidTask: spec.task: no"),
        (InfrastructureError(Reason.TERMINATED, "stopped"), 75, "error: Terminated: stopped"),
        (KeyboardInterrupt(), 130, "interrupted; what was done is kept"),
        (RuntimeError("surprise"), 1, "error: RuntimeError: surprise\n  run it again with -v"),
    ],
)
def test_every_end_has_its_code_and_one_readable_block(
    local: Local,
    file: str,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    local.error = error
    assert execute(["run", file]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("flag", ["-v", "--verbose", "--debug"])
def test_the_traceback_is_there_for_those_who_ask(
    local: Local, file: str, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    local.error = RuntimeError("surprise")
    execute(["run", file, flag])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml"], "'absent.yaml' does not exist"),
        (["run"], "Missing argument 'FILE'"),
        (["run", "{file}", "--devic", "cpu"], "'--device'"),
        (["run", "{file}", "--device", "tpu"], "'tpu' is not one of 'cuda', 'cpu'"),
        (["run", "{file}", "--workers", "0"], "0 is not in the range 1<=x<=1000"),
        (
            ["run", "{file}", "--output", "ftp://x"],
            "job.yaml with the options given, spec.output.url: expected a",
        ),
        (["rnu"], "No such command 'rnu'"),
        (["show"], "Missing argument 'URL'"),
        (["show", "x.zarr", "--storage-options", "anon"], "expected a JSON object"),
        (["show", "x.zarr", "--storage-options", "[1]"], "expected a JSON object"),
        ([], "Commands:"),
    ],
)
def test_usage_errors_exit_with_64_and_name_the_argument(
    local: Local, file: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert execute([argument.format(file=file) for argument in arguments]) == 64
    assert message in capsys.readouterr().err
    assert local.job is None


@pytest.mark.parametrize("content", [b"spec: [", b"\xff\xfe", b""])
def test_a_file_that_is_no_job_is_named(
    local: Local, file: str, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    Path(file).write_bytes(content)
    assert execute(["run", file]) == 64
    assert f"error: InvalidSpec: {file}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "plan", "show"])
def test_help_teaches_by_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([command, "--help"]) == 0
    assert f"influence {command} " in capsys.readouterr().out.partition("Options:")[0].partition("\n")[2]


# Progress.


def progress(**changes: Any) -> Progress:
    """A job that scores: 37 of 112 regions, two per second, on four workers."""
    fields: dict[str, Any] = {
        "job_uid": "u",
        "attempt": 0,
        "stage": Stage.SCORES,
        "stages": [
            StageTimes(name=Stage.FITTING, start=START, end=START + timedelta(seconds=1.5)),
            StageTimes(name=Stage.SCORES, start=START + timedelta(seconds=1.5)),
        ],
        "regions": Regions(done=37, total=112),
        "rate": 2.0,
        "eta_seconds": 37.5,
        "workers": 4,
    }
    return Progress(**{**fields, **changes})


def drawn(*documents: Progress, terminal: bool) -> str:
    """What a progress bar writes for documents that come one after the other."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, highlight=False, color_system=None)
    with ProgressBar(stream, console) as bar:
        for document in documents:
            bar.update(document)
    return stream.getvalue()


def test_the_bar_shows_stage_counts_rate_time_left_and_workers() -> None:
    assert describe(progress()) == "37/112  2/s  ETA 38s  4 workers"
    assert describe(progress(rate=0.25, workers=1)) == "37/112  4 s each  ETA 38s  1 worker"
    text = drawn(progress(), terminal=True)
    assert "Fitting" in text
    assert "1.5 s" in text
    assert "37/112  2/s  ETA 38s  4 workers" in text


def test_regions_that_failed_and_run_again_are_told() -> None:
    document = progress(regions=Regions(done=1, total=2, failed=1), rate=None, eta_seconds=None)
    assert describe(document) == "1/2  4 workers  1 failed and tried again"


@pytest.mark.parametrize("terminal", [True, False])
def test_each_warning_is_shown_once(terminal: bool) -> None:
    document = progress(warnings=["λ is [small]"])
    assert drawn(document, document, terminal=terminal).count("warning: λ is [small]") == 1


def test_without_a_terminal_there_is_a_line_per_stage_and_no_control_characters() -> None:
    end = progress().stages[-1].model_copy(update={"end": START + timedelta(seconds=4)})
    last = progress(stages=[progress().stages[0], end], finished=True)
    assert drawn(progress(), progress(), last, last, terminal=False) == "Fitting: 1.5 s\nScores: 2.5 s\n"


def test_without_a_terminal_a_long_stage_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr("influence_job.cli.progress_bar.time.monotonic", lambda: next(now))
    text = drawn(*[progress()] * 5, terminal=False)
    assert text == "Fitting: 1.5 s\n" + "Scores: 37/112  2/s  ETA 38s  4 workers\n" * 2


def test_documents_after_the_end_are_dropped() -> None:
    """The job's threads may still tell when the terminal is given back."""
    bar = ProgressBar(io.StringIO(), Console(file=(stream := io.StringIO())))
    with bar:
        pass
    bar.update(progress())
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (245, "4m05s"), (11220, "3h07m")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1.6 * 2**20, "1.6 MiB"),
        (2**40, "1 TiB"),
        (2**60, "1.02e+03 PiB"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(count: float, text: str) -> None:
    assert in_words(count) == text


# Show.

LABELS = np.array([0, 1, 2, 3])
PREDICTED = np.array([0, 7, 2, 9])
SCORES = np.array([[3, -1, 0, 2], [-5, 4, 1, 0], [0, 0, 0, 1], [9, 8, -7, -6]], dtype=np.float32)


def make_store(
    path: Path,
    *,
    finished: bool = True,
    annotated: bool = True,
    operation: str = "Influences",
    mode: str = "Up",
    method: dict[str, Any] | None = None,
) -> None:
    """A store of 4 × 4 scores, as a job leaves it, or as it is when two of its four regions are done."""
    with Store.open(str(path)) as store:
        epoch = claim(store, Claim("uid-1", 0, "host", "Resume"))
        annotations = ["test_label", "test_predicted", "train_label", "train_confidence"]
        record = {
            "jobUid": "uid-1",
            "name": "small",
            "spec": {"method": method or {"name": "Cg", "regularization": 0.5}},
            "plan": {
                "operation": operation,
                "mode": mode,
                "test": 4,
                "train": 4,
                "testChunk": 1,
                "trainChunk": 2,
                "groupChunks": 2,
                "blocks": {"": 11},
            },
            "provenance": {"created": "2026-01-01", "versions": {"torch": "2.9", "zarr": "3.1"}},
            "annotations": annotations if annotated else [],
        }
        if finished:
            record |= {"finished": True, "result": {"dtype": "float32", "bytes": 64}}
        arrays.update_attributes(store, {arrays.OURS: record})
        ledger = Ledger(store, epoch)
        regions = range(4 if finished else 2)
        ledger.add(
            [Row("factors", i, "", "", "") for i in range(4)]
            + [Row("region", i, "", "", "") for i in regions]
        )
        ledger.flush()
        if finished:
            _write_results(store, annotated)


def _write_results(store: Store, annotated: bool) -> None:
    order = np.argsort(-SCORES, axis=1, kind="stable")
    columns = np.arange(4)[:, None]
    values = {
        "most_helpful": order,
        "most_helpful_score": SCORES[columns, order],
        "most_harmful": order[:, ::-1],
        "most_harmful_score": SCORES[columns, order[:, ::-1]],
    }
    for name, array in values.items():
        arrays.write_array(store, name, np.ascontiguousarray(array), ("test", "rank"))
    statistics = {
        "score_mean": SCORES.mean(axis=1).astype(np.float64),
        "score_std": SCORES.std(axis=1).astype(np.float64),
        "score_min": SCORES.min(axis=1).astype(np.float64),
        "score_max": SCORES.max(axis=1).astype(np.float64),
        "score_nonfinite": np.zeros(4, np.int64),
        "solver_status": np.array([0, 0, 1, 0], np.int8),
    }
    if annotated:
        statistics |= {
            "test_label": LABELS,
            "test_predicted": PREDICTED,
            "train_label": LABELS,
            "train_confidence": LABELS / 3,
        }
    for name, vector in statistics.items():
        arrays.write_array(store, name, vector, (name.split("_")[0],))


def shown(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> Any:
    """The JSON document that `show` prints."""
    capsys.readouterr()
    assert execute(["show", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_show_names_the_examples_behind_each_misread_test_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s.zarr")
    document = shown(capsys, tmp_path / "s.zarr", "--top", "2")
    assert [case["test"] for case in document["tests"]] == [1, 3]
    first = document["tests"][0]
    assert first["coordinates"] == {"label": 1, "predicted": 7}
    assert first["mostHelpful"] == [
        {"train": 1, "score": 4.0, "coordinates": {"label": 1, "confidence": 1 / 3}},
        {"train": 2, "score": 1.0, "coordinates": {"label": 2, "confidence": 2 / 3}},
    ]
    assert [ranked["train"] for ranked in first["mostHarmful"]] == [0, 3]
    assert document["solver"] == {"converged": 3, "max_iterations": 1}
    assert document["scores"] == {"mean": 0.5625, "minimum": -7.0, "maximum": 9.0, "nonfinite": 0}


def test_show_takes_the_first_three_where_nothing_tells_right_from_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s.zarr", annotated=False)
    document = shown(capsys, tmp_path / "s.zarr")
    assert [case["test"] for case in document["tests"]] == [0, 1, 2]
    assert document["tests"][0]["coordinates"] == {}


def test_show_takes_the_test_cases_asked_for_and_refuses_one_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s.zarr")
    document = shown(capsys, tmp_path / "s.zarr", "--test", "2", "--test", "0")
    assert [case["test"] for case in document["tests"]] == [2, 0]
    assert execute(["show", str(tmp_path / "s.zarr"), "--test", "4"]) == 64
    assert "expected a test example from 0 to 3, got 4" in capsys.readouterr().err


def test_show_reads_top_lists_without_the_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no `influences` in this store at all."""
    make_store(tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr" / "influences").exists()
    assert execute(["show", str(tmp_path / "s.zarr"), "--top", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "small, Influences (Up), complete" in text
    assert "4 test × 4 training examples, 11 parameters, float32, 64 B" in text
    assert "with torch 2.9, zarr 3.1; job uid-1" in text
    assert "3 converged, 1 max iterations" in text
    assert "test 1: label 1, predicted 7" in text
    assert "helps score label confidence harms score label confidence" in text
    assert "#1 +4 1 0.333 #0 -5 0 0" in text
    assert "about score / 4" in text


def test_show_cuts_no_number_off_however_narrow_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    make_store(tmp_path / "s.zarr")
    assert execute(["show", str(tmp_path / "s.zarr"), "--top", "1"]) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    assert "#1 +4 1 0.333 #0 -5 0 0" in " ".join(text.split())


def test_show_says_of_perturbations_what_their_scores_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s.zarr", mode="Perturbation")
    assert execute(["show", str(tmp_path / "s.zarr"), "--top", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "moves most score label confidence moves least score" in text
    assert "gradient by the training input" in text
    assert "helps" not in text


def test_show_of_an_unfinished_store_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s.zarr", finished=False)
    document = shown(capsys, tmp_path / "s.zarr")
    assert (document["finished"], document["tests"], document["scores"]) == (False, [], None)
    assert document["ledger"] == {"done": {"factors": 4, "region": 2}, "total": {"factors": 4, "region": 4}}
    execute(["show", str(tmp_path / "s.zarr")])
    text = capsys.readouterr().out
    assert "not finished: 2 of 4 regions" in text
    assert "go on with: influence run" in text


def test_show_of_factors_has_no_test_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "s.zarr", operation="InfluenceFactors")
    document = shown(capsys, tmp_path / "s.zarr")
    assert (document["tests"], document["scores"], document["ledger"]["total"]) == ([], None, {"factors": 4})


def test_show_of_gradients_says_what_they_are_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "s.zarr", operation="TrainingGradients")
    document = shown(capsys, tmp_path / "s.zarr")
    assert (document["tests"], document["scores"], document["ledger"]["total"]) == (
        [],
        None,
        {"gradients": 2},
    )
    execute(["show", str(tmp_path / "s.zarr")])
    text = " ".join(capsys.readouterr().out.split())
    assert "TrainingGradients (Up), complete 4 training examples, 11 columns, float32, 64 B" in text
    assert "operation: InfluencesFromGradients, gradients: {url: " in text


@pytest.mark.parametrize(
    ("method", "word"),
    [
        ({"name": "Trak", "regularization": 0.5, "rank": 11}, "columns"),
        ({"name": "Logra", "regularization": 0.5, "rank": 11}, "columns"),
        ({"name": "TracIn"}, "columns"),
        ({"name": "Arnoldi", "regularization": 0.5, "complement": False}, "columns"),
        ({"name": "Arnoldi", "regularization": 0.5}, "parameters"),
        ({"name": "GradDot"}, "parameters"),
    ],
    ids=str,
)
def test_show_calls_columns_parameters_only_where_they_are(
    method: dict[str, Any], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s.zarr", method=method)
    assert execute(["show", str(tmp_path / "s.zarr")]) == 0
    assert f"4 test × 4 training examples, 11 {word}, float32" in capsys.readouterr().out


def test_show_of_gradients_that_are_not_all_there_says_how_far_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s.zarr", operation="TrainingGradients", finished=False)
    execute(["show", str(tmp_path / "s.zarr")])
    assert "not finished: loading" in capsys.readouterr().out


def test_show_of_scores_from_gradients_counts_factors_and_regions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s.zarr", operation="InfluencesFromGradients")
    document = shown(capsys, tmp_path / "s.zarr")
    assert document["ledger"]["total"] == {"factors": 4, "region": 4}
    assert document["tests"]


def test_show_of_a_store_that_is_only_claimed_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store.open(str(tmp_path / "s.zarr")) as store:
        claim(store, Claim("uid-1", 0, "host", "Resume"))
    assert execute(["show", str(tmp_path / "s.zarr")]) == 0
    assert "claimed by a job that has computed nothing yet" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_show_of_what_no_job_wrote_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content:
        (tmp_path / "s.zarr").mkdir()
        (tmp_path / "s.zarr" / content).write_text("mine")
    assert execute(["show", str(tmp_path / "s.zarr")]) == 64
    assert "error: StoreExists" in capsys.readouterr().err


def test_show_answers_without_torch_and_dask(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    code = (
        "import sys\n"
        "from influence_job.cli.main import execute\n"
        f"assert execute(['show', {str(tmp_path / 's.zarr')!r}, '--json']) == 0\n"
        "print(sorted({'torch', 'distributed'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
