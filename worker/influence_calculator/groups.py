"""How many test chunks share one pass over the training data, and how many training chunks one task.

A group's factors are in memory at the same time, and each further group differentiates the training
data once more: groups are as large as the limit allows. Training chunks are joined where they are so
small that a task would cost as much as what it computes.
"""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_GROUP_BYTES = 2**30
"""1 GiB for the factors of a group and what is computed from them against one training chunk."""


REGION_BYTES = 2**27
"""128 MiB for the scores of a group against one training chunk: Dask's own size of a chunk."""

JOINED_BYTES = 2**23
"""8 MiB for the examples of several training chunks that one task takes, and their scores."""

TASKS_PER_WORKER = 2
"""Tasks that are left at least when training chunks are joined, so that workers end together."""


def group_chunks(rows: Sequence[int], row_bytes: int, limit: int, score_bytes: int = 0) -> list[range]:
    """Consecutive chunks (of `rows[i]` rows each) in as few groups as fit.

    Where all chunks but a shorter last one have one size, so have all groups but a shorter last one: each can
    be a storage object.
    A group's rows take `row_bytes` each, at most `limit` together, and their scores against a training
    chunk `score_bytes` each, at most `REGION_BYTES` together. A chunk that exceeds a limit alone is a
    group of its own.
    """
    row_bytes = max(row_bytes, score_bytes * limit // REGION_BYTES)
    is_regular = len(set(rows[:-1])) <= 1 and (not rows or rows[-1] <= rows[0])
    groups: list[range] = []
    start, used = 0, 0
    for index, count in enumerate(rows):
        needed = count * row_bytes
        is_as_long_as_the_first = is_regular and bool(groups) and index - start == len(groups[0])
        if index > start and (used + needed > limit or is_as_long_as_the_first):
            groups.append(range(start, index))
            start, used = index, 0
        used += needed
    if rows:
        groups.append(range(start, len(rows)))
    return groups


def join_chunks(rows: Sequence[int], row_bytes: int, tasks: float) -> list[range]:
    """Consecutive chunks (of `rows[i]` rows, `row_bytes` each) joined by equal numbers of them.

    At least `tasks` are left, and what is joined takes at most `JOINED_BYTES`.
    """
    at_most = JOINED_BYTES // max(1, max(rows, default=0) * row_bytes)
    count = max(1, min(int(len(rows) / max(1, tasks)), at_most))
    return [range(start, min(start + count, len(rows))) for start in range(0, len(rows), count)]
