"""What determines a job's numbers, as the nested document that stores are compared by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from influence_job import entrypoint
from influence_job.errors import PermanentError, Reason
from influence_job.numerics import NUMERICS_VERSION
from influence_job.spec import InfluenceJobSpec
from influence_job.storage.fingerprint import differences
from influence_job.worker.loading import Loaded

SOURCE_CURE = "use another output.url, or output.onExisting: Overwrite to throw away what is stored"


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
    return {**partial, "model": loaded.model_digest, "data": data}


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
    found = (differences(stored, given) if stored is not None else []) + more
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise PermanentError(
            Reason.STORE_MISMATCH, f"output.url: {url} holds the result of another job:{lines}\n{SOURCE_CURE}"
        )
