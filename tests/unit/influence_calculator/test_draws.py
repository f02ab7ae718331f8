"""Draws depend on their place alone, and are uniform and normal over places."""

from __future__ import annotations

import math

import pytest
import torch

from influence_calculator.maths.draws import normals, uniforms

WORD = (1 << 64) - 1


def _mixed(word: int) -> int:
    """SplitMix64 on Python's own integers."""
    word = (word + 0x9E3779B97F4A7C15) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


@pytest.mark.parametrize(
    ("seed", "example", "token", "sample"), [(0, 0, 0, 0), (7, 123456, 5, 2), (-1, 3, 1, 0)]
)
def test_a_draw_is_the_hash_of_its_place(seed: int, example: int, token: int, sample: int) -> None:
    word = _mixed(_mixed(_mixed(_mixed(seed & WORD) ^ example) ^ sample) ^ token)
    drawn = uniforms(seed, torch.tensor([example]), token + 1, sample)[0, token]
    assert float(drawn) == ((word >> 12) + 0.5) * 2.0**-52


def test_a_draw_does_not_know_its_batch() -> None:
    whole = uniforms(3, torch.arange(10), 4, 1)
    pieces = [uniforms(3, torch.arange(start, min(start + 3, 10)), 4, 1) for start in range(0, 10, 3)]
    assert torch.equal(whole, torch.cat(pieces))
    assert torch.equal(whole, torch.func.vmap(lambda index: uniforms(3, index, 4, 1))(torch.arange(10)))


def test_more_tokens_leave_the_first_draws_as_they_were() -> None:
    assert torch.equal(normals(0, torch.arange(5), 7, 0)[:, :3], normals(0, torch.arange(5), 3, 0))


def test_places_have_draws_of_their_own() -> None:
    places = [
        uniforms(seed, torch.arange(20), 5, sample).flatten() for seed in (0, 1) for sample in (0, 1, 2)
    ]
    assert torch.cat(places).unique().numel() == 2 * 3 * 20 * 5


def test_uniforms_are_uniform() -> None:
    """χ² over 100 bins, and no correlation between neighbouring examples, tokens and samples."""
    drawn = uniforms(11, torch.arange(2000), 50, 0)
    assert float(drawn.min()) > 0
    assert float(drawn.max()) < 1
    counts = torch.histc(drawn.flatten(), 100, 0, 1)
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert 99 - 5 * math.sqrt(2 * 99) < chi_squared < 99 + 5 * math.sqrt(2 * 99)
    other = uniforms(11, torch.arange(2000), 50, 1)
    for a, b in [(drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn, other)]:
        correlation = float(((a - 0.5) * (b - 0.5)).mean() * 12)
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_normals_have_the_moments_of_a_normal() -> None:
    drawn = normals(5, torch.arange(4000), 25, 0).flatten()
    count = drawn.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((drawn**power).mean()) - moment) < 5 * math.sqrt(variance / count)
