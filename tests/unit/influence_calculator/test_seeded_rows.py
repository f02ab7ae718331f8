"""Seeded rows are orthonormal however many there are, and the same again from the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from influence_calculator.maths.seeded_rows import generator, normal_rows, orthonormal_rows

LIKE = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize(
    ("q", "width"), [(1, 1), (3, 7), (50, 200), (51, 200), (199, 200), (200, 200), (30, 100_000)]
)
def test_rows_are_orthonormal(q: int, width: int) -> None:
    for seed in range(3):
        rows = orthonormal_rows(q, width, generator(seed, "block"), LIKE)
        assert rows.shape == (q, width)
        torch.testing.assert_close(rows @ rows.T, torch.eye(q, dtype=torch.float64), rtol=0, atol=1e-12)


def test_rows_depend_on_seed_and_key_and_nothing_else() -> None:
    first = orthonormal_rows(3, 40, generator(1, "block"), LIKE)
    torch.rand(5)
    assert torch.equal(orthonormal_rows(3, 40, generator(1, "block"), LIKE), first)
    for key in ((2, "block"), (1, "other"), (1, "block", 2)):
        other = orthonormal_rows(3, 40, generator(*key), LIKE)  # type: ignore[arg-type]
        assert float((other @ first.T).abs().max()) < 0.9


@pytest.mark.parametrize("rows", [normal_rows, orthonormal_rows])
def test_rows_are_where_they_shall_be_whatever_the_default_device_is(rows: Any) -> None:
    like = torch.zeros(())
    with torch.device("meta"):
        found = rows(3, 5, generator(1, ""), like)
    assert torch.equal(found, rows(3, 5, generator(1, ""), like))


def test_rows_have_no_preferred_direction() -> None:
    """The mean of `QᵀQ` over seeds is q/P times the identity."""
    q, width, count = 2, 5, 4000
    mean = torch.zeros(width, width, dtype=torch.float64)
    for seed in range(count):
        rows = orthonormal_rows(q, width, generator(seed), LIKE)
        mean += rows.T @ rows / count
    expected = q / width * torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(mean, expected, rtol=0, atol=5 * 0.5 / count**0.5)
