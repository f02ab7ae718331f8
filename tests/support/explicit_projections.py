"""Projections of gradients written out as matrices, from their definitions and nothing of the calculator's.

Shapes: P rows, k columns; of a layer o outputs, j inputs (with a bias one more), c groups.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def explicit_projection(width: int, rank: int, seed: int) -> Tensor:
    """S, `[P, k]`, by arithmetic of Python's whole numbers on one entry after another."""
    mask = (1 << 64) - 1

    def mixed(word: int) -> int:
        word = (word + 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        return word ^ (word >> 31)

    def entry(row: int, column: int) -> float:
        word = mixed(mixed(mixed(mixed(seed) ^ row)) ^ (column // 64))
        return rank**-0.5 if word >> (column % 64) & 1 else -(rank**-0.5)

    rows = [[entry(row, column) for column in range(rank)] for row in range(width)]
    return torch.tensor(rows, dtype=torch.float64)


def seed_of(*key: object) -> int:
    """The seed of one use of a seed."""
    text = ":".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") // 2


def explicit_side(width: int, rank: int, *key: object) -> Tensor:
    """P, `[width, k]`: orthonormal columns, scaled so that `P Pᵀ` is the identity on average."""
    if rank >= width:
        return torch.eye(width, dtype=torch.float64)
    drawn = torch.rand(rank, width, generator=torch.Generator().manual_seed(seed_of(*key))).double() - 0.5
    Q, R = torch.linalg.qr(drawn.T)
    return (Q * R.diagonal().sign()).contiguous() * (width / rank) ** 0.5


def explicit_layer(
    o: int, i: int, bias: bool, rank: int, seed: int, name: str, *, groups: int = 1, transposed: bool = False
) -> Tensor:
    """`S`, `[P_b, k_b]`: `P_out ⊗ P_in` for each group, its rows put into the order of the parameters.

    `i` is 0 for a layer of which only the bias is tracked.
    """
    j = i + bias
    P_in = explicit_side(j, rank, seed, name, "inputs")
    P_out = explicit_side(o // groups, rank, seed, name, "outputs")
    S = torch.block_diag(*[torch.kron(P_out, P_in) for _ in range(groups)])
    place = torch.arange(o * j).reshape(o, j)
    weight = place[:, :i].T if transposed else place[:, :i]
    order = [weight.reshape(-1), *([place[:, i]] if bias else [])]
    return S[torch.cat(order)]
