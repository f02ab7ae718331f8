"""Top k and statistics: equal to the definition, whatever the grouping into regions."""

from __future__ import annotations

import math
import threading
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from influence_job.errors import PermanentError, Reason
from influence_job.storage import arrays, sink_arrays, sinks
from influence_job.storage.local_files import LocalFiles
from influence_job.storage.sinks import NO_EXAMPLE, Partial, Statistics, TopK, making_bytes, partial_bytes
from influence_job.storage.store import Store

Block = np.ndarray[Any, Any]
# Few distinct values, so that there are ties; and all that is no number.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -3.0, math.nan, math.inf, -math.inf])
BLOCKS = arrays_of.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 24)),
    elements=VALUES.map(np.float32),
)


def ranked(values: Block, k: int, sign: int) -> list[tuple[int, float]]:
    """The definition: largest first, equal ones by index, NaN never."""
    numbers = [(index, float(value)) for index, value in enumerate(values) if not math.isnan(value)]
    return sorted(numbers, key=lambda pair: (-sign * pair[1], pair[0]))[:k]


def found(top: TopK, row: int, sign: int) -> list[tuple[int, float]]:
    ranking = top.most_helpful if sign > 0 else top.most_harmful
    pairs = zip(ranking.index[row].tolist(), ranking.score[row].tolist(), strict=True)
    return [pair for pair in pairs if pair[0] != NO_EXAMPLE]


def merge_as_a_random_tree(parts: list[Any], draw: Any) -> Any:
    while len(parts) > 1:
        place = draw(st.integers(0, len(parts) - 2))
        parts[place : place + 2] = [parts[place].merge(parts[place + 1])]
    return parts[0]


def cuts(n: int, draw: Any) -> list[tuple[int, int]]:
    inner = draw(st.sets(st.integers(1, n - 1))) if n > 1 else set()
    return list(pairwise([0, *sorted(inner), n]))


@settings(max_examples=300, deadline=None)
@given(st.data(), BLOCKS, st.integers(1, 6))
def test_the_top_k_is_the_definition_however_it_was_divided_and_merged(
    data: Any, block: Block, k: int
) -> None:
    parts = [TopK.of(block[:, a:b], a, k) for a, b in cuts(block.shape[1], data.draw)]
    top = merge_as_a_random_tree(parts, data.draw)
    for row in range(len(block)):
        for sign in (1, -1):
            assert found(top, row, sign) == ranked(block[row], k, sign)
    assert top.most_helpful.index.shape == (len(block), min(k, block.shape[1]))


