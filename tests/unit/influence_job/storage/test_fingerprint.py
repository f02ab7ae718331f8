"""Differences between a store and a job, as sentences."""

from __future__ import annotations

from typing import Any

import pytest

from influence_job.storage.fingerprint import differences

STORED: dict[str, Any] = {
    "parameters": "abc",
    "method": {"name": "Ekfac", "regularization": 0.01, "blocks": ["a", "b"]},
    "data": {"train": {"length": 1400, "version": None}},
}


def changed(**parts: Any) -> dict[str, Any]:
    return STORED | parts


@pytest.mark.parametrize(
    ("given", "sentences"),
    [
        (STORED, []),
        (
            changed(method=STORED["method"] | {"regularization": 0.1}),
            ["method.regularization: the store was made with 0.01, this job says 0.1"],
        ),
        (
            changed(data={"train": {"length": 1401, "version": "v2"}}, parameters="abd"),
            [
                "parameters: the store was made with abc, this job says abd",
                "data.train.length: the store was made with 1400, this job says 1401",
            ],
        ),
        (changed(parameters=None), []),
        ({"method": None}, []),
        (changed(method=STORED["method"] | {"blocks": ("a", "b")}), []),
        (
            changed(method=STORED["method"] | {"blocks": ["a", "c"]}),
            ["method.blocks: the store was made with ['a', 'b'], this job says ['a', 'c']"],
        ),
        (changed(extra=1), []),
        (
            changed(method={"name": "Ekfac", "regularization": 0.01, "samples": 2}),
            [
                "method.blocks: the store was made with ['a', 'b'], this job says nothing",
                "method.samples: the store was made with nothing, this job says 2",
            ],
        ),
        (changed(method="Cg"), [f"method: the store was made with {STORED['method']}, this job says Cg"]),
    ],
)
def test_each_part_that_is_known_on_both_sides_and_differs_gets_a_sentence(
    given: dict[str, Any], sentences: list[str]
) -> None:
    assert differences(STORED, given) == sentences


def test_false_and_zero_are_values_not_unknown() -> None:
    assert differences({"a": 0, "b": False, "c": ""}, {"a": 1, "b": True, "c": "x"}) == [
        "a: the store was made with 0, this job says 1",
        "b: the store was made with False, this job says True",
        "c: the store was made with , this job says x",
    ]


def test_long_values_are_shortened() -> None:
    (sentence,) = differences({"plan": "x" * 500}, {"plan": "y" * 500})
    assert len(sentence) < 250
