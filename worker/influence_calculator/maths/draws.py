"""Random numbers that depend on nothing but what they are for: seed, example, token and sample.

A generator with a state would give other numbers for another batch size, another order of work or
another device. Here each number is a hash of its place: four rounds of SplitMix64's finalizer.

Shapes: T tokens (positions or elements of one example's outputs).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shifted_right(words: Tensor, bits: int) -> Tensor:
    """A logical shift; torch's own repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(words: Tensor) -> Tensor:
    """SplitMix64's step and finalizer; int64 products wrap around."""
    words = words + _STEP
    words = (words ^ _shifted_right(words, 30)) * _FIRST
    words = (words ^ _shifted_right(words, 27)) * _SECOND
    return words ^ _shifted_right(words, 31)


def _words(seed: int, example: Tensor, tokens: int, sample: int) -> Tensor:
    place = _mixed(torch.full_like(example, _signed(seed % (1 << 64))))
    place = _mixed(place ^ example)
    place = _mixed(place ^ sample)
    return _mixed(place.unsqueeze(-1) ^ torch.arange(tokens, device=example.device))


def uniforms(seed: int, example: Tensor, tokens: int, sample: int) -> Tensor:
    """Float64 in (0, 1), `[*example.shape, T]`; `example` holds int64 indices in the training set."""
    return _fractions(_words(seed, example, tokens, sample))


def normals(seed: int, example: Tensor, tokens: int, sample: int) -> Tensor:
    """Standard normal float64, `[*example.shape, T]` (Box-Muller on two words per number)."""
    words = _words(seed, example, tokens, sample)
    radius = (-2 * _fractions(words).log()).sqrt()
    return radius * (2 * math.pi * _fractions(_mixed(words))).cos()


def _fractions(words: Tensor) -> Tensor:
    """The upper 52 bits as float64 in (0, 1)."""
    return (_shifted_right(words, 12).to(torch.float64) + 0.5) * 2.0**-52


def signs(seed: int, place: Tensor, columns: int) -> Tensor:
    """±1 with equal odds as int8, `[*place.shape, columns]`; a row depends on its int64 place alone."""
    words = _words(seed, place, -(-columns // 64), 0)
    bits = (words.unsqueeze(-1) >> torch.arange(64, device=place.device)) & 1
    return bits.to(torch.int8).mul_(2).sub_(1).flatten(-2)[..., :columns]
