"""The store that InfluencesFromFactors takes factors and fit from: complete, of the same model and method."""

from __future__ import annotations

from typing import Any

import numpy as np

from influence_job.errors import PermanentError, Reason
from influence_job.spec import InfluenceJobSpec
from influence_job.storage.arrays import OURS, read_array, read_attributes
from influence_job.storage.fingerprint import differences
from influence_job.storage.store import Store

FIELD = "spec.factors.url"
SHARED = ("numericsVersion", "method", "precision", "factorDtype", "model")
"""Parts of the fingerprint in which both jobs agree. Training data may differ: other examples are scored."""


def read_record(spec: InfluenceJobSpec) -> dict[str, Any] | None:
    """What the factors' job noted at the root of its store; None for the other operations.

    Raises:
        PermanentError: no store of ours, or one that is not finished.
    """
    if spec.factors is None:
        return None
    with Store.open(spec.factors.url, spec.output.storage_options) as store:
        record = dict(read_attributes(store).get(OURS, {}))
    if not record:
        raise PermanentError(
            Reason.INVALID_SPEC,
            f"{FIELD}: expected the store of an InfluenceFactors job, found none at {spec.factors.url}",
        )
    if record.get("finished") is not True:
        raise PermanentError(
            Reason.STORE_MISMATCH,
            f"{FIELD}: the job that fills {spec.factors.url} is not finished; run it again first, it resumes",
        )
    return record


def digest_of(record: dict[str, Any] | None) -> str | None:
    """Identifies the factors, wherever their store lies."""
    return None if record is None else str(record["result"]["digest"])


def coordinates(spec: InfluenceJobSpec, record: dict[str, Any] | None) -> dict[str, np.ndarray[Any, Any]]:
    """What the factors' job noted of its test examples, `test_<name>` -> one value per example.

    Raises:
        PermanentError: a byte of them was changed.
    """
    if record is None or spec.factors is None:
        return {}
    names = [name for name in record.get("annotations", []) if name.startswith("test_")]
    with Store.open(spec.factors.url, spec.output.storage_options) as store:
        return {name: read_array(store, name) for name in names}


def refuse_other(spec: InfluenceJobSpec, record: dict[str, Any] | None, fingerprint: dict[str, Any]) -> None:
    """Refuses factors of another model or method: their scores would mean nothing.

    Raises:
        PermanentError: STORE_MISMATCH, with every difference.
    """
    if record is None or spec.factors is None:
        return
    stored = {name: record["fingerprint"].get(name) for name in SHARED}
    found = differences(stored, {name: fingerprint.get(name) for name in SHARED})
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise PermanentError(
            Reason.STORE_MISMATCH,
            f"{FIELD}: {spec.factors.url} holds the factors of another job:{lines}\nuse factors of this "
            f"model and method: run an InfluenceFactors job with the same task and method",
        )
