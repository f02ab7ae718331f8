"""What is done. A region, fit range or factor chunk is done when the ledger holds its row, and only then.

One object per flush, immutable, under a new name: `ledger/<epoch>-<n>`. The driver is the only one
who writes here; its claim is checked before every flush.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from influence_job.errors import PermanentError, Reason
from influence_job.storage.claim import Epoch, Guard
from influence_job.storage.rows import Row, Table
from influence_job.storage.store import Store

FLUSH_SECONDS = 1.0
FLUSH_ROWS = 256
"""A kill loses what was done since the last flush: a second's work, or so many rows."""

MOST_SEGMENTS = 1000
"""So many are made one: whoever resumes a job of days reads few, and its end has few to delete."""

_SEGMENT = re.compile(r"ledger/(\d+)-(\d+)")

__all__ = ["FLUSH_ROWS", "FLUSH_SECONDS", "Ledger", "Row", "indices_since"]


class Ledger:
    """The rows of one store that count for one epoch. `add` and `flush` may be called from any thread."""

    def __init__(self, store: Store, epoch: Epoch, mixes: bool = False) -> None:
        """`mixes`: rows of several numerical environments may come together."""
        self._store = store
        self._mixes = mixes
        self._epoch = epoch
        self.guard = Guard(store, epoch)
        """Proves that this driver is still the writer."""
        self._table = Table()
        self._pending: list[Row] = []
        self._next_segment = 0
        self._segments_there = 0
        self._last_flush = time.monotonic()
        self._rows_lock = threading.Lock()
        self._flush_lock = threading.Lock()

    def load(self) -> None:
        """Reads all segments that count.

        Raises:
            PermanentError: one is corrupt; it is named.
        """
        read: set[str] = set()
        while unread := [path for path in self._segments() if path not in read]:
            for path, data in self._store.get_many(unread):
                read.add(path)
                if data is not None:  # else made one with others since it was listed, or deleted by hand
                    self._insert(path, data)
        self._segments_there = len(read)

    def _insert(self, path: str, data: bytes) -> None:
        try:
            with self._rows_lock:
                self._table.insert_segment(data)
        except (ValueError, KeyError, IndexError) as error:
            raise PermanentError(
                Reason.STORE_CORRUPT,
                f"{self._store.url}/{path}: a segment of the ledger cannot be read: {error}; restore it, "
                f"or delete it: what it listed is then computed again",
            ) from error

    def go_on_as(self, epoch: Epoch) -> None:
        """From now on writes what `epoch` does; before anything is recorded."""
        self._epoch, self.guard = epoch, Guard(self._store, epoch)

    def has(self, kind: str, index: int) -> bool:
        """Whether it is done."""
        return self._table.has(kind, index)

    def row(self, kind: str, index: int) -> Row:
        """The row of what is done.

        Raises:
            KeyError: it is not done.
        """
        return self._table.row(kind, index)

    def rows(self, kind: str) -> Iterator[Row]:
        """All rows of a kind by index."""
        return self._table.rows(kind)

    def missing(self, kind: str, total: int) -> NDArray[np.int64]:
        """Those of `range(total)` that are not done, ascending."""
        return self._table.missing(kind, total)

    def count(self, kind: str) -> int:
        """How many of a kind are done."""
        return self._table.count(kind)

    def kinds(self) -> list[str]:
        """The kinds of which any is done."""
        return self._table.kinds()

    def refuse_other(self, *environments: str) -> None:
        """Keeps rows of several numerical environments apart, unless they may mix.

        Raises:
            PermanentError: together with those of the rows there are several.
        """
        known = self._table.environments() or list(environments[:1])
        if environments and not self._mixes and len({*known, *environments}) > 1:
            raise PermanentError(
                Reason.STORE_MISMATCH,
                f"output.url: {self._store.url} was begun on {sorted(known)}, this worker is "
                f"{environments[-1]!r}: the results would not be equal bit for bit; use the same hardware "
                f"and image (workers.nodeSelector; on one machine CUDA_VISIBLE_DEVICES), or set "
                f"output.allowMixedHardware: true",
            )

    @property
    def next_segment(self) -> int:
        """The number of the segment that the next flush writes."""
        return self._next_segment

    @property
    def pending(self) -> int:
        """Rows that a kill would lose now."""
        return len(self._pending)

    def add(self, rows: Iterable[Row]) -> None:
        """Records what is done; the next flush makes it last.

        Raises:
            PermanentError: as `refuse_other`; nothing is recorded.
        """
        rows = list(rows)
        with self._rows_lock:
            self.refuse_other(*dict.fromkeys(row.environment for row in rows))
            self._table.insert(rows)
            self._pending.extend(rows)

    def forget(self, kind: str, indices: Iterable[int]) -> None:
        """Counts rows as not done, because what is stored differs from them; the next row replaces each.

        Segments are left as they are: an attempt that dies before the next row finds the difference again.
        """
        with self._rows_lock:
            self._table.remove(kind, indices)

    def flush(self) -> None:
        """Writes what is pending as a new segment, if this epoch is still the highest.

        Raises:
            InfrastructureError, PermanentError: as `check_epoch`, or the storage failed; rows stay pending.
        """
        with self._flush_lock:
            if self._pending:
                self.guard.check()
            else:
                self.guard.check_if_due()
            with self._rows_lock:
                rows = list(self._pending)
            if rows:
                segment = Table()
                segment.insert(rows)
                self._write_segment(segment.pack())
                with self._rows_lock:
                    del self._pending[: len(rows)]
            if self._segments_there > MOST_SEGMENTS:
                self._merge_segments()
            self._last_flush = time.monotonic()

    def flush_if_due(self) -> None:
        """`flush` when a second has passed or 256 rows wait: for the driver's loop."""
        if self.pending >= FLUSH_ROWS or time.monotonic() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def compact(self) -> None:
        """Merges all segments into one and deletes the others; a kill in between leaves rows twice."""
        self.flush()
        with self._flush_lock:
            self._merge_segments()

    def _merge_segments(self) -> None:
        old = self._segments()
        if len(old) <= 1:
            return
        self.guard.check()
        with self._rows_lock:
            merged = self._table.pack()
        self._write_segment(merged)
        self._store.delete_many(old, self.guard.check_if_due)
        self._segments_there = 1

    def _segments(self) -> list[str]:
        """Paths of the segments that count, in the order they were written."""
        found = ((path, _SEGMENT.fullmatch(path)) for path in self._store.list("ledger/"))
        numbered = [((int(m[1]), int(m[2])), path) for path, m in found if m is not None]
        return [path for (epoch, _), path in sorted(numbered) if epoch >= self._epoch.counts_from]

    def _write_segment(self, data: bytes) -> None:
        self._store.put(f"ledger/{self._epoch.number}-{self._next_segment}", data)
        self._next_segment += 1
        self._segments_there += 1


def indices_since(store: Store, epoch: int, segment: int, kind: str) -> set[int]:
    """The indices of a kind in an epoch's segments from number `segment` on, for a worker that only reads."""
    table = Table()
    found = (_SEGMENT.fullmatch(path) for path in store.list(f"ledger/{epoch}-"))
    for _, data in store.get_many(m[0] for m in found if m is not None and int(m[2]) >= segment):
        if data is not None:
            table.insert_segment(data)
    return {row.index for row in table.rows(kind)}