@settings(max_examples=200, deadline=None)
@given(st.data(), BLOCKS)
def test_statistics_are_those_of_the_finite_values_however_divided_and_merged(
    data: Any, block: Block
) -> None:
    parts = [Statistics.of(block[:, a:b]) for a, b in cuts(block.shape[1], data.draw)]
    merged = merge_as_a_random_tree(parts, data.draw)
    for row, values in enumerate(block.astype(np.float64)):
        finite = values[np.isfinite(values)]
        assert merged.nonfinite[row] == len(values) - len(finite)
        assert merged.count[row] == len(finite)
        if len(finite):
            np.testing.assert_allclose(merged.mean[row], finite.mean(), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(merged.deviation()[row], finite.std(), rtol=1e-12, atol=1e-7)
            assert (merged.minimum[row], merged.maximum[row]) == (finite.min(), finite.max())


def test_statistics_keep_their_digits_far_from_zero() -> None:
    # Σx² − n·mean² in float64 would leave no digit of a deviation of 1 around 1e9.
    values = 1e9 + np.random.default_rng(0).normal(size=(2, 3000))
    parts = [Statistics.of(values[:, a : a + 100]) for a in range(0, 3000, 100)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    np.testing.assert_allclose(merged.deviation(), values.std(axis=1), rtol=1e-7)


def test_statistics_of_many_rows_are_those_of_each_row() -> None:
    values = np.random.default_rng(0).normal(size=(5, 300_000)).astype(np.float32)
    together = Statistics.of(values)
    for row in range(5):
        alone = Statistics.of(values[row : row + 1])
        assert all(getattr(together, name)[row] == getattr(alone, name)[0] for name in Statistics.names())


def test_equal_scores_rank_by_index_at_both_ends_and_across_the_boundary_of_k() -> None:
    top = TopK.of(np.zeros((1, 9), np.float32), 100, 3)
    assert top.most_helpful.index.tolist() == [[100, 101, 102]]
    assert top.most_harmful.index.tolist() == [[100, 101, 102]]


def test_rows_with_fewer_numbers_than_k_end_with_no_example() -> None:
    top = TopK.of(np.array([[np.nan, 1.0, np.nan], [np.nan] * 3]), 10, 2)
    assert top.most_helpful.index.tolist() == [[11, NO_EXAMPLE], [NO_EXAMPLE] * 2]
    np.testing.assert_array_equal(top.most_helpful.score, [[1.0, np.nan], [np.nan, np.nan]])
    merged = top.merge(TopK.of(np.array([[np.nan], [-5.0]]), 13, 2))
    assert merged.most_helpful.index.tolist() == [[11, NO_EXAMPLE], [13, NO_EXAMPLE]]


def test_a_pair_of_a_perturbation_counts_with_the_norm_over_its_features() -> None:
    block = np.random.default_rng(0).normal(size=(2, 5, 3, 4))
    norms = np.sqrt(np.square(block).sum(axis=(2, 3)))
    np.testing.assert_allclose(TopK.of(block, 0, 5).most_helpful.score, -np.sort(-norms, axis=1), rtol=1e-14)
    np.testing.assert_allclose(Statistics.of(block).mean, norms.mean(axis=1), rtol=1e-14)


def test_partial_results_of_different_k_do_not_merge() -> None:
    block = np.ones((1, 4))
    with pytest.raises(ValueError, match="of one k, got 2 and 3"):
        TopK.of(block, 0, 2).merge(TopK.of(block, 4, 3))


def test_a_partial_result_survives_as_bytes_and_no_changed_byte_goes_unseen() -> None:
    partial = Partial.of(np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32), 3, 2)
    data = partial.pack()
    again = Partial.unpack(data)
    assert again.pack() == data
    np.testing.assert_array_equal(again.top.most_harmful.index, partial.top.most_harmful.index)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(ValueError, match="checksum"):
            Partial.unpack(bytes(changed))


@settings(max_examples=200, deadline=None)
@given(BLOCKS, st.integers(1, 6), st.integers(0, 24))
def test_the_top_k_does_not_depend_on_which_part_merges_the_other(block: Block, k: int, cut: int) -> None:
    """In order they merge by another way, which knows that equal scores are in order already."""
    first, second = (TopK.of(part, start, k) for part, start in ((block[:, :cut], 0), (block[:, cut:], cut)))
    forth, back = first.merge(second), second.merge(first)
    for one, other in ((forth.most_helpful, back.most_helpful), (forth.most_harmful, back.most_harmful)):
        np.testing.assert_array_equal(one.index, other.index)
        assert one.score.tobytes() == other.score.tobytes()


@settings(max_examples=100, deadline=None)
@given(st.data(), BLOCKS, st.integers(1, 6), st.integers(1, 30))
def test_merging_a_few_rows_at_a_time_changes_no_bit(data: Any, block: Block, k: int, at_once: int) -> None:
    parts = [Partial.of(block[:, a:b], a, k) for a, b in cuts(block.shape[1], data.draw)]
    merged = []
    for numbers in (1 << 30, at_once):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sinks, "_MERGED_AT_ONCE", numbers)
            whole = parts[0]
            for part in parts[1:]:
                whole = whole.merge(part)
            merged.append(whole.pack())
    assert merged[0] == merged[1]


