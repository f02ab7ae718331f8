"""What determines a job's numbers, as the nested document that stores are compared by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from influence_job import entrypoint
from influence_job.errors import PermanentError, Reason
from influence_job.numerics import NUMERICS_VERSION
from influence_job.spec import InfluenceJobSpec
from influence_job.storage.fingerprint import Fingerprint, differences
from influence_job.worker.loading import Loaded

SOURCE_CURE = "use another output.url, or output.onExisting: Overwrite to throw away what is stored"
UNTRACKED = "untracked"
"""The part that says which parameters are not differentiated; of one model that says which are."""
SHOWN_NAMES = 3
"""Names of parameters in a sentence: there may be thousands."""


def of_spec(
    spec: InfluenceJobSpec, factors: str | None = None, gradients: str | None = None
) -> dict[str, Any]:
    """The part that is known without the model; digests are of what is taken over from an earlier job."""
    return _known(
        {
            "numericsVersion": NUMERICS_VERSION,
            "operation": str(spec.operation),
            "mode": str(spec.mode),
            "method": spec.method.model_dump(mode="json", by_alias=True),
            "device": str(spec.resolved_device),
            "precision": str(spec.precision),
            "factorDtype": str(spec.factor_dtype),
            "task": {
                "entrypoint": spec.task.entrypoint,
                "arguments": spec.task.arguments,
                "source": entrypoint.source_digest(spec.task.entrypoint),
            },
            "factors": factors,
            "gradients": gradients,
        }
    )


def _known(value: Any) -> Any:
    """`value` with None as a word: to a fingerprint None is what is not known yet, and is not compared."""
    if isinstance(value, dict):
        return {name: _known(item) for name, item in value.items()}
    return "none" if value is None else value


def with_model(partial: dict[str, Any], loaded: Loaded) -> dict[str, Any]:
    """The whole of it, once a worker has loaded the model and the data."""
    data = _known({"train": loaded.train_identity, "test": loaded.test_identity})
    untracked = loaded.left_out[UNTRACKED]
    return {**partial, "model": loaded.model_digest, UNTRACKED: untracked, "data": data}


def all_differences(stored: Fingerprint, given: Fingerprint) -> list[str]:
    """One sentence for each part that differs; of tracked parameters by the names in which they do."""
    rest = ({name: part for name, part in of.items() if name != UNTRACKED} for of in (stored, given))
    return [*differences(*rest), *_untracked_differences(stored.get(UNTRACKED), given.get(UNTRACKED))]


def _untracked_differences(stored: list[str] | None, given: list[str] | None) -> Iterator[str]:
    if stored is None or given is None:
        return
    alone = {"the store": _without(stored, given), "this job": _without(given, stored)}
    told = [f"{who} alone leaves out {_counted(names)}" for who, names in alone.items() if names]
    if told:
        yield f"untracked parameters: {', '.join(told)}; InfluenceTask.parameters and requires_grad decide"


def _without(names: list[str], others: list[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _counted(names: list[str]) -> str:
    """How many, and the first of them."""
    shown = names if len(names) <= SHOWN_NAMES else [*names[:SHOWN_NAMES], "…"]
    return f"{len(names)} ({', '.join(shown)})"


def plan_differences(spec: InfluenceJobSpec, stored_plan: dict[str, Any] | None) -> list[str]:
    """What the job asks for and the stored plan, which stays as it is, cannot give."""
    if stored_plan is None:
        return []
    differing = [*_chunk_differences(spec, stored_plan), *_output_differences(spec, stored_plan)]
    return [
        f"{field}: the store was made with {kept}, this job says {asked}" for field, kept, asked in differing
    ]


def _chunk_differences(spec: InfluenceJobSpec, stored_plan: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Explicit chunks that differ; chunks that nobody gave are not compared."""
    for side in ("test", "train"):
        asked = getattr(spec.chunks, side, None)
        kept = stored_plan[f"{side}Chunk"]
        if asked is not None and asked != kept:
            yield f"chunks.{side}", kept, asked


def _output_differences(
    spec: InfluenceJobSpec, stored_plan: dict[str, Any]
) -> Iterator[tuple[str, str | int, str | int]]:
    """Scores that are not kept, and another number of the best; a dense matrix holds all that a job without
    one asks for.
    """
    if not spec.operation.has_scores:
        return
    if spec.output.dense and not stored_plan["dense"]:
        yield "output.dense", "false", "true"
    kept, asked = stored_plan["topK"], spec.output.top_k
    # No more can be kept than there are training examples.
    if min(kept, stored_plan["train"]) != min(asked, stored_plan["train"]):
        yield "output.topK", kept, asked


def refuse_differences(
    url: str, stored: dict[str, Any] | None, given: dict[str, Any], more: list[str]
) -> None:
    """Refuses to mix two jobs in one store.

    Raises:
        PermanentError: STORE_MISMATCH, with every difference.
    """
    found = (all_differences(stored, given) if stored is not None else []) + more
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise PermanentError(
            Reason.STORE_MISMATCH, f"output.url: {url} holds the result of another job:{lines}\n{SOURCE_CURE}"
        )
