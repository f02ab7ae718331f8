"""Rows of the ledger: one, a table of all of them in memory, and a segment of some as one object.

A table holds numpy columns, one slot per index in pages, so that a million rows take about 40 MB and
are found in constant time. Digests are kept as bytes; only strings that are no digest live apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence_job.storage import records

PAGE_ROWS = 4096
DIGEST_BYTES = 16
TEXTS = ("digest", "inputs")
"""The columns that hold a string each."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is done and whose objects are in the store."""

    kind: str
    """What of: `region`, `factors`, `fit/<pass>/range`, ..."""
    index: int
    """Which one, from 0."""
    digest: str
    """Digest of what was written: 32 hexadecimal digits cost least."""
    inputs: str
    """Digest of the data that was read."""
    environment: str
    """The numerical environment it was computed in."""


@dataclass
class Columns:
    """Rows of one kind as arrays of equal length."""

    index: NDArray[np.int64]
    environment: NDArray[np.uint32]
    """Places in a list of environments."""
    digests: dict[str, NDArray[np.uint8]]
    """`[n, 16]` for each of `TEXTS`."""
    odd: dict[str, dict[int, str]]
    """Strings that are no digests, by place, for each of `TEXTS`."""

    @classmethod
    def of(cls, rows: list[Row], environments: dict[str, int]) -> Columns:
        """The columns of rows; new environments are added to the numbering."""
        made = cls.empty(len(rows))
        made.index[:] = [row.index for row in rows]
        made.environment[:] = [environments.setdefault(r.environment, len(environments)) for r in rows]
        for name in TEXTS:
            raw = bytearray(len(rows) * DIGEST_BYTES)
            for place, row in enumerate(rows):
                text = getattr(row, name)
                digest = _digest_bytes(text)
                if digest is None:
                    made.odd[name][place] = text
                else:
                    raw[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES] = digest
            made.digests[name] = np.frombuffer(raw, dtype="u1").reshape(len(rows), DIGEST_BYTES)
        return made

    @classmethod
    def empty(cls, length: int) -> Columns:
        """Columns to be filled."""
        return cls(
            np.zeros(length, dtype="<i8"),
            np.zeros(length, dtype="<u4"),
            {name: np.zeros((length, DIGEST_BYTES), dtype="u1") for name in TEXTS},
            {name: {} for name in TEXTS},
        )

    def text(self, name: str, place: int) -> str:
        """One string."""
        odd = self.odd[name].get(place)
        return self.digests[name][place].tobytes().hex() if odd is None else odd

    def put(self, places: NDArray[np.int64], source: Columns, chosen: NDArray[np.int64]) -> None:
        """Copies the `chosen` places of `source` to `places` here."""
        self.index[places] = source.index[chosen]
        self.environment[places] = source.environment[chosen]
        for name in TEXTS:
            self.digests[name][places] = source.digests[name][chosen]
            odd, theirs = self.odd[name], source.odd[name]
            if not odd and not theirs:
                continue
            for place, origin in zip(places.tolist(), chosen.tolist(), strict=True):
                odd.pop(place, None)
                if origin in theirs:
                    odd[place] = theirs[origin]


@dataclass
class _Page:
    done: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(PAGE_ROWS, dtype=bool))
    columns: Columns = field(default_factory=lambda: Columns.empty(PAGE_ROWS))