@pytest.mark.parametrize(("rows", "columns", "k"), [(3, 5, 2), (3, 5, 9), (40, 1000, 10), (1, 1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_size_of_a_partial_result_is_known_but_for_its_header(
    rows: int, columns: int, k: int, dtype: str
) -> None:
    block = np.random.default_rng(0).normal(size=(rows, columns)).astype(dtype)
    real = len(Partial.of(block, 10**9, k).pack())
    assert 0 <= partial_bytes(rows, min(k, columns), block.itemsize) - real < 512


@pytest.fixture
def traced() -> Iterator[None]:
    """Counts what Python and numpy allocate."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("rows", "columns", "k", "dtype"),
    [
        (300, 400, 400, "float32"),  # packing
        (300, 400, 300, "float64"),
        (300, 4000, 10, "float32"),  # statistics
        (2, 1 << 20, 10, "float64"),  # places of a row's numbers
    ],
)
@pytest.mark.usefixtures("traced")
def test_making_a_partial_result_takes_what_is_planned(rows: int, columns: int, k: int, dtype: str) -> None:
    block = np.random.default_rng(0).normal(size=(rows, columns)).astype(dtype)
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    Partial.of(block, 0, k).pack()
    _, most = tracemalloc.get_traced_memory()
    assert most - before == pytest.approx(making_bytes(rows, columns, k, block.itemsize), rel=0.2)


T, N, ROWS, WIDTH, K = 5, 11, 2, 4, 3


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "x.zarr"))


def fill(store: Store, scores: Block) -> None:
    sink_arrays.create_sink_arrays(store, T, N, ROWS, K, "float32")
    for group in range(3):
        for chunk in range(3):
            block = scores[group * ROWS : (group + 1) * ROWS, chunk * WIDTH : (chunk + 1) * WIDTH]
            sink_arrays.put_partial(store, group, chunk, Partial.of(block, chunk * WIDTH, K))


def test_groups_become_rows_of_the_root_arrays(store: Store) -> None:
    scores = np.random.default_rng(0).normal(size=(T, N)).astype(np.float32)
    scores[1, 3] = np.nan
    scores[4] = np.nan
    fill(store, scores)
    digests = [sink_arrays.merge_group(store, group, 3) for group in range(3)]
    assert digests == [sink_arrays.merge_group(store, group, 3) for group in range(3)]
    read = {name: arrays.read_array(store, name) for name in (*sink_arrays.RANKED, *sink_arrays.STATISTICS)}
    for row in range(4):
        for name, sign in (("most_helpful", 1), ("most_harmful", -1)):
            expected = ranked(scores[row], K, sign)
            assert read[name][row].tolist() == [index for index, _ in expected]
            assert read[f"{name}_score"][row].tolist() == [score for _, score in expected]
        np.testing.assert_allclose(read["score_mean"][row], np.nanmean(scores[row]), rtol=1e-6)
        np.testing.assert_allclose(read["score_std"][row], np.nanstd(scores[row]), rtol=1e-6)
        assert read["score_min"][row] == np.nanmin(scores[row])
        assert read["score_max"][row] == np.nanmax(scores[row])
    assert read["score_nonfinite"].tolist() == [0, 1, 0, 0, N]
    assert read["most_helpful"][4].tolist() == [NO_EXAMPLE] * K
    assert all(np.isnan(read[name][4]) for name in ("score_mean", "score_std", "score_min", "score_max"))


def test_a_missing_or_corrupt_partial_result_is_named(store: Store) -> None:
    fill(store, np.zeros((T, N), np.float32))
    store.put("partials/1/2", b"x" * 40)
    with pytest.raises(PermanentError, match="partials/1/2: a region's partial result is corrupt") as raised:
        sink_arrays.merge_group(store, 1, 3)
    assert raised.value.reason is Reason.STORE_CORRUPT
    store.delete("partials/1/2")
    with pytest.raises(PermanentError, match="partials/1/2: a region's partial result is missing"):
        sink_arrays.merge_group(store, 1, 3)


@pytest.mark.parametrize(
    ("rows", "columns", "k", "chunks", "at_once"),
    [
        (300, 300, 300, 12, 16 << 20),
        (300, 100, 600, 12, 1 << 20),  # the lists grow
        (300, 300, 300, 12, 1),  # one after another
        (300, 300, 300, 2, 16 << 20),
    ],
)
@pytest.mark.usefixtures("traced")
def test_merging_takes_what_is_planned(
    store: Store, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, k: int, chunks: int, at_once: int
) -> None:
    monkeypatch.setattr(sink_arrays, "READ_BYTES", at_once)
    train = columns * chunks
    sink_arrays.create_sink_arrays(store, rows, train, rows, k, "float32")
    for chunk in range(chunks):
        block = np.random.default_rng(chunk).normal(size=(rows, columns)).astype(np.float32)
        sink_arrays.put_partial(store, 0, chunk, Partial.of(block, chunk * columns, k))
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    sink_arrays.merge_group(store, 0, chunks)
    _, most = tracemalloc.get_traced_memory()
    planned = sink_arrays.merging_bytes(rows, columns, train, k, 4)
    assert most - before == pytest.approx(planned, rel=0.1, abs=3 << 20)


class Watched(LocalFiles):
    """Knows how many contents of partial results are alive; reads end when `together` have begun."""

    def __init__(self, root: Path, together: int) -> None:
        super().__init__(root)
        self.lock = threading.Lock()
        self.all_begun = threading.Event()
        self.together, self.begun, self.alive, self.most_alive = together, 0, 0, 0

    def read(self, path: str) -> bytes | None:
        data = super().read(path)
        if data is None or not path.startswith("partials/"):
            return data
        self._begin(path)
        with self.lock:
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
        return Content(data, self)

    def _begin(self, path: str) -> None:
        if path == "partials/0/0":
            return  # its size tells how many may begin
        with self.lock:
            self.begun += 1
        if self.begun >= self.together:
            self.all_begun.set()
        assert self.all_begun.wait(20), f"{self.begun} reads in flight, expected {self.together}"


class Content(bytes):
    """An object's content that says when nobody holds it any more."""

    backend: Watched

    def __new__(cls, data: bytes, backend: Watched) -> Content:
        content = super().__new__(cls, data)
        content.backend = backend
        return content

    def __del__(self) -> None:
        with self.backend.lock:
            self.backend.alive -= 1


@pytest.mark.parametrize(
    ("room", "held", "in_flight"), [(1 << 20, 32, 16), (10, 10, 10), (3.5, 3, 3), (1, 1, 1), (0.1, 1, 1)]
)
def test_as_many_partial_results_are_held_as_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float, held: int, in_flight: int
) -> None:
    """Beside the first, which the others are merged into."""
    backend = Watched(tmp_path, in_flight)
    store = Store(str(tmp_path), {}, backend)
    partial = Partial.of(np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32), 0, 3)
    chunks = 60
    sink_arrays.create_sink_arrays(store, 2, 4 * chunks, 2, 3, "float32")
    for chunk in range(chunks):
        sink_arrays.put_partial(store, 0, chunk, partial)
    monkeypatch.setattr(sink_arrays, "READ_BYTES", int(room * len(partial.pack())))
    sink_arrays.merge_group(store, 0, chunks)
    assert backend.alive == 0
    assert backend.most_alive <= held + 1


def test_partial_results_are_deleted_and_nothing_else(store: Store) -> None:
    arrays.update_attributes(store, {})
    fill(store, np.zeros((T, N), np.float32))
    before = [path for path in store.list() if not path.startswith("partials/")]
    sink_arrays.delete_partials(store, guard=lambda: None)
    assert store.list() == sorted([*before, "partials/zarr.json"])
