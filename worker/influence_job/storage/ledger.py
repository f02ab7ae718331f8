"""What is done. A region, fit range or factor chunk is done when the ledger holds its row, and only then.

One object per flush, immutable, under a new name: `ledger/<epoch>-<n>`. The driver is the only one
who writes here; its claim is checked before every flush. Rows live in memory in pages of numpy
columns (under 50 bytes each), so that a million of them are no burden.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from influence_job.errors import PermanentError, Reason
from influence_job.storage import records
from influence_job.storage.claim import Epoch, check_epoch
from influence_job.storage.store import Store

FLUSH_SECONDS = 1.0
FLUSH_ROWS = 256
"""A kill loses what was done since the last flush: at most a second's work, at most so many rows."""
PAGE_ROWS = 4096
DIGEST_BYTES = 16

_SEGMENT = re.compile(r"ledger/(\d+)-(\d+)")
_COLUMNS = ("digest", "inputs")


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


class _Page:
    """Columns of `PAGE_ROWS` consecutive indices of one kind. Only strings that are no digest live apart."""

    def __init__(self) -> None:
        self.done = np.zeros(PAGE_ROWS, dtype=bool)
        self.environment = np.zeros(PAGE_ROWS, dtype="<u4")
        self.digests = {name: np.zeros((PAGE_ROWS, DIGEST_BYTES), dtype="u1") for name in _COLUMNS}
        self.odd: dict[tuple[str, int], str] = {}

    def text(self, column: str, place: int) -> str:
        odd = self.odd.get((column, place))
        return self.digests[column][place].tobytes().hex() if odd is None else odd

    def set_text(self, column: str, place: int, value: str) -> None:
        digest = _digest_bytes(value)
        if digest is None:
            self.odd[column, place] = value
        else:
            self.odd.pop((column, place), None)
            self.digests[column][place] = np.frombuffer(digest, dtype="u1")


