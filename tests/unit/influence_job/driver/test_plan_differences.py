"""What a stored plan cannot give to a job that would resume its store."""

from __future__ import annotations

from typing import Any

import pytest

from influence_job.driver.fingerprints import plan_differences
from manifests import spec

STORED: dict[str, Any] = {"testChunk": 8, "trainChunk": 32, "train": 640, "dense": True, "topK": 100}
SPARSE = STORED | {"dense": False}
FEW = STORED | {"train": 60}


def said(stored: dict[str, Any], **changes: Any) -> list[str]:
    return plan_differences(spec(**changes), stored)


@pytest.mark.parametrize(
    ("stored", "output", "sentences"),
    [
        (STORED, {}, []),
        (STORED, {"dense": True, "topK": 100}, []),
        (SPARSE, {"dense": False}, []),
        (SPARSE, {}, ["output.dense: the store was made with false, this job says true"]),
        (STORED, {"dense": False}, []),
        (STORED, {"topK": 101}, ["output.topK: the store was made with 100, this job says 101"]),
        (STORED, {"topK": 5}, ["output.topK: the store was made with 100, this job says 5"]),
        (
            SPARSE,
            {"dense": True, "topK": 5},
            [
                "output.dense: the store was made with false, this job says true",
                "output.topK: the store was made with 100, this job says 5",
            ],
        ),
    ],
)
def test_scores_that_are_not_kept_and_another_top_k_are_told(
    stored: dict[str, Any], output: dict[str, Any], sentences: list[str]
) -> None:
    """A dense matrix is all that a job without one asks for, and more."""
    assert said(stored, output={"url": "result.zarr", **output}) == sentences


@pytest.mark.parametrize("top_k", [60, 61, 100, 1000])
def test_more_than_there_are_examples_is_the_same_top_k(top_k: int) -> None:
    assert said(FEW, output={"url": "result.zarr", "topK": top_k}) == []
    assert said(FEW, output={"url": "result.zarr", "topK": 59}) != []


@pytest.mark.parametrize("operation", ["InfluenceFactors", "SelfInfluence", "TrainingGradients"])
def test_operations_without_a_top_k_have_none_that_differs(operation: str) -> None:
    assert said(STORED, operation=operation, output={"url": "result.zarr", "topK": 5}) == []


def test_chunks_are_compared_where_somebody_gave_them() -> None:
    assert said(STORED) == []
    assert said(STORED, chunks={"test": 8, "train": 32}) == []
    assert said(STORED, chunks={"test": 4}) == ["chunks.test: the store was made with 8, this job says 4"]


def test_a_store_without_a_plan_is_not_compared() -> None:
    assert plan_differences(spec(), None) == []
