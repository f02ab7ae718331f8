"""Signs depend on their place alone, and fall to either side with equal odds, independently."""

from __future__ import annotations

import math

import pytest
import torch

from influence_calculator.maths.draws import signs

WORD = (1 << 64) - 1


def _mixed(word: int) -> int:
    """SplitMix64 on Python's own integers."""
    word = (word + 0x9E3779B97F4A7C15) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


@pytest.mark.parametrize(
    ("seed", "place", "column", "sample"), [(0, 0, 0, 0), (7, 123456, 5, 2), (-1, 3, 63, 0), (2, 9, 64, 1)]
)
def test_a_sign_is_a_bit_of_the_hash_of_its_place(seed: int, place: int, column: int, sample: int) -> None:
    word = _mixed(_mixed(_mixed(_mixed(seed & WORD) ^ place) ^ sample) ^ (column // 64))
    drawn = signs(seed, torch.tensor([place]), column + 1, sample)[0, column]
    assert int(drawn) == (1 if (word >> (column % 64)) & 1 else -1)


def test_a_sign_does_not_know_its_batch() -> None:
    whole = signs(3, torch.arange(10), 4, 1)
    pieces = [signs(3, torch.arange(start, min(start + 3, 10)), 4, 1) for start in range(0, 10, 3)]
    assert torch.equal(whole, torch.cat(pieces))
    assert torch.equal(whole, torch.func.vmap(lambda index: signs(3, index, 4, 1))(torch.arange(10)))


def test_more_columns_leave_the_first_signs_as_they_were() -> None:
    assert torch.equal(signs(0, torch.arange(5), 70)[:, :3], signs(0, torch.arange(5), 3))


def test_places_have_signs_of_their_own() -> None:
    rows = [signs(seed, torch.arange(20), 64, sample) for seed in (0, 1) for sample in (0, 1, 2)]
    assert len(torch.cat(rows).unique(dim=0)) == 2 * 3 * 20


def test_signs_are_fair_and_independent() -> None:
    """No mean, whole or by column, and no correlation between neighbouring places, columns and samples."""
    drawn = signs(11, torch.arange(2000), 100).double()
    assert set(drawn.unique().tolist()) == {-1, 1}
    assert abs(float(drawn.mean())) < 5 / math.sqrt(drawn.numel())
    assert float(drawn.mean(0).abs().max()) < 5 / math.sqrt(len(drawn))
    other = signs(11, torch.arange(2000), 100, 1).double()
    for a, b in [(drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn, other)]:
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())
