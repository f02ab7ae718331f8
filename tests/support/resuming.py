"""What a rerun of a killed job promises, checked by the files it writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import stored
from jobs import Barrier, Jobs, Run, times_written


def kill_and_resume(
    jobs: Jobs,
    folder: Path,
    changes: Mapping[str, Any],
    kind: str = "region",
    objects: str = "^influences/c/0/",
    last: int = 3,
) -> Path:
    """Kills a job before the object number `last` of those that match is written, and checks its rerun.

    Each belongs to a row of this kind in the ledger. Returns where the store is.
    """
    jobs.finish(jobs.manifest(changes), output=folder / "undisturbed.zarr")
    expected = stored.result(stored.open_store(folder / "undisturbed.zarr"))
    path = folder / "killed.zarr"
    barrier = Barrier("put", "before", objects, last)
    run = jobs.start(jobs.manifest(changes), output=path, pace=0.6, barrier=barrier)
    run.wait_for_barrier()
    run.wait_until(lambda: count(stored.held(stored.open_store(path)))[kind] > 0, "a flush")
    run.kill()
    assert 0 < count(stored.held(stored.open_store(path)))[kind] < last
    resume_and_check(jobs, path, expected, changes, workers=1)
    return path


def resume_and_check(
    jobs: Jobs,
    path: Path,
    expected: dict[str, bytes],
    changes: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Runs the traced job (with `changes` to its spec) again on the store at `path`, to its end.

    The result must equal `expected` byte by byte; nothing that the ledger held is written again, and
    nothing else is written twice.
    """
    store = stored.open_store(path)
    rows = stored.held(store)
    finished = stored.held_objects(store, rows)
    before = _identities(path, finished)
    run = jobs.finish(jobs.manifest(changes), output=path, **settings)
    written = times_written(run, path)
    again = sorted(name for name in written if finished.fullmatch(name))
    assert not again, f"the ledger held these before the kill: {again}"
    changed = sorted(
        name for name, identity in _identities(path, finished).items() if before[name] != identity
    )
    assert not changed, f"files of finished rows were replaced: {changed}"
    assert not _computed_twice(written)
    assert stored.differing(stored.result(store), expected) == []
    return run


def count(rows: set[tuple[str, int]]) -> Counter[str]:
    """Ledger rows by kind."""
    return Counter(kind for kind, _ in rows)


def _computed_twice(written: Counter[str]) -> list[str]:
    """Objects of computed things (not bookkeeping) that one run wrote more than once."""
    computed = (
        "influences/c/",
        "factors/",
        "gradients/",
        "partials/",
        "fit/",
        "most_",
        "score_",
        "solver_",
        "self_",
    )
    return sorted(
        n for n, times in written.items() if times > 1 and n.startswith(computed) and n != "fit/model.json"
    )


def _identities(path: Path, pattern: Any) -> dict[str, tuple[int, int]]:
    """Inode and modification time of the files below `path` that match."""
    files = (file for file in path.rglob("*") if file.is_file())
    named = ((file.relative_to(path).as_posix(), file.stat()) for file in files)
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in named if pattern.fullmatch(name)}
