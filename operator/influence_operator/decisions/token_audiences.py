"""Tokens that a job's pods may not hold: those that this cluster's API server accepts.

What every API server accepts by default the spec itself refuses; what this one accepts besides, the operator
reads off its own token (`influence_operator.cluster.audiences`). A token in a Secret cannot be seen here.
"""

from __future__ import annotations

from collections.abc import Collection

from influence_job.spec import InfluenceJobSpec, api_audience, projected_tokens


def refused_tokens(spec: InfluenceJobSpec, audiences: Collection[str]) -> tuple[str, ...]:
    """What a user must change before pods can be made; empty for most jobs.

    Args:
        spec: the job's.
        audiences: those that the API server accepts.
    """
    settings = {
        "podDefaults": spec.pod_defaults,
        "driver": spec.driver,
        "scheduler": spec.scheduler,
        "workers": spec.workers,
    }
    return tuple(
        f"spec.{name}.volumes{_indexed(path)}: {api_audience(token['audience'])}"
        for name, pod in settings.items()
        for path, token in projected_tokens(pod.volumes)
        if token.get("audience") in audiences
    )


def _indexed(path: str) -> str:
    """`0.projected.sources.1.x` as a document spells it: `[0].projected.sources[1].x`."""
    return "".join(f"[{step}]" if step.isdigit() else f".{step}" for step in path.split("."))
