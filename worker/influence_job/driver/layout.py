"""The arrays of a result and what is noted at the root of its store, when a job begins and when it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from influence_job.errors import JobError
from influence_job.plan import Plan
from influence_job.plan.basis import Basis, stored_basis
from influence_job.spec import InfluenceJob
from influence_job.storage import arrays, sink_arrays
from influence_job.storage.claim import Epoch, Guard
from influence_job.storage.ledger import Ledger
from influence_job.storage.provenance import provenance
from influence_job.storage.store import Store
from influence_job.worker import factors, scores, self_influences, training_gradients
from influence_job.worker.loading import Loaded

log = logging.getLogger(__name__)

SOLVER_ARRAYS = {"solver_status": "int8", "solver_iterations": "int32", "solver_residual": "float64"}
NOT_YET = -1
"""What integers hold where nothing is computed yet; floats hold NaN."""


def create(
    store: Store,
    epoch: Epoch,
    guard: Guard,
    job: InfluenceJob,
    plan: Plan,
    loaded: Loaded,
    fingerprint: dict[str, Any],
    copied: Sequence[str],
) -> None:
    """Creates every array, filled with NaN, then notes the job: that note is what makes it begun.

    `copied` names the coordinates that are there already: they came with an earlier job's results.
    """
    guard.check()
    for name, dtype in loaded.annotations.items():
        side = name.split("_", 1)[0]
        length, chunk = (plan.test, plan.test_chunk) if side == "test" else (plan.train, plan.train_chunk)
        _create_vector(store, name, length, chunk, np.dtype(dtype), side)
    annotations = sorted({*loaded.annotations, *copied})
    coordinates = {"coordinates": " ".join(annotations)}
    if plan.on_itself:
        arrays.create_array(
            store,
            self_influences.SELF_INFLUENCES,
            plan.result_shape,
            plan.result_chunks,
            np.dtype(plan.dtype),
            plan.result_dims,
            coordinates,
        )
        _create_report(store, plan.train, plan.train_chunk, "train")
    elif plan.gradients_only:
        _create_rows(store, plan, training_gradients.gradient_path, "train", Basis.METHOD)
    elif plan.operation.solves_tests:
        _create_rows(store, plan, factors.factor_path, "test", stored_basis(job.spec))
        _create_report(store, plan.test, plan.test_chunk, "test")
    if plan.has_scores:
        if plan.dense:
            arrays.create_array(
                store,
                scores.INFLUENCES,
                plan.result_shape,
                plan.result_chunks,
                np.dtype(plan.dtype),
                plan.result_dims,
                coordinates,
            )
        if plan.by_block:
            arrays.write_names(store, "block", plan.blocks)
        sink_arrays.create_sink_arrays(store, plan.test, plan.train, plan.group_rows, plan.top_k, plan.dtype)
    guard.check()
    arrays.update_attributes(
        store,
        {
            arrays.OURS: {
                "jobUid": epoch.claim.job_uid,
                "epoch": epoch.number,
                "name": job.metadata.name,
                "spec": job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True),
                "fingerprint": fingerprint,
                "plan": plan.to_json(),
                "annotations": annotations,
                "provenance": provenance(loaded.environment, loaded.left_out),
            }
        },
    )


def _create_rows(store: Store, plan: Plan, path: Callable[[int], str], dim: str, basis: Basis) -> None:
    """Factors or gradients, one array per block."""
    for number, (block, width) in enumerate(plan.blocks.items()):
        arrays.create_array(
            store,
            path(number),
            (plan.test, width),
            (plan.test_chunk_length, plan.factor_columns(number)),
            np.dtype(plan.dtype),
            (dim, f"column_{number}"),
            {"block": block, "basis": str(basis)},
        )


def _create_report(store: Store, length: int, chunk: int, dim: str) -> None:
    """How each solve ended."""
    for name, dtype in SOLVER_ARRAYS.items():
        _create_vector(store, name, length, chunk, np.dtype(dtype), dim)


def _create_vector(store: Store, name: str, length: int, chunk: int, dtype: np.dtype[Any], dim: str) -> None:
    fill = NOT_YET if dtype.kind == "i" else None
    arrays.create_array(store, name, (length,), (min(chunk, length),), dtype, (dim,), fill_value=fill)


def result_rows(plan: Plan) -> tuple[str, int]:
    """The kind of ledger row that the result is made of, and how many."""
    if plan.has_scores:
        return scores.KIND, plan.regions
    if plan.on_itself:
        return self_influences.KIND, plan.train_chunks
    if plan.gradients_only:
        return training_gradients.KIND, plan.train_chunks
    return factors.KIND, plan.test_chunks


def complete(store: Store, ledger: Ledger, plan: Plan) -> dict[str, object]:
    """Compacts the ledger, notes the result at the root, and returns that note."""
    kind, total = result_rows(plan)
    result: dict[str, object] = {
        "url": store.url,
        "shape": list(plan.result_shape),
        "dtype": plan.dtype,
        "bytes": plan.result_bytes,
        "digest": arrays.joined_digest(ledger.row(kind, index).digest for index in range(total)),
    }
    ledger.compact()
    ledger.guard.check()
    arrays.update_attributes(store, {arrays.OURS: {"finished": True, "result": result}})
    tidy(store, ledger.guard)
    return result


def tidy(store: Store, guard: Guard) -> None:
    """Deletes what a finished job needs no more: partial results, which of a job without a matrix are what
    regions are read back from. Whoever claims the store next does it again: what goes wrong ends no job.
    """
    try:
        sink_arrays.delete_partials(store, guard.check_if_due)
    except JobError as error:
        log.warning("partial results are left in %s: %s", store.url, error)
