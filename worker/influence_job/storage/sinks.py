"""What a region feeds besides the dense matrix: the top k of both ends, and statistics, per test row.

Pure numpy. A partial result covers some training examples, and two of them merge. The top k is exact
in whatever order and grouping; statistics are sums in float64, so always merge in the order of the
training examples, one after the other, for equal bits. In perturbation mode the value of a pair is
the L2 norm over its features.

Shapes: t test rows, n training examples, F... features, k ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from influence_job.storage import records

Floats = NDArray[np.floating[Any]]
NO_EXAMPLE = -1
"""The index at ranks that no example holds, for NaN never ranks; the score there is NaN."""
_ELEMENTS_AT_ONCE = 1 << 20
"""Float64 copies stay below 8 MiB."""
_MERGED_AT_ONCE = 1 << 16
"""Numbers of the rows that are merged at a time, or of one row: what sorting them takes stays below 4 MiB."""
_LONGEST_HEADER = 512
"""Of a packed partial result, in bytes."""


def pair_values(block: Floats) -> Floats:
    """`[t, n]` of a block `[t, n, F...]`: the score itself, or the L2 norm over the features."""
    if block.ndim == 2:
        return block
    features = block.reshape(*block.shape[:2], -1)
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, math.prod(features.shape[1:])))
    # A norm takes a copy of what it is of.
    pieces = [np.linalg.norm(features[i : i + rows], axis=2) for i in range(0, len(features), rows)]
    return np.concatenate(pieces) if pieces else np.linalg.norm(features, axis=2)


@dataclass(frozen=True)
class Ranking:
    """The best of each test row, best first; equal values by index, the lower first."""

    index: NDArray[np.int64]
    """`[t, k]`; `NO_EXAMPLE` at the end of rows with fewer than k numbers."""
    score: Floats
    """`[t, k]`."""

    @classmethod
    def of(cls, values: Floats, first_index: int, k: int, sign: int) -> Ranking:
        """The k largest of `sign · values` in each row of `[t, n]`."""
        t, n = values.shape
        k = min(k, n)
        index = np.full((t, k), NO_EXAMPLE, dtype=np.int64)
        score = np.full((t, k), np.nan, dtype=values.dtype)
        for row in range(t):
            best = _best(sign * values[row], k)
            index[row, : len(best)] = first_index + best
            score[row, : len(best)] = values[row, best]
        return cls(index, score)

    def merge(self, other: Ranking, k: int, sign: int) -> Ranking:
        """The k best of both."""
        t, both = len(self.index), self.index.shape[1] + other.index.shape[1]
        index = np.empty((t, min(k, both)), dtype=np.int64)
        score = np.empty(index.shape, dtype=np.result_type(self.score, other.score))
        rows = max(1, _MERGED_AT_ONCE // max(1, both))
        for start in range(0, t, rows):
            piece = slice(start, start + rows)
            best = self._rows(piece)._merge_at_once(other._rows(piece), k, sign)
            index[piece], score[piece] = best.index, best.score
        return Ranking(index, score)

    def _rows(self, rows: slice) -> Ranking:
        return Ranking(self.index[rows], self.score[rows])

    def _merge_at_once(self, other: Ranking, k: int, sign: int) -> Ranking:
        index = np.concatenate([self.index, other.index], axis=1)
        score = np.concatenate([self.score, other.score], axis=1)
        if _all_before(self.index, other.index):
            # Stable keeps equal scores in order, puts NaN last, and merges two sorted runs in one go.
            order = np.argsort(-sign * score, axis=1, kind="stable")[:, :k]
        else:
            order = np.lexsort((index, -sign * score, index == NO_EXAMPLE), axis=1)[:, :k]
        return Ranking(np.take_along_axis(index, order, axis=1), np.take_along_axis(score, order, axis=1))


def _all_before(some: NDArray[np.int64], others: NDArray[np.int64]) -> bool:
    """Whether all examples of the others come later."""
    later = np.iinfo(np.int64).max
    return bool(some.max(initial=NO_EXAMPLE) < others.min(initial=later, where=others != NO_EXAMPLE))


def _best(values: Floats, k: int) -> NDArray[np.int64]:
    """Places of the k largest numbers, largest first, equal ones by place."""
    places = np.flatnonzero(~np.isnan(values))
    numbers = values[places]
    if len(numbers) > k:
        threshold = np.partition(numbers, len(numbers) - k)[len(numbers) - k]
        above, equal = numbers > threshold, numbers == threshold
        equal[np.flatnonzero(equal)[k - np.count_nonzero(above) :]] = False
        chosen = above | equal
        places, numbers = places[chosen], numbers[chosen]
    return places[np.argsort(-numbers, kind="stable")]


@dataclass(frozen=True)
class TopK:
    """Both ends of the values of each test row."""

    k: int
    most_helpful: Ranking
    """Largest first."""
    most_harmful: Ranking
    """Smallest first."""

    @classmethod
    def of(cls, block: Floats, first_train_index: int, k: int) -> TopK:
        """Of one region's block `[t, n, F...]`."""
        values = pair_values(block)
        if values.dtype == np.float16:
            values = values.astype(np.float32)
        return cls(
            k, Ranking.of(values, first_train_index, k, +1), Ranking.of(values, first_train_index, k, -1)
        )

    def merge(self, other: TopK) -> TopK:
        """Of both sets of training examples."""
        if self.k != other.k:
            raise ValueError(f"top k: expected partial results of one k, got {self.k} and {other.k}")
        return TopK(
            self.k,
            self.most_helpful.merge(other.most_helpful, self.k, +1),
            self.most_harmful.merge(other.most_harmful, self.k, -1),
        )


