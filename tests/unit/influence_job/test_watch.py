"""What `influence watch` draws of a job, and when it takes the job for ended."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest

from influence_job.cli.job_view import JobView, ended, read_status
from influence_job.cli.main import execute
from job_samples import VALID

RUNNING: dict[str, Any] = {
    "observedGeneration": 1,
    "phase": "Running",
    "stage": "Scores",
    "stages": [
        {"name": "Fitting", "start": "2026-01-01T00:00:00Z", "end": "2026-01-01T00:00:02Z"},
        {"name": "Scores", "start": "2026-01-01T00:00:02Z"},
    ],
    "progress": {"done": 37, "total": 112, "rate": 2.0, "etaSeconds": 39},
    "workers": {"desired": 4, "ready": 4},
    "attempts": {"current": 1},
}


def job(generation: int = 1, **status: Any) -> dict[str, Any]:
    metadata = {"name": "digits", "uid": "u", "generation": generation}
    return {**VALID["shortest"], "metadata": metadata, "status": {"observedGeneration": 1, **status}}


def condition(kind: str, status: str, reason: str, message: str) -> dict[str, str]:
    times = {"lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {"type": kind, "status": status, "reason": reason, "message": message, **times}


def drawn(*states: dict[str, Any], stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    with JobView(stream) as view:
        for state in states:
            view.show(state)
    return stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_is_printed_when_the_phase_or_its_cause_changes() -> None:
    waiting = condition("ClusterReady", "False", "Unschedulable", "0/3 nodes have a GPU")
    lines = drawn(
        job(observedGeneration=-1),
        job(phase="Pending"),
        job(phase="Starting", conditions=[waiting]),
        job(phase="Starting", conditions=[waiting], activeSeconds=3),
        job(phase="Running"),
    ).splitlines()
    assert lines == [
        "digits: not yet seen by the operator",
        "digits: Pending",
        "digits: Starting  Unschedulable: 0/3 nodes have a GPU",
        "digits: Running",
    ]


def test_without_a_terminal_a_stage_is_a_line_when_it_has_ended() -> None:
    assert drawn(job(**RUNNING)).splitlines() == ["digits: Running", "Fitting: 2.0 s"]


def test_on_a_terminal_the_present_stage_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    text = drawn(job(**RUNNING), stream=Terminal())
    assert "━" in text
    assert "37/112  2/s  ETA 39s  4 workers" in text


def test_the_stages_of_another_attempt_are_drawn_below_those_of_the_last() -> None:
    again = {**RUNNING, "attempts": {"current": 2}, "stages": RUNNING["stages"][:1]}
    retrying = {**RUNNING, "phase": "Retrying"}
    assert drawn(job(**RUNNING), job(**retrying), job(**again)).splitlines() == [
        "digits: Running",
        "Fitting: 2.0 s",
        "digits: Retrying",
        "digits: Running",
        "Fitting: 2.0 s",
    ]


def test_words_of_a_pod_cannot_move_the_cursor() -> None:
    hostile = condition("ClusterReady", "False", "Failing", "\x1b[2J\x1b[1;1H\rowned\x9b31m")
    warned = {**RUNNING, "warnings": ["\x1b]0;owned\x07"], "conditions": [hostile]}
    failed = job(phase="Failed", conditions=[condition("Failed", "True", "InvalidTask", "\x1b[2Jboom")])
    outcome = ended(failed, read_status(failed), deleted=False)
    assert outcome is not None
    for text in (drawn(job(**warned)), outcome.text):
        assert not [character for character in text if not character.isprintable() and character != "\n"]


def test_complete_ends_with_0_and_says_how_to_look_at_the_result() -> None:
    result = {"url": "gs://bucket/x.zarr", "shape": [300, 1400], "dtype": "float32"}
    state = job(conditions=[condition("Complete", "True", "Complete", "done")], result=result)
    outcome = ended(state, read_status(state), deleted=False)
    assert outcome is not None
    assert outcome.code == 0
    assert outcome.text == (
        "complete: 300 × 1400 float32 in gs://bucket/x.zarr\nnext: influence show gs://bucket/x.zarr"
    )


def test_failed_ends_with_64_and_the_reason() -> None:
    state = job(conditions=[condition("Failed", "True", "InvalidTask", "ValueError: no")])
    outcome = ended(state, read_status(state), deleted=False)
    assert outcome is not None
    assert (outcome.code, outcome.text) == (64, "failed: InvalidTask: ValueError: no")


def test_deleted_ends_with_64_and_says_where_the_result_stays() -> None:
    outcome = ended(job(), read_status(job()), deleted=True)
    assert outcome is not None
    assert outcome.code == 64
    assert "gs://bucket/digits.zarr" in outcome.text


@pytest.mark.parametrize(
    "state",
    [
        job(),
        job(conditions=[condition("Complete", "False", "Running", "not yet")]),
        job(2, conditions=[condition("Failed", "True", "InvalidTask", "before the image was changed")]),
    ],
    ids=["no condition", "false", "of an older generation"],
)
def test_what_may_still_move_has_not_ended(state: dict[str, Any]) -> None:
    assert ended(state, read_status(state), deleted=False) is None


def test_what_a_later_operator_writes_is_passed_over() -> None:
    status = read_status(job(phase="Hibernating", stage="Folding", workers={"ready": 3}, more=1))
    assert (status.phase, status.stage, status.workers and status.workers.ready) == (None, None, 3)


def test_the_package_that_is_missing_is_named() -> None:
    script = (
        "import sys; sys.modules['kubernetes'] = None\n"
        "from influence_job.cli.main import execute\n"
        "sys.exit(execute(['watch', 'digits']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "pip install 'influence-operator[operator]'" in done.stderr


def test_a_kubeconfig_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert execute(["watch", "digits", "--kubeconfig", str(tmp_path / "none")]) == 64
    assert "no cluster to look at" in capsys.readouterr().err
