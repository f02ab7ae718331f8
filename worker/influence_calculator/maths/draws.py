"""Random signs that depend on nothing but what they are for: a seed, an example or a parameter, and a column.

A generator with a state would give others for another batch size, another order of work or another
device. Here each is a bit of a hash of its place: four rounds of SplitMix64's finalizer.
"""

from __future__ import annotations

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


def signs(seed: int, place: Tensor, columns: int, sample: int = 0) -> Tensor:
    """±1 with equal odds as int8, `[*place.shape, columns]`; rows depend on their int64 place and sample."""
    words = _words(seed, place, -(-columns // 64), sample)
    bits = (words.unsqueeze(-1) >> torch.arange(64, device=place.device)).bitwise_and_(1)
    return bits.to(torch.int8).mul_(2).sub_(1).flatten(-2)[..., :columns]


def _words(seed: int, place: Tensor, count: int, sample: int) -> Tensor:
    """`[*place.shape, count]`."""
    row = _mixed(torch.full_like(place, _signed(seed % (1 << 64))))
    row = _mixed(row ^ place)
    row = _mixed(row ^ sample)
    return _mixed(row.unsqueeze(-1) ^ torch.arange(count, device=place.device))
