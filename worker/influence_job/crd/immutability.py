"""What may not change once a job exists: everything that determines the stored numbers.

Rules on the object above a field, because a rule on an optional field itself is not asked when the field is
added or removed.
"""

from __future__ import annotations

from typing import Any

from influence_job.spec.rules import KEY as RULES
from influence_job.spec.rules import Refusal, rule

Schema = dict[str, Any]

OF_THE_SPEC = (
    "task",
    "operation",
    "mode",
    "method",
    "device",
    "precision",
    "factorDtype",
    "chunks",
    "factors",
    "gradients",
)
OF_THE_OUTPUT = ("url", "onExisting", "dense", "topK", "verify", "maxBytes")
"""Not what says how the store is reached, and on what it may be resumed."""


def add_immutability(spec: Schema) -> None:
    """Adds the rules to a spec's schema."""
    _add(
        spec,
        OF_THE_SPEC,
        "immutable, because the stored result depends on it: delete the job and create it again, or create "
        "another one under another name and with another output.url",
    )
    _add(
        spec["properties"]["output"],
        OF_THE_OUTPUT,
        "immutable: delete the job and create it again (the stored result stays), or create another one "
        "under another name",
    )


def _add(schema: Schema, fields: tuple[str, ...], message: str) -> None:
    required = schema["required"]
    for field in fields:
        same = f"self.{field} == oldSelf.{field}"
        if field not in required:
            same = f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || {same})"
        schema["properties"][field]  # a name that the model does not know is a mistake here
        schema.setdefault(RULES, []).append(rule(same, message, field, Refusal.FORBIDDEN))
