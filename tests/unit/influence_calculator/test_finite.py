"""Rows that hold numbers alone, also where their sum is none."""

from __future__ import annotations

import math

import torch

from influence_calculator.maths.finite import finite_rows, spoil


def test_a_row_is_finite_if_all_of_its_entries_are() -> None:
    largest = torch.finfo(torch.float32).max
    rows = torch.tensor(
        [
            [1.0, 2.0, 3.0],
            [largest, largest, 0.0],
            [-largest, -largest, 0.0],
            [math.nan, 1.0, 1.0],
            [1.0, math.inf, 1.0],
            [math.inf, -math.inf, 1.0],
        ]
    )
    assert finite_rows(rows).tolist() == [True, True, True, False, False, False]
    assert finite_rows(rows.half()).tolist() == [True, *[False] * 5], "half precision has no such numbers"
    assert finite_rows(rows[:0]).tolist() == []
    assert finite_rows(rows[:, :0]).tolist() == [True] * 6


def test_spoilt_rows_are_nan_and_others_are_left_alone() -> None:
    rows = torch.arange(12.0).view(4, 3)
    spoil(rows, torch.tensor([False, True, False, True]))
    assert rows.isnan().all(1).tolist() == [False, True, False, True]
    assert rows[::2].tolist() == [[0, 1, 2], [6, 7, 8]]
    spoil(rows[::2], torch.tensor([False, False]))
    assert not rows[::2].isnan().any()