@dataclass(frozen=True)
class Statistics:
    """Moments and range of the finite values of each test row, in float64; all `[t]`."""

    count: NDArray[np.int64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]
    """Σ (x − mean)²."""
    minimum: NDArray[np.float64]
    """Infinity where nothing is finite, as for `maximum` its negative."""
    maximum: NDArray[np.float64]
    nonfinite: NDArray[np.int64]
    """How many values are NaN or infinite: they are in none of the others."""

    @classmethod
    def of(cls, block: Floats) -> Statistics:
        """Of one region's block `[t, n, F...]`."""
        values = pair_values(block)
        rows = max(1, _ELEMENTS_AT_ONCE // max(1, values.shape[1]))
        pieces = [cls._of_rows(values[start : start + rows]) for start in range(0, len(values), rows)]
        return cls(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in cls.names()))

    @classmethod
    def _of_rows(cls, values: Floats) -> Statistics:
        x = values.astype(np.float64)
        finite = np.isfinite(x)
        count = finite.sum(axis=1)
        mean = np.where(finite, x, 0.0).sum(axis=1) / np.maximum(count, 1)
        deviation = np.where(finite, x - mean[:, None], 0.0)
        return cls(
            count=count.astype(np.int64),
            mean=mean,
            squares=np.square(deviation).sum(axis=1),
            minimum=np.where(finite, x, np.inf).min(axis=1, initial=np.inf),
            maximum=np.where(finite, x, -np.inf).max(axis=1, initial=-np.inf),
            nonfinite=(x.shape[1] - count).astype(np.int64),
        )

    def merge(self, other: Statistics) -> Statistics:
        """δ = m_B − m_A;  m = m_A + δ n_B/n;  M = M_A + M_B + δ² n_A n_B/n.

        Chan, Golub, LeVeque: "Algorithms for computing the sample variance", 1983, (2.1).
        """
        count = self.count + other.count
        total = np.maximum(count, 1)
        delta = other.mean - self.mean
        return Statistics(
            count=count,
            mean=self.mean + delta * (other.count / total),
            squares=self.squares + other.squares + delta * delta * (self.count * other.count / total),
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
            nonfinite=self.nonfinite + other.nonfinite,
        )

    def deviation(self) -> NDArray[np.float64]:
        """Standard deviation of the population: √(M/n)."""
        return np.sqrt(self.squares / np.maximum(self.count, 1))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(cls.__dataclass_fields__)


@dataclass(frozen=True)
class Partial:
    """All small sinks of one region, or of several."""

    top: TopK
    statistics: Statistics

    @classmethod
    def of(cls, block: Floats, first_train_index: int, k: int) -> Self:
        """Of one region's block `[t, n, F...]`, whose first column is example `first_train_index`."""
        values = pair_values(block)
        return cls(TopK.of(values, first_train_index, k), Statistics.of(values))

    def merge(self, other: Partial) -> Partial:
        """Of both; `other` covers later training examples."""
        return Partial(self.top.merge(other.top), self.statistics.merge(other.statistics))

    def pack(self) -> bytes:
        """As one object with a checksum."""
        columns: dict[str, NDArray[Any]] = {
            "helpful_index": self.top.most_helpful.index,
            "helpful_score": self.top.most_helpful.score,
            "harmful_index": self.top.most_harmful.index,
            "harmful_score": self.top.most_harmful.score,
        }
        columns |= {name: getattr(self.statistics, name) for name in Statistics.names()}
        return records.pack({"k": self.top.k}, columns)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The inverse of `pack`.

        Raises:
            ValueError: a byte was changed or is missing.
        """
        header, columns = records.unpack(data)
        return cls._from(header, columns)

    @classmethod
    def _from(cls, header: Mapping[str, Any], columns: records.Arrays) -> Self:
        top = TopK(
            header["k"],
            Ranking(columns["helpful_index"], columns["helpful_score"]),
            Ranking(columns["harmful_index"], columns["harmful_score"]),
        )
        return cls(top, Statistics(**{name: columns[name] for name in Statistics.names()}))


def row_bytes(ranks: int, itemsize: int) -> int:
    """Of one test row of a partial result with so many ranks: both ends, and statistics."""
    return 2 * ranks * (8 + itemsize) + 8 * len(Statistics.names())


def partial_bytes(rows: int, ranks: int, itemsize: int) -> int:
    """Of a partial result as `Partial.pack` gives it: at most its header more than it is."""
    return rows * row_bytes(ranks, itemsize) + _LONGEST_HEADER


def making_bytes(rows: int, columns: int, k: int, itemsize: int) -> int:
    """What `Partial.of` and `Partial.pack` take beside a region of `rows × columns` scores.

    Packing copies all arrays once. Before that places and copies of one row's numbers are sorted, and float64
    copies of some rows summed.
    """
    made = partial_bytes(rows, min(k, columns), itemsize)
    ranked = columns * (14 + 3 * itemsize)
    summed = 25 * max(columns, min(rows * columns, _ELEMENTS_AT_ONCE))
    return made + max(made, ranked, summed)