class Table:
    """Rows by kind and index; a row that comes again replaces the earlier one."""

    def __init__(self) -> None:
        self._pages: dict[str, dict[int, _Page]] = {}
        self._counts: dict[str, int] = {}
        self._environments: dict[str, int] = {}

    def insert(self, rows: Iterable[Row]) -> None:
        """Adds rows."""
        by_kind: dict[str, list[Row]] = {}
        for row in rows:
            by_kind.setdefault(row.kind, []).append(row)
        for kind, members in by_kind.items():
            self._insert(kind, Columns.of(members, self._environments))

    def remove(self, kind: str, indices: Iterable[int]) -> None:
        """Drops rows; those that are not there are passed over."""
        for index in indices:
            if self.has(kind, index):
                self._pages[kind][index // PAGE_ROWS].done[index % PAGE_ROWS] = False
                self._counts[kind] -= 1

    def insert_segment(self, data: bytes) -> None:
        """Adds the rows of a packed segment.

        Raises:
            ValueError: a byte of it was changed.
        """
        header, arrays = records.unpack(data)
        numbers = [
            self._environments.setdefault(name, len(self._environments)) for name in header["environments"]
        ]
        renumbered = np.array(numbers or [0], dtype="<u4")
        for number, (kind, odd) in enumerate(header["kinds"]):
            column = {name: arrays[f"{number}/{name}"] for name in ("index", "environment", *TEXTS)}
            self._insert(
                kind,
                Columns(
                    column["index"],
                    renumbered[column["environment"]],
                    {name: column[name] for name in TEXTS},
                    {name: dict(odd[name]) for name in TEXTS},
                ),
            )

    def pack(self) -> bytes:
        """All rows as a segment: environments once each, columns per kind."""
        kinds: list[tuple[str, dict[str, list[tuple[int, str]]]]] = []
        arrays: dict[str, NDArray[Any]] = {}
        for number, kind in enumerate(self.kinds()):
            columns = self._all(kind)
            kinds.append((kind, {name: list(columns.odd[name].items()) for name in TEXTS}))
            arrays[f"{number}/index"] = columns.index
            arrays[f"{number}/environment"] = columns.environment
            arrays |= {f"{number}/{name}": columns.digests[name] for name in TEXTS}
        return records.pack({"environments": list(self._environments), "kinds": kinds}, arrays)

    def has(self, kind: str, index: int) -> bool:
        """Whether there is such a row."""
        page = self._pages.get(kind, {}).get(index // PAGE_ROWS)
        return page is not None and bool(page.done[index % PAGE_ROWS])

    def row(self, kind: str, index: int) -> Row:
        """The row; KeyError if there is none."""
        if not self.has(kind, index):
            raise KeyError(f"{kind} {index} is not in the ledger")
        return self._row(kind, self._pages[kind][index // PAGE_ROWS], index % PAGE_ROWS, self.environments())

    def rows(self, kind: str) -> Iterator[Row]:
        """All rows of a kind by index."""
        environments = self.environments()
        for _, page in sorted(self._pages.get(kind, {}).items()):
            for place in np.flatnonzero(page.done).tolist():
                yield self._row(kind, page, place, environments)

    def missing(self, kind: str, total: int) -> NDArray[np.int64]:
        """Those of `range(total)` without a row, ascending."""
        done = np.zeros(-(-total // PAGE_ROWS) * PAGE_ROWS, dtype=bool)
        for number, page in self._pages.get(kind, {}).items():
            if number * PAGE_ROWS < total:
                done[number * PAGE_ROWS : (number + 1) * PAGE_ROWS] = page.done
        return np.flatnonzero(~done[:total])

    def count(self, kind: str) -> int:
        """Rows of a kind."""
        return self._counts.get(kind, 0)

    def kinds(self) -> list[str]:
        """The kinds of which there is a row."""
        return sorted(self._pages)

    def environments(self) -> list[str]:
        """The environments of all rows, in the order they came."""
        return list(self._environments)

    def _insert(self, kind: str, columns: Columns) -> None:
        pages = self._pages.setdefault(kind, {})
        numbers, places = np.divmod(columns.index, PAGE_ROWS)
        for number in np.unique(numbers).tolist():
            page = pages.setdefault(number, _Page())
            chosen = np.flatnonzero(numbers == number)
            before = np.count_nonzero(page.done)
            page.columns.put(places[chosen], columns, chosen)
            page.done[places[chosen]] = True
            self._counts[kind] = self.count(kind) + int(np.count_nonzero(page.done) - before)

    def _all(self, kind: str) -> Columns:
        """The rows of a kind without gaps."""
        gathered, start = Columns.empty(self.count(kind)), 0
        for _, page in sorted(self._pages[kind].items()):
            chosen = np.flatnonzero(page.done)
            gathered.put(np.arange(start, start + len(chosen)), page.columns, chosen)
            start += len(chosen)
        return gathered

    def _row(self, kind: str, page: _Page, place: int, environments: list[str]) -> Row:
        columns = page.columns
        digest, inputs = (columns.text(name, place) for name in TEXTS)
        environment = environments[columns.environment[place]]
        return Row(kind, int(columns.index[place]), digest, inputs, environment)


def _digest_bytes(text: str) -> bytes | None:
    """The bytes of a digest of ours, None for any other string."""
    if len(text) != 2 * DIGEST_BYTES:
        return None
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        return None
    return digest if digest.hex() == text else None
