"""How many test chunks share one pass over the training data.

A group's factors are in memory at the same time, and each further group differentiates the training
data once more: groups are as large as the limit allows.
"""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_GROUP_BYTES = 2**30
"""1 GiB for the factors of a group and what is computed from them against one training chunk."""


def group_chunks(rows: Sequence[int], row_bytes: int, limit: int) -> list[range]:
    """Consecutive chunks (of `rows[i]` rows each) in as few groups as fit `limit` bytes.

    A chunk that exceeds the limit alone is a group of its own.
    """
    groups: list[range] = []
    start, used = 0, 0
    for index, count in enumerate(rows):
        needed = count * row_bytes
        if index > start and used + needed > limit:
            groups.append(range(start, index))
            start, used = index, 0
        used += needed
    if rows:
        groups.append(range(start, len(rows)))
    return groups
