"""Where the sinks lie in the store: partial results of regions, and the root arrays made of them.

A worker puts `partials/<group>/<chunk>` before the region's dense chunk; when all regions of a group are
done, `merge_group` reads them in order and writes the group's rows of the root arrays, which
`influence show` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from influence_job.errors import PermanentError, Reason
from influence_job.storage import arrays
from influence_job.storage.sinks import NO_EXAMPLE, Partial, partial_bytes
from influence_job.storage.store import HELD, Store

RANKED = ("most_helpful", "most_helpful_score", "most_harmful", "most_harmful_score")
STATISTICS = ("score_mean", "score_std", "score_min", "score_max", "score_nonfinite")
READ_BYTES = 64 << 20
"""Of partial results that a merge holds, or of one that is larger."""


def create_sink_arrays(
    store: Store, test: int, train: int, group_rows: int, k: int, score_dtype: str
) -> None:
    """Makes the root arrays: `[test, rank]` of both ends and `[test]` statistics, a chunk per group."""
    ranks = min(k, train)
    for name in RANKED:
        scores = name.endswith("_score")
        arrays.create_array(
            store,
            name,
            (test, ranks),
            (group_rows, ranks),
            score_dtype if scores else "int64",
            ("test", "rank"),
            fill_value=None if scores else NO_EXAMPLE,
        )
    for name in STATISTICS:
        counts = name == "score_nonfinite"
        arrays.create_array(
            store,
            name,
            (test,),
            (group_rows,),
            "int64" if counts else "float64",
            ("test",),
            fill_value=-1 if counts else None,
        )


def put_partial(store: Store, group: int, chunk: int, partial: Partial) -> str:
    """Writes a region's partial result in one PUT and returns its digest."""
    data = partial.pack()
    store.put(_path(group, chunk), data)
    return arrays.digest(np.frombuffer(data, np.uint8))


def partial_digest(store: Store, group: int, chunk: int) -> str:
    """Digest of a region's partial result as it is stored; of nothing if it is gone."""
    return arrays.digest(np.frombuffer(store.get(_path(group, chunk)) or b"", np.uint8))


def merge_group(store: Store, group: int, chunks: int) -> str:
    """Merges a group's partial results in order, writes its rows, and returns their digest.

    Raises:
        PermanentError: one is missing or corrupt.
    """
    parts = _partials(store, group, chunks)
    merged = next(parts)
    for part in parts:
        merged = merged.merge(part)
        del part  # before the next is read
    top, statistics = merged.top, merged.statistics
    some = statistics.count > 0
    rows: dict[str, np.ndarray[Any, Any]] = {
        "most_helpful": top.most_helpful.index,
        "most_helpful_score": top.most_helpful.score,
        "most_harmful": top.most_harmful.index,
        "most_harmful_score": top.most_harmful.score,
        "score_mean": np.where(some, statistics.mean, np.nan),
        "score_std": np.where(some, statistics.deviation(), np.nan),
        "score_min": np.where(some, statistics.minimum, np.nan),
        "score_max": np.where(some, statistics.maximum, np.nan),
        "score_nonfinite": statistics.nonfinite,
    }
    digests = [arrays.write_chunk(store, name, (group, 0)[: rows[name].ndim], rows[name]) for name in rows]
    return arrays.joined_digest(digests)


def merging_bytes(rows: int, columns: int, train: int, k: int, itemsize: int) -> int:
    """What `merge_group` holds of `rows` test examples and chunks of `columns` training examples: what is
    merged, once more as the next part is added, and the parts that are read.
    """
    merged = partial_bytes(rows, min(k, train), itemsize)
    part = partial_bytes(rows, min(k, columns), itemsize)
    others = -(-train // columns) - 1
    return 2 * merged + min(others, _held(part)) * part


def delete_partials(store: Store, guard: Callable[[], None]) -> None:
    """Removes all partial results, once every group is merged; `guard` as `Store.delete_prefix` has it."""
    store.delete_prefix("partials/", guard, keep=lambda path: path == "partials/zarr.json")


def has_partial(store: Store, group: int, chunk: int) -> bool:
    """Whether somebody began to write this region. Whether it is done, the ledger says."""
    return store.get(_path(group, chunk)) is not None


def _partials(store: Store, group: int, chunks: int) -> Iterator[Partial]:
    """In order. None is larger than the first, so that its size tells how many can be held."""
    first = _path(group, 0)
    data = store.get(first)
    yield _unpacked(store, first, data)
    held = _held(len(data or b""))
    del data
    for path, data in store.get_many((_path(group, chunk) for chunk in range(1, chunks)), held):
        yield _unpacked(store, path, data)
        del data


def _held(size: int) -> int:
    """How many parts of a size a merge holds: those being read, and the one being merged."""
    return max(1, min(HELD, READ_BYTES // max(1, size)))


def _unpacked(store: Store, path: str, data: bytes | None) -> Partial:
    try:
        return Partial.unpack(data or b"")
    except (ValueError, KeyError, TypeError) as error:
        raise PermanentError(
            Reason.STORE_CORRUPT,
            f"{store.url}/{path}: a region's partial result is "
            f"{'missing' if data is None else f'corrupt ({error})'}; restore it, or start anew with "
            f"output.onExisting: Overwrite",
        ) from error


def _path(group: int, chunk: int) -> str:
    return f"partials/{group}/{chunk}"
