"""Groups of test chunks: as few as fit, within their limits, and of one size where the chunks are."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from influence_calculator.groups import REGION_BYTES, group_chunks

counts = st.integers(1, 400)
row_bytes = st.integers(1, 50)


def rows_of(groups: list[range], chunks: list[int]) -> list[int]:
    return [sum(chunks[i] for i in group) for group in groups]


def regular(examples: int, chunk: int) -> list[int]:
    return [min(chunk, examples - start) for start in range(0, examples, chunk)]


@settings(deadline=None, derandomize=True, database=None)
@given(examples=counts, chunk=counts, row_bytes=row_bytes, limit=st.integers(1, 5000))
def test_regular_chunks_make_regular_groups(examples: int, chunk: int, row_bytes: int, limit: int) -> None:
    """Which a storage object per chunk needs."""
    rows = rows_of(group_chunks(regular(examples, chunk), row_bytes, limit), regular(examples, chunk))
    assert set(rows[:-1]) <= {rows[0]}
    assert rows[-1] <= rows[0]


@settings(deadline=None, derandomize=True, database=None)
@given(
    chunks=st.one_of(st.lists(st.integers(0, 30), max_size=30), st.builds(regular, counts, counts)),
    row_bytes=row_bytes,
    limit=st.integers(1, 5000),
)
def test_every_chunk_is_in_one_group_and_no_group_exceeds_the_limit_but_a_single_chunk(
    chunks: list[int], row_bytes: int, limit: int
) -> None:
    groups = group_chunks(chunks, row_bytes, limit)
    assert [index for group in groups for index in group] == list(range(len(chunks)))
    for group, rows in zip(groups, rows_of(groups, chunks), strict=True):
        assert rows * row_bytes <= limit or len(group) == 1


def test_a_short_last_chunk_does_not_make_the_last_group_the_longest() -> None:
    chunks = [64] * 8 + [10]
    assert rows_of(group_chunks(chunks, 1, 270), chunks) == [256, 256, 10]


def test_chunks_that_fit_together_are_one_group() -> None:
    assert group_chunks([2, 2, 1], 1, 5) == [range(3)]
    assert group_chunks([], 1, 5) == []


def test_scores_against_a_training_chunk_bound_a_group_too() -> None:
    assert rows_of(group_chunks([1] * 10, 1, 10**6, REGION_BYTES // 3), [1] * 10) == [3, 3, 3, 1]
