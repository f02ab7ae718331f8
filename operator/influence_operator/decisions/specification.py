"""The spec of a stored job, or why it is none: what the API server's rules let through is refused here."""

from __future__ import annotations

from collections.abc import Collection

from influence_job.spec import InfluenceJobSpec, InvalidSpecError, parse_spec
from influence_operator.decisions import observed, words
from influence_operator.decisions.certain_refusals import refused_pods
from influence_operator.decisions.snapshot import Object
from influence_operator.decisions.token_audiences import refused_tokens
from influence_operator.manifests.frozen_pod_spec import refused_settings

US = "influence-operator.dev/influence-operator"
"""What `managedBy` may say without handing the job to somebody else."""


class RefusedSpecError(ValueError):
    """The spec cannot be carried out; the message names the fields."""


def spec_of(job: Object, audiences: Collection[str]) -> InfluenceJobSpec:
    """The parsed spec.

    Args:
        job: the InfluenceJob as stored.
        audiences: those that the API server accepts of tokens; no pod of a job holds such a token.

    Raises:
        RefusedSpecError: naming each field, what was expected and what came.
    """
    try:
        spec = parse_spec(observed.look(job, "spec"))
    except InvalidSpecError as error:
        raise RefusedSpecError(words.sentence(str(error))) from error
    if refused := (
        *refused_settings(spec),
        *refused_tokens(spec, audiences),
        *refused_pods(job, spec),
    ):
        raise RefusedSpecError(words.sentence("; ".join(refused)))
    return spec


def managed_elsewhere(job: Object) -> bool:
    """Whether `managedBy` names another controller."""
    return observed.text(job, "spec", "managedBy") not in ("", US)
