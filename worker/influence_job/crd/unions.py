"""A union of models as one object: the fields of all members, and rules that say which belong to which.

A structural schema has no unions. Only what every member requires is required by the schema itself; the rest
is told by rules, with the member's name in the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from influence_job.spec.rules import KEY as RULES
from influence_job.spec.rules import Refusal, rule

Schema = dict[str, Any]


def merged(decided_by: str, members: Mapping[str, Schema], description: str) -> Schema:
    """One object in whose field `decided_by` stands the name of one of `members`."""
    names = list(dict.fromkeys(name for member in members.values() for name in member["properties"]))
    names.sort(key=lambda name: name != decided_by)
    required = [name for name in names if all(name in m["required"] for m in members.values())]
    properties = {name: _field(name, members) for name in names if name != decided_by}
    deciding = {"type": "string", "enum": list(members), "description": " | ".join(members)}
    return {
        "type": "object",
        "description": description,
        "properties": {decided_by: deciding, **properties},
        "required": required,
        RULES: [
            *_belonging(decided_by, members, list(properties)),
            *_required(decided_by, members, required),
            *_own_rules(members),
        ],
    }


def _field(name: str, members: Mapping[str, Schema]) -> Schema:
    """One field, as loosely as the loosest of its members takes it."""
    having = {
        member: schema["properties"][name]
        for member, schema in members.items()
        if name in schema["properties"]
    }
    made = dict(next(iter(having.values())))
    for other in having.values():
        made = _looser(name, made, other)
    texts: dict[str, list[str]] = {}
    for member, schema in having.items():
        texts.setdefault(schema["description"], []).append(member)
    if len(having) == len(members) and len(texts) == 1:
        return made
    made["description"] = " ".join(f"{', '.join(of)}: {text}" for text, of in texts.items())
    return made


def _looser(name: str, one: Schema, other: Schema) -> Schema:
    """What both admit. Only an exclusive minimum may differ; a rule of the stricter member then states it."""
    apart = {key for key in {*one, *other} if one.get(key) != other.get(key)} - {"description"}
    if apart - {"exclusiveMinimum"}:
        raise ValueError(f"members of a union differ in {name}: {sorted(apart)}; only exclusiveMinimum may")
    return {key: value for key, value in one.items() if key not in apart}


def _belonging(decided_by: str, members: Mapping[str, Schema], fields: list[str]) -> list[Any]:
    made = []
    for field in fields:
        having = [member for member, schema in members.items() if field in schema["properties"]]
        if len(having) < len(members):
            message = f"only for {decided_by}: {' | '.join(having)}; remove it or change {decided_by}"
            listed = ", ".join(f"'{member}'" for member in having)
            made.append(
                rule(
                    f"!has(self.{field}) || self.{decided_by} in [{listed}]",
                    message,
                    field,
                    Refusal.FORBIDDEN,
                )
            )
    return made


def _required(decided_by: str, members: Mapping[str, Schema], by_all: list[str]) -> list[Any]:
    return [
        rule(
            f"self.{decided_by} != '{member}' || has(self.{field})",
            f"required for {decided_by}: {member}",
            field,
            Refusal.REQUIRED,
        )
        for member, schema in members.items()
        for field in schema["required"]
        if field not in by_all
    ]


def _own_rules(members: Mapping[str, Schema]) -> list[Any]:
    made: list[Any] = []
    for schema in members.values():
        made.extend(given for given in schema.get(RULES, []) if given not in made)
    return made
