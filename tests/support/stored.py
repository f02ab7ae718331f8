"""What a store holds: its result as bytes, the rows of its ledger, and the objects that a row stands for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from influence_job.plan import Plan
from influence_job.storage.arrays import OURS, read_attributes
from influence_job.storage.claim import inspect
from influence_job.storage.ledger import Ledger
from influence_job.storage.store import Store

_BOOKKEEPING = re.compile(r"ledger/.*|zarr\.json|fit/model\.json|.*\.influence-[^/]*")
"""What tells of runs, times and hosts; all else is the result of a computation."""


def open_store(url: str | Path, options: dict[str, Any] | None = None) -> Store:
    """The store as a job opens it."""
    return Store.open(str(url), options or {})


def contents(store: Store) -> dict[str, bytes]:
    """Every object with its bytes."""
    return {path: data or b"" for path, data in store.get_many(store.list())}


def result(store: Store) -> dict[str, bytes]:
    """Every object that must be the same, byte by byte, however the job was run."""
    return {path: data for path, data in contents(store).items() if not _BOOKKEEPING.fullmatch(path)}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Paths that only one has, or whose bytes differ."""
    return sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))


def held(store: Store) -> set[tuple[str, int]]:
    """Kind and index of every row that the ledger holds."""
    epoch = inspect(store).latest()
    if epoch is None:
        return set()
    ledger = Ledger(store, epoch)
    ledger.load()
    return {(kind, row.index) for kind in ledger.kinds() for row in ledger.rows(kind)}


def rot(flipped: Path, lost: Path) -> None:
    """What a disk may do to two files: one has another bit, one is gone."""
    data = bytearray(flipped.read_bytes())
    data[3] ^= 1
    flipped.write_bytes(data)
    lost.unlink()


def plan_of(store: Store) -> Plan:
    """The plan that the store was made with."""
    return Plan.from_json(read_attributes(store)[OURS]["plan"])


def held_objects(store: Store, rows: set[tuple[str, int]]) -> re.Pattern[str]:
    """Matches the paths of all objects that ledger rows stand for; nothing, if there are no rows."""
    if not rows:
        return re.compile(r"(?!)")
    plan = plan_of(store)
    return re.compile("|".join(object_pattern(plan, kind, index).pattern for kind, index in sorted(rows)))


def object_pattern(plan: Plan, kind: str, index: int) -> re.Pattern[str]:
    """Matches the paths of the objects that a ledger row stands for."""
    if kind == "region":
        group, chunk = plan.unravel(index)
        place = "/".join(map(str, plan.result_index(group, chunk)))
        own = rf"influences/c/{place}|partials/{group}/{chunk}"
        annotated = group == 0 and plan.operation.reads_training
        return re.compile(own + (rf"|train_\w+/c/{chunk}" if annotated else ""))
    if kind == "factors":
        return re.compile(rf"factors/\d+/c/{index}/\d+|(solver|test)_\w+/c/{index}")
    if kind == "self":
        return re.compile(rf"(self_influences|solver_\w+|train_\w+)/c/{index}")
    if kind == "gradients":
        return re.compile(rf"gradients/\d+/c/{index}/\d+|train_\w+/c/{index}")
    if kind == "merge":
        return re.compile(rf"(most|score)_\w+/c/{index}(/0)?")
    step, what = kind.removeprefix("fit/").rsplit("/", 1)
    if step.startswith("solve/"):
        # The rows of all passes that solve a chunk follow one another.
        number, index = divmod(index, plan.fit_ranges if what == "range" else len(plan.blocks))
        step = f"{step}/{number}"
    step = re.escape(step)
    return re.compile(rf"fit/{step}/partial/{index}/.*" if what == "range" else rf"fit/{step}/{index}")
