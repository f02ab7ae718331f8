"""The store of an earlier job that a job takes its fit from, with factors or training gradients.

It must be complete, and of the same model and method.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from influence_job.driver.fingerprints import UNTRACKED, all_differences
from influence_job.errors import PermanentError, Reason
from influence_job.spec import InfluenceJobSpec
from influence_job.storage import arrays
from influence_job.storage.store import Store
from influence_job.worker.factors import factor_path, rows_info
from influence_job.worker.training_gradients import gradient_path

SHARED = ("numericsVersion", "method", "precision", "model", UNTRACKED)
"""Parts of the fingerprint in which both jobs agree. The data of one side may differ: others are scored."""


@dataclass(frozen=True)
class Taken:
    """What a job takes from an earlier one."""

    what: str
    """factors or gradients: what the part of the fingerprint for them is called."""
    field: str
    """The field that names the store."""
    url: str
    maker: str
    """Whose store it is."""
    array: Callable[[int], str]
    """The array of one block."""
    side: str
    """Whose coordinates come along: test or train."""
    shared: tuple[str, ...]


def taken(spec: InfluenceJobSpec) -> Taken | None:
    """What the operation takes; None for those that make all themselves."""
    field, maker = spec.earlier_field, spec.earlier_maker
    if spec.factors is not None:
        shared = (*SHARED, "factorDtype")
        return Taken("factors", field, spec.factors.url, maker, factor_path, "test", shared)
    if spec.gradients is not None:
        return Taken("gradients", field, spec.gradients.url, maker, gradient_path, "train", SHARED)
    return None


def refuse_own_store(spec: InfluenceJobSpec) -> None:
    """Refuses an output that is, or holds, the store that the job reads, however the two urls are written:
    Overwrite would delete that too. Touches neither.

    Raises:
        PermanentError: INVALID_SPEC.
    """
    wanted = taken(spec)
    if wanted is None:
        return
    read, written = _place(wanted.url), _place(spec.output.url)
    if f"{read}/".startswith(f"{written}/"):
        raise PermanentError(
            Reason.INVALID_SPEC,
            f"spec.output.url: expected another place than that of {wanted.field}, whose {wanted.what} the "
            f"job reads, got {spec.output.url}, where {read} lies; give the result an output.url of its own",
        )


def _place(url: str) -> str:
    """One url of a store for all that lead to it: of files the path, without links."""
    if "://" in url and not url.startswith("file://"):
        return url.rstrip("/")
    with Store.open(url) as store:
        return os.path.realpath(store.url)


def _open(spec: InfluenceJobSpec, wanted: Taken) -> Store:
    """The store that is read, whose errors name its field."""
    return arrays.of_earlier_job(Store.open(wanted.url, spec.output.storage_options), wanted.field)


def read_record(spec: InfluenceJobSpec) -> dict[str, Any] | None:
    """What the earlier job noted at the root of its store; None for the other operations.

    Raises:
        PermanentError: no store of ours, one that is not finished or is damaged, or one of another operation.
    """
    wanted = taken(spec)
    if wanted is None:
        return None
    with _open(spec, wanted) as store:
        record = dict(arrays.read_attributes(store).get(arrays.OURS, {}))
        if record.get("finished") is True:
            if not arrays.has_array(store, wanted.array(0)):
                raise PermanentError(
                    Reason.INVALID_SPEC,
                    f"{wanted.field}: expected the store of {wanted.maker}, got {wanted.url}, of operation "
                    f"{record['plan']['operation']}, which holds no {wanted.what}",
                )
            arrays.array_info(store, wanted.array(0))
    if not record:
        raise PermanentError(
            Reason.INVALID_SPEC,
            f"{wanted.field}: expected the store of {wanted.maker}, found none at {wanted.url}",
        )
    if record.get("finished") is not True:
        raise PermanentError(
            Reason.STORE_MISMATCH,
            f"{wanted.field}: the job that fills {wanted.url} is not finished; run it again first, it "
            "resumes",
        )
    return record


def digests(spec: InfluenceJobSpec, record: dict[str, Any] | None) -> dict[str, str | None]:
    """Identify what is taken, wherever its store lies, for the fingerprint."""
    found: dict[str, str | None] = {"factors": None, "gradients": None}
    wanted = taken(spec)
    if wanted is not None and record is not None:
        found[wanted.what] = str(record["result"]["digest"])
    return found


def refuse_changed(spec: InfluenceJobSpec, record: dict[str, Any] | None) -> None:
    """Refuses a result that was made while somebody filled the earlier job's store anew.

    Raises:
        PermanentError: STORE_MISMATCH, or as `read_record` where it is not complete.
    """
    wanted = taken(spec)
    if wanted is None or digests(spec, read_record(spec)) == digests(spec, record):
        return
    raise changed(wanted)


def changed(wanted: Taken, of: str = "") -> PermanentError:
    """The error for what is taken, or for a part of it, that did not stay as it was."""
    return PermanentError(
        Reason.STORE_MISMATCH,
        f"{wanted.field}: the {wanted.what}{of} in {wanted.url} changed while they were scored; let the job "
        "that writes there end, then run this one with output.onExisting: Overwrite",
    )


def copy_coordinates(
    spec: InfluenceJobSpec, record: dict[str, Any] | None, store: Store, guard: Callable[[], None]
) -> tuple[str, ...]:
    """Copies what the earlier job noted of its examples, `test_<name>` or `train_<name>`; the names.

    `guard` is called before each chunk, of which there may be thousands: it ends the copy by raising.

    Raises:
        PermanentError: a byte of them was changed.
    """
    wanted = taken(spec)
    if wanted is None or record is None:
        return ()
    names = tuple(name for name in record.get("annotations", []) if name.startswith(f"{wanted.side}_"))
    with _open(spec, wanted) as source:
        for name in names:
            arrays.copy_array(source, store, name, guard)
    return names


def refuse_other(spec: InfluenceJobSpec, record: dict[str, Any] | None, fingerprint: dict[str, Any]) -> None:
    """Refuses what another model or method left: its scores would mean nothing.

    Raises:
        PermanentError: STORE_MISMATCH, with every difference.
    """
    wanted = taken(spec)
    if wanted is None or record is None:
        return
    stored = {name: record["fingerprint"].get(name) for name in wanted.shared}
    found = all_differences(stored, {name: fingerprint.get(name) for name in wanted.shared})
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise PermanentError(
            Reason.STORE_MISMATCH,
            f"{wanted.field}: {wanted.url} holds the {wanted.what} of another job:{lines}\nuse {wanted.what} "
            f"of this model and method: run {wanted.maker} with the same task and method",
        )


def refuse_other_rows(spec: InfluenceJobSpec, blocks: Mapping[str, int]) -> None:
    """Refuses rows that are not those of this job's blocks, name -> columns: such as factors that another
    operation left, which takes fewer columns.

    Raises:
        PermanentError: STORE_MISMATCH.
    """
    wanted = taken(spec)
    if wanted is None:
        return
    with _open(spec, wanted) as store:
        for number, (block, width) in enumerate(blocks.items()):
            rows_info(spec, store, wanted.array(number), block, width)
