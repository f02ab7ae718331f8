"""What a store says of itself, read for `influence show`: attributes, the ledger, top lists, statistics.

Never reads the matrix, and of long arrays only the chunks that hold what is asked for; all of a vector of
self-influences, of which the largest are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from influence_job.errors import PermanentError, Reason
from influence_job.progress import SolverCounts
from influence_job.spec import Operation
from influence_job.storage import arrays
from influence_job.storage.claim import Existing, inspect
from influence_job.storage.ledger import Ledger
from influence_job.storage.sinks import NO_EXAMPLE, Ranking
from influence_job.storage.store import Store

Coordinates = dict[str, Any]
"""Annotation -> value of one example, such as label: 8."""


@dataclass(frozen=True)
class Ranked:
    """One training example in a top list."""

    train: int
    score: float
    coordinates: Coordinates


@dataclass(frozen=True)
class TestCase:
    """One test example and the training examples behind it."""

    __test__ = False  # no test class, whatever pytest thinks of the name

    test: int
    coordinates: Coordinates
    mean: float
    std: float
    most_helpful: tuple[Ranked, ...]
    most_harmful: tuple[Ranked, ...]


@dataclass(frozen=True)
class Scores:
    """All scores of a result in four numbers."""

    mean: float
    minimum: float
    maximum: float
    nonfinite: int


@dataclass(frozen=True)
class Summary:
    """A store in numbers; the lists are empty until it is finished."""

    url: str
    record: dict[str, Any]
    """What the job noted at the root: spec, plan, provenance, result, name, jobUid."""
    finished: bool
    done: dict[str, int]
    """Kind of ledger row -> how many are done."""
    total: dict[str, int]
    """Kind of ledger row -> how many there will be."""
    solver: dict[str, int]
    scores: Scores | None
    cases: tuple[TestCase, ...]
    largest: tuple[Ranked, ...] = ()
    """The training examples with the largest influence on themselves, for SelfInfluence."""


def read_summary(store: Store, tests: Sequence[int] | None, top: int) -> Summary:
    """The summary, with test cases `tests` (default: up to 3 that are misread) and `top` examples each.

    Raises:
        PermanentError: nothing of ours is there.
        IndexError: a test case that does not exist.
    """
    existing = inspect(store)
    if existing.empty:
        raise PermanentError(
            Reason.STORE_EXISTS,
            f"{store.url}: expected the store of a job, found nothing; is the url right, has the job begun?",
        )
    record = dict(existing.attributes.get(arrays.OURS, {}))
    plan = record.get("plan", {})
    finished = existing.finished
    operation = plan.get("operation")
    on_itself = finished and operation == Operation.SELF_INFLUENCE
    scored = finished and Operation(operation).has_scores
    cases: tuple[TestCase, ...] = ()
    if scored:
        chosen = _choose(store, record, tests)
        cases = tuple(_case(store, record, test, top) for test in chosen)
    return Summary(
        url=store.url,
        record=record,
        finished=finished,
        done=_done(store, existing),
        total=_total(plan),
        solver=_solver(store) if finished else {},
        scores=_scores(store) if scored else _of_vector(store) if on_itself else None,
        cases=cases,
        largest=_largest(store, record, top) if on_itself else (),
    )


def _done(store: Store, existing: Existing) -> dict[str, int]:
    epoch = existing.latest()
    if epoch is None:
        return {}
    ledger = Ledger(store, epoch)
    ledger.load()
    return {kind: ledger.count(kind) for kind in ledger.kinds()}


def _total(plan: dict[str, Any]) -> dict[str, int]:
    """Rows that the plan asks for, of the kinds that tell how far a job is."""
    if not plan:
        return {}
    # The plan's own class needs torch, and two divisions do not.
    test_chunks = -(-plan["test"] // plan["testChunk"])
    operation = Operation(plan["operation"])
    if operation.is_of_training:
        kind = "self" if operation is Operation.SELF_INFLUENCE else "gradients"
        return {kind: -(-plan["train"] // plan["trainChunk"])}
    total = {}
    if operation.solves_tests:
        total["factors"] = test_chunks
    if operation.has_scores:
        groups = -(-test_chunks // plan["groupChunks"])
        total["region"] = groups * -(-plan["train"] // plan["trainChunk"])
    return total


def _solver(store: Store) -> dict[str, int]:
    if not arrays.has_array(store, "solver_status"):
        return {}
    status = arrays.read_array(store, "solver_status")
    # The stored values are the positions of these names (maths.method.SolverStatus, which needs torch).
    counts = {name: int((status == value).sum()) for value, name in enumerate(SolverCounts.model_fields)}
    return {name: count for name, count in counts.items() if count}


def _scores(store: Store) -> Scores:
    mean, low, high, nonfinite = (
        arrays.read_array(store, f"score_{name}") for name in ("mean", "min", "max", "nonfinite")
    )
    return Scores(float(mean.mean()), float(low.min()), float(high.max()), int(nonfinite.sum()))


def _of_vector(store: Store) -> Scores:
    """The same of influences of examples on themselves."""
    values = arrays.read_array(store, "self_influences").astype(float)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Scores(np.nan, np.nan, np.nan, values.size)
    return Scores(float(finite.mean()), float(finite.min()), float(finite.max()), values.size - finite.size)


def _largest(store: Store, record: dict[str, Any], top: int) -> tuple[Ranked, ...]:
    values = arrays.read_array(store, "self_influences")
    ranked = Ranking.of(values[None], 0, top, 1)
    return tuple(
        Ranked(int(i), float(s), _coordinates(store, record, "train", int(i)))
        for i, s in zip(ranked.index[0], ranked.score[0], strict=True)
        if i != NO_EXAMPLE
    )


def _choose(store: Store, record: dict[str, Any], tests: Sequence[int] | None) -> list[int]:
    """The test cases asked for; else the first three that the model misreads, or that there are."""
    count = int(record["plan"]["test"])
    if tests:
        for test in tests:
            if not 0 <= test < count:
                raise IndexError(f"expected a test example from 0 to {count - 1}, got {test}")
        return list(tests)
    if {"test_label", "test_predicted"} <= set(record.get("annotations", [])):
        label = arrays.read_array(store, "test_label")
        wrong = np.flatnonzero(label != arrays.read_array(store, "test_predicted"))
        if wrong.size:
            return [int(test) for test in wrong[:3]]
    return list(range(min(3, count)))


def _case(store: Store, record: dict[str, Any], test: int, top: int) -> TestCase:
    lists = {}
    for name in ("most_helpful", "most_harmful"):
        index = _row(store, name, test)[:top]
        score = _row(store, f"{name}_score", test)[:top]
        lists[name] = tuple(
            Ranked(int(i), float(s), _coordinates(store, record, "train", int(i)))
            for i, s in zip(index, score, strict=True)
            if i != NO_EXAMPLE
        )
    return TestCase(
        test=test,
        coordinates=_coordinates(store, record, "test", test),
        mean=float(_row(store, "score_mean", test)),
        std=float(_row(store, "score_std", test)),
        **lists,
    )


def _coordinates(store: Store, record: dict[str, Any], side: str, index: int) -> Coordinates:
    names = [name for name in record.get("annotations", []) if name.startswith(f"{side}_")]
    return {name.removeprefix(f"{side}_"): _row(store, name, index).tolist() for name in names}


def _row(store: Store, path: str, index: int) -> Any:
    """Row `index` of an array, from the one chunk that holds it."""
    info = arrays.array_info(store, path)
    chunk = index // info.chunks[0]
    block = arrays.read_chunk(store, path, (chunk, *(0,) * (len(info.shape) - 1)))
    return block[index - chunk * info.chunks[0]]