class Ledger:
    """The rows of one store that count for one epoch. `add` and `flush` may be called from any thread."""

    def __init__(self, store: Store, epoch: Epoch) -> None:
        self._store = store
        self._epoch = epoch
        self._pages: dict[str, dict[int, _Page]] = {}
        self._counts: dict[str, int] = {}
        self._environments: dict[str, int] = {}
        self._pending: list[Row] = []
        self._next_segment = 0
        self._last_flush = self._last_check = time.monotonic()
        self._rows_lock = threading.Lock()
        self._flush_lock = threading.Lock()

    def load(self) -> None:
        """Reads all segments that count.

        Raises:
            PermanentError: one is corrupt; it is named.
        """
        for path, data in self._store.get_many(self._segments()):
            if data is None:
                continue  # merged into another segment and deleted since the listing
            try:
                header, columns = records.unpack(data)
                rows = list(_rows(header, columns))
            except (ValueError, KeyError, IndexError) as error:
                raise PermanentError(
                    Reason.STORE_CORRUPT,
                    f"{self._store.url}/{path}: a segment of the ledger cannot be read: {error}; restore it, or "
                    f"delete it: what it listed is then computed again",
                ) from error
            with self._rows_lock:
                self._insert(rows)

    def has(self, kind: str, index: int) -> bool:
        """Whether it is done."""
        page = self._pages.get(kind, {}).get(index // PAGE_ROWS)
        return page is not None and bool(page.done[index % PAGE_ROWS])

    def row(self, kind: str, index: int) -> Row:
        """The row of what is done.

        Raises:
            KeyError: it is not done.
        """
        if not self.has(kind, index):
            raise KeyError(f"{kind} {index} is not in the ledger")
        page, place = self._pages[kind][index // PAGE_ROWS], index % PAGE_ROWS
        environment = list(self._environments)[page.environment[place]]
        return Row(kind, index, page.text("digest", place), page.text("inputs", place), environment)

    def rows(self, kind: str) -> Iterator[Row]:
        """All rows of a kind by index."""
        environments = list(self._environments)
        for number, page in sorted(self._pages.get(kind, {}).items()):
            for place in np.flatnonzero(page.done).tolist():
                digest, inputs = (page.text(column, place) for column in _COLUMNS)
                index = number * PAGE_ROWS + place
                yield Row(kind, index, digest, inputs, environments[page.environment[place]])

    def missing(self, kind: str, total: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Those of `range(total)` that are not done, ascending."""
        done = np.zeros(-(-total // PAGE_ROWS) * PAGE_ROWS, dtype=bool)
        for number, page in self._pages.get(kind, {}).items():
            if number * PAGE_ROWS < total:
                done[number * PAGE_ROWS : (number + 1) * PAGE_ROWS] = page.done
        return np.flatnonzero(~done[:total])

    def count(self, kind: str) -> int:
        """How many of a kind are done."""
        return self._counts.get(kind, 0)

    def kinds(self) -> list[str]:
        """The kinds of which any is done."""
        return sorted(self._pages)

    def environments(self) -> list[str]:
        """The numerical environments that rows were computed in."""
        return list(self._environments)

    @property
    def pending(self) -> int:
        """Rows that a kill would lose now."""
        return len(self._pending)

    def add(self, rows: Iterable[Row]) -> None:
        """Records what is done; the next flush makes it last."""
        rows = list(rows)
        with self._rows_lock:
            self._insert(rows)
            self._pending.extend(rows)

    def flush(self) -> None:
        """Writes what is pending as a new segment, if this epoch is still the highest.

        Raises:
            InfrastructureError, PermanentError: as `check_epoch`, or the storage failed; rows stay pending.
        """
        with self._flush_lock:
            if self._pending or time.monotonic() - self._last_check > FLUSH_SECONDS:
                self.check_epoch()
            with self._rows_lock:
                count = len(self._pending)
                segment = _pack(self._pending) if count else None
            if segment is not None:
                self._write_segment(segment)
                with self._rows_lock:
                    del self._pending[:count]
            self._last_flush = time.monotonic()

    def flush_if_due(self) -> None:
        """`flush` when a second has passed or 256 rows wait: for the driver's loop."""
        if self.pending >= FLUSH_ROWS or time.monotonic() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def check_epoch(self) -> None:
        """Proves that this driver is still the writer; see `claim.check_epoch`."""
        check_epoch(self._store, self._epoch)
        self._last_check = time.monotonic()

    def compact(self) -> None:
        """Merges all segments into one and deletes the others. A kill in between leaves rows twice, or all."""
        self.flush()
        with self._flush_lock:
            old = self._segments()
            if len(old) <= 1:
                return
            self._write_segment(_pack([row for kind in self.kinds() for row in self.rows(kind)]))
            for path in old:
                self._store.delete(path)

    def _segments(self) -> list[str]:
        found = ((path, _SEGMENT.fullmatch(path)) for path in self._store.list("ledger/"))
        numbered = [((int(m[1]), int(m[2])), path) for path, m in found if m is not None]
        return [path for (epoch, _), path in sorted(numbered) if epoch >= self._epoch.counts_from]

    def _write_segment(self, segment: bytes) -> None:
        self._store.put(f"ledger/{self._epoch.number}-{self._next_segment}", segment)
        self._next_segment += 1

    def _insert(self, rows: Iterable[Row]) -> None:
        for row in rows:
            pages = self._pages.setdefault(row.kind, {})
            page = pages.get(row.index // PAGE_ROWS)
            if page is None:
                page = pages[row.index // PAGE_ROWS] = _Page()
            place = row.index % PAGE_ROWS
            page.set_text("digest", place, row.digest)
            page.set_text("inputs", place, row.inputs)
            page.environment[place] = self._environments.setdefault(row.environment, len(self._environments))
            if not page.done[place]:
                page.done[place] = True
                self._counts[row.kind] = self._counts.get(row.kind, 0) + 1


def _digest_bytes(text: str) -> bytes | None:
    """The bytes of a digest of ours, None for any other string."""
    if len(text) != 2 * DIGEST_BYTES or text != text.lower():
        return None
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        return None
    return digest if len(digest) == DIGEST_BYTES else None


def _pack(rows: list[Row]) -> bytes:
    """A segment: kinds and environments once each, digests as bytes, other strings in the header."""
    kinds: dict[str, int] = {}
    environments: dict[str, int] = {}
    odd: dict[str, list[tuple[int, str]]] = {}
    columns: dict[str, np.ndarray[Any, Any]] = {
        "kind": np.empty(len(rows), dtype="<u2"),
        "index": np.empty(len(rows), dtype="<i8"),
        "environment": np.empty(len(rows), dtype="<u4"),
    }
    digests = {name: bytearray(len(rows) * DIGEST_BYTES) for name in _COLUMNS}
    for place, row in enumerate(rows):
        columns["kind"][place] = kinds.setdefault(row.kind, len(kinds))
        columns["index"][place] = row.index
        columns["environment"][place] = environments.setdefault(row.environment, len(environments))
        for name, text in (("digest", row.digest), ("inputs", row.inputs)):
            digest = _digest_bytes(text)
            if digest is None:
                odd.setdefault(name, []).append((place, text))
            else:
                digests[name][place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES] = digest
    for name, raw in digests.items():
        columns[name] = np.frombuffer(raw, dtype="u1").reshape(len(rows), DIGEST_BYTES)
    return records.pack({"kinds": list(kinds), "environments": list(environments), "odd": odd}, columns)


def _rows(header: dict[str, Any], columns: records.Arrays) -> Iterator[Row]:
    texts = {}
    for name in _COLUMNS:
        raw = columns[name].tobytes().hex()
        width = 2 * DIGEST_BYTES
        texts[name] = [raw[start : start + width] for start in range(0, len(raw), width)]
        for place, text in header["odd"].get(name, []):
            texts[name][place] = text
    for kind, index, environment, digest, inputs in zip(
        columns["kind"].tolist(),
        columns["index"].tolist(),
        columns["environment"].tolist(),
        texts["digest"],
        texts["inputs"],
        strict=True,
    ):
        yield Row(header["kinds"][kind], index, digest, inputs, header["environments"][environment])
