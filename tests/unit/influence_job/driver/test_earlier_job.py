"""What must be equal of the job whose factors or gradients are taken, and where their store may lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from influence_job.driver import earlier_job
from influence_job.driver.fingerprints import all_differences
from influence_job.errors import PermanentError, Reason
from manifests import spec

STORED: dict[str, Any] = {"model": "abc", "untracked": ["a", "b", "c", "d", "e"]}
TAKING: dict[str, dict[str, Any]] = {
    "factors": {"operation": "InfluencesFromFactors"},
    "gradients": {"operation": "InfluencesFromGradients"},
}


@pytest.mark.parametrize(
    ("untracked", "said"),
    [
        (["a", "b", "c", "d", "e"], None),
        (["e", "d", "c", "b", "a"], None),
        (["a", "b", "c"], "the store alone leaves out 2 (d, e)"),
        (["a", "b", "c", "d", "e", "f"], "this job alone leaves out 1 (f)"),
        ([], "the store alone leaves out 5 (a, b, c, …)"),
        (["a", "b", "c", "f"], "the store alone leaves out 2 (d, e), this job alone leaves out 1 (f)"),
    ],
)
def test_tracked_parameters_are_told_by_a_few_names_in_which_they_differ(
    untracked: Sequence[str], said: str | None
) -> None:
    given = {"model": "abc", "untracked": list(untracked)}
    cure = "InfluenceTask.parameters and requires_grad decide"
    assert all_differences(STORED, given) == (
        [] if said is None else [f"untracked parameters: {said}; {cure}"]
    )


def test_a_store_that_does_not_say_what_it_tracked_still_opens() -> None:
    assert all_differences({"model": "abc"}, STORED) == []
    assert all_differences(STORED, {"model": "abc"}) == []
    assert all_differences(STORED, {"model": "abd"}) == [
        "model: the store was made with abc, this job says abd"
    ]


@pytest.mark.parametrize("what", TAKING)
def test_both_jobs_track_the_same_parameters(what: str) -> None:
    taking = spec(**TAKING[what], **{what: {"url": "earlier.zarr"}})
    earlier_job.refuse_other(taking, {"fingerprint": STORED}, STORED)
    with pytest.raises(PermanentError, match=rf"^spec\.{what}\.url: .*\n  untracked parameters: ") as caught:
        earlier_job.refuse_other(taking, {"fingerprint": STORED}, {**STORED, "untracked": ["a"]})
    assert caught.value.reason is Reason.STORE_MISMATCH


@pytest.mark.parametrize("what", TAKING)
@pytest.mark.parametrize(
    ("read", "output", "refused"),
    [
        ("gs://bucket/x.zarr", "gs://bucket/x.zarr/", True),
        ("gs://bucket/x.zarr/", "gs://bucket/x.zarr", True),
        ("gs://bucket/runs/x.zarr", "gs://bucket/runs", True),
        ("gs://bucket/x.zarr", "gs://bucket/x.zarr-2", False),
        ("gs://bucket/x.zarr", "s3://bucket/x.zarr", False),
        ("file:///bucket/x.zarr/", "/bucket/x.zarr", True),
        ("/bucket/a%20b.zarr", "file:///bucket/a%20b.zarr", False),
        ("/bucket/a b.zarr", "file:///bucket/a%20b.zarr", True),
        ("/bucket/x.zarr", "/bucket/y/../x.zarr", True),
        ("/bucket/x.zarr", "/bucket/y.zarr", False),
    ],
)
def test_nothing_is_written_where_the_job_reads(what: str, read: str, output: str, refused: bool) -> None:
    """However the urls are written: Overwrite would delete what they both mean."""
    taking = spec(**TAKING[what], **{what: {"url": read}}, output={"url": output})
    if not refused:
        earlier_job.refuse_own_store(taking)
        return
    with pytest.raises(PermanentError, match=rf"^spec\.output\.url: .*spec\.{what}\.url") as caught:
        earlier_job.refuse_own_store(taking)
    assert caught.value.reason is Reason.INVALID_SPEC


def test_a_job_that_takes_nothing_writes_where_it_likes() -> None:
    earlier_job.refuse_own_store(spec())
