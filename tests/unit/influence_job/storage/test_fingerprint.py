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


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({}, {"smoothing": "nothing"}, ("nothing", '"nothing"')),
        ({"smoothing": "nothing"}, {}, ('"nothing"', "nothing")),
        ({"smoothing": 1}, {"smoothing": True}, ("1", "True")),
        ({"smoothing": 0}, {"smoothing": False}, ("0", "False")),
        ({"smoothing": 1}, {"smoothing": 1.5}, ("1", "1.5")),
        ({"smoothing": 1}, {"smoothing": "1"}, ("1", '"1"')),
        ({"smoothing": [{"a": 1}]}, {"smoothing": [{"a": True}]}, ("[{'a': 1}]", "[{'a': True}]")),
        ({"smoothing": {}}, {"smoothing": []}, ("{}", "[]")),
    ],
)
def test_what_looks_alike_differs_and_the_sentence_tells_the_two_apart(
    before: dict[str, Any], now: dict[str, Any], words: tuple[str, str]
) -> None:
    """An entry point may answer otherwise to each of them."""
    assert differences({"task": {"arguments": before}}, {"task": {"arguments": now}}) == [
        f"task.arguments.smoothing: the store was made with {words[0]}, this job says {words[1]}"
    ]


def test_a_value_is_the_same_however_it_came() -> None:
    """NaN is NaN, a tuple is a list, 1.0 is 1, and the order of keys is nobody's."""
    stored = {"task": {"arguments": {"a": float("nan"), "b": [[1.5], {"x": 1.0, "y": None}]}}}
    given = {"task": {"arguments": {"b": ((1.5,), {"y": None, "x": 1}), "a": float("nan")}}}
    assert differences(stored, given) == []


def test_long_values_are_shortened() -> None:
    (sentence,) = differences({"plan": "x" * 500}, {"plan": "y" * 500})
    assert len(sentence) < 250
