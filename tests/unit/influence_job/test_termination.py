"""The last words of a driver: always valid JSON, never longer than the kubelet keeps."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence_job.document import TERMINATION_BYTES
from influence_job.driver.reporting import ProgressTracker
from influence_job.errors import PermanentError, Reason
from influence_job.identity import JobIdentity
from influence_job.progress import (
    MESSAGE_CHARACTERS,
    Problem,
    Progress,
    Regions,
    SolverCounts,
    Stage,
    StageTimes,
    bounded,
)
from influence_job.termination import leave, shortened

START = datetime(2026, 1, 1, tzinfo=UTC)
ANY_CHARACTER = st.characters() | st.sampled_from('\x00\x1f"\\\ud800€𝄞')
TEXT = st.text(ANY_CHARACTER, max_size=40) | st.builds(
    lambda text, times: text * times, st.text(ANY_CHARACTER, min_size=1, max_size=9), st.integers(1, 600)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=10,
)


@st.composite
def documents(draw: st.DrawFn) -> Progress:
    """What a tracker can hold, with the texts of users and of libraries."""
    tracker = ProgressTracker(JobIdentity("u" * draw(st.integers(0, 64)), draw(st.integers(0, 9**9))), ignore)
    for stage in draw(st.lists(st.sampled_from(list(Stage)), max_size=16)):
        tracker.enter(stage)
    for warning in draw(st.lists(TEXT, max_size=25)):
        tracker.warn(warning)
    tracker.update(
        rate=draw(st.none() | st.floats()),
        solver=draw(st.none() | st.builds(SolverCounts, converged=st.integers(0, 2**60))),
        regions=Regions(done=draw(st.integers(0, 2**60)), total=2**60),
    )
    tracker.fail(PermanentError(draw(st.sampled_from(Reason)), draw(TEXT)))
    if draw(st.booleans()):
        tracker.finish(draw(st.dictionaries(TEXT, JSON, max_size=6)))
    return tracker.snapshot()


def ignore(_: Progress) -> None:
    """Nobody looks."""


@given(documents())
def test_any_document_becomes_a_short_one_of_the_same_job_and_end(progress: Progress) -> None:
    words = shortened(progress, TERMINATION_BYTES)
    assert len(words) <= TERMINATION_BYTES
    json.loads(words.decode("utf-8"))
    read = Progress.model_validate_json(words)
    assert (read.job_uid, read.attempt, read.finished) == (
        progress.job_uid,
        progress.attempt,
        progress.finished,
    )
    assert read.last_error is not None
    assert progress.last_error is not None
    assert read.last_error.reason == progress.last_error.reason


@given(TEXT, st.integers(32, 3000))
def test_a_bounded_text_keeps_beginning_and_end(text: str, characters: int) -> None:
    short = bounded(text, characters)
    assert len(short) <= characters
    short.encode("utf-8")
    whole = text.encode("utf-8", "replace").decode()
    assert short == whole or (whole.startswith(short[:10]) and whole.endswith(short[-8:]))


def test_a_document_that_fits_is_left_as_it_is() -> None:
    progress = Progress(
        job_uid="u",
        attempt=3,
        stage=Stage.VERIFYING,
        stages=[StageTimes(name=Stage.PREFLIGHT, start=START, end=START)],
        warnings=["one"],
        last_error=Problem(reason="RegionRaised", message="group 0: ValueError: no"),
        finished=True,
        result={"url": "gs://b/x.zarr", "shape": [3, 7], "dtype": "float32", "bytes": 84, "digest": "d"},
    )
    assert Progress.model_validate_json(shortened(progress, TERMINATION_BYTES)) == progress


def test_warnings_go_first_then_the_middle_of_the_message_and_the_stages_late() -> None:
    progress = Progress(
        job_uid="u",
        attempt=1,
        stages=[StageTimes(name=stage, start=START, end=START) for stage in Stage],
        warnings=["w" * 512] * 20,
        last_error=Problem(
            reason="InvalidTask", message="begins" + "ü" * (MESSAGE_CHARACTERS - 11) + "ended"
        ),
    )
    read = Progress.model_validate_json(shortened(progress, TERMINATION_BYTES))
    assert read.warnings == []
    assert read.stages == progress.stages
    assert read.last_error is not None
    assert read.last_error.message.startswith("begins")
    assert read.last_error.message.endswith("ended")


def test_the_messages_last_line_survives_any_length() -> None:
    """That of an exception says what went wrong."""
    tracker = ProgressTracker(JobIdentity("u", 1), ignore)
    tracker.fail(PermanentError(Reason.INVALID_TASK, "x" * 100_000 + "\nValueError: weights are missing"))
    read = Progress.model_validate_json(shortened(tracker.snapshot(), TERMINATION_BYTES))
    assert read.last_error is not None
    assert read.last_error.message.endswith("\nValueError: weights are missing")


def test_last_words_are_left_in_a_file_that_is_there(tmp_path: Path) -> None:
    """The kubelet makes the file, and it may hold something of an earlier try."""
    path = tmp_path / "termination-log"
    path.write_text("x" * 9999)
    leave(path, Progress(job_uid="u", attempt=1))
    assert Progress.model_validate_json(path.read_bytes()).job_uid == "u"


def test_last_words_that_cannot_be_written_end_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(tmp_path / "no" / "folder", Progress(job_uid="u", attempt=1))
    assert "termination message" in caplog.text
