"""The spec of a stored job, or why it is none: what the API server's rules let through is refused here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from influence_job.spec import API_VERSION, KIND, InfluenceJob, InfluenceJobSpec
from influence_operator.decisions import observed, words
from influence_operator.decisions.snapshot import Object
from influence_operator.manifests.frozen_pod_spec import refused_settings

MOST_PROBLEMS = 5
US = "influence-operator.dev/influence-operator"
"""What `managedBy` may say without handing the job to somebody else."""


class InvalidSpecError(ValueError):
    """The spec cannot be read; the message names the fields."""


def spec_of(job: Object) -> InfluenceJobSpec:
    """The parsed spec.

    Raises:
        InvalidSpecError: naming each field, what was expected and what came.
    """
    document = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        # Labels and annotations are anybody's: what tools write there may be longer than ours.
        "metadata": {"name": observed.name(job)},
        "spec": observed.look(job, "spec"),
    }
    try:
        spec = InfluenceJob.model_validate(document, by_alias=True, by_name=False).spec
    except ValidationError as error:
        problems = list(_problems(error, document))
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise InvalidSpecError(words.sentence("; ".join(problems[:MOST_PROBLEMS])) + more) from error
    if refused := refused_settings(spec):
        raise InvalidSpecError(words.sentence("; ".join(refused)))
    return spec


def managed_elsewhere(job: Object) -> bool:
    """Whether `managedBy` names another controller."""
    return observed.text(job, "spec", "managedBy") not in ("", US)


def _problems(error: ValidationError, document: Mapping[str, Any]) -> Iterator[str]:
    for details in error.errors(include_url=False):
        path = _path(details["loc"], document, absent=details["type"] == "missing")
        rule = details.get("ctx", {}).get("field", "") if details["type"] == "rule" else ""
        path += rule.split(".") if rule else []
        got = details["input"]
        shown = f", got {got!r}"[:80] if isinstance(got, str | int | float | None) else ""
        yield f"{'.'.join(path)}: {details['msg']}{shown}"


def _path(location: tuple[str | int, ...], document: Any, absent: bool) -> list[str]:
    """The place in the manifest, from pydantic's, which also names members of unions."""
    path, value = [], document
    for index, step in enumerate(location):
        member = isinstance(value, Mapping) and step in value
        entry = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if member or entry:
            value = value[step]
        elif not (absent and index == len(location) - 1):
            continue
        path.append(str(step))
    return path
