"""A pydantic model's JSON schema as the API server takes it: a structural OpenAPI schema.

References are inlined, unions of models become one object (`influence_job.crd.unions`), "or null" becomes
optional, and the keys of maps are bounded by rules, for which OpenAPI has no word. Unknown fields need no
mention: the API server refuses or drops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from influence_job.crd.unions import merged
from influence_job.spec.rules import KEY as RULES
from influence_job.spec.rules import rule

Schema = dict[str, Any]

# `title` repeats a field's name; the others are said otherwise below.
_LEFT_OUT = ("title", "$defs", "discriminator", "propertyNames", "patternProperties")


def structural_schema(model: type[BaseModel], *, defaults: bool = True) -> Schema:
    """The schema of a model's documents; `defaults` says whether the API server fills them in."""
    schema = model.model_json_schema(by_alias=True)
    return _Converter(schema.get("$defs", {}), defaults).convert(schema)


class _Converter:
    """Converts the parts of one model's schema."""

    def __init__(self, definitions: Mapping[str, Schema], defaults: bool) -> None:
        self._definitions = definitions
        self._defaults = defaults

    def convert(self, schema: Schema) -> Schema:
        """A part, with everything that it refers to in its place."""
        schema = self._inlined(schema)
        if "oneOf" in schema:
            return self._union(schema)
        made = {name: value for name, value in schema.items() if name not in _LEFT_OUT}
        if "const" in made:
            made["enum"] = [made.pop("const")]
        _exclusive_bounds(made)
        if "properties" in made:
            made["properties"] = {name: self.convert(below) for name, below in schema["properties"].items()}
            made.pop("additionalProperties", None)
        elif schema.get("type") == "object":
            self._map(schema, made)
        if "items" in made:
            made["items"] = self.convert(schema["items"])
        if made.get("default", self) is None or not self._defaults:
            made.pop("default", None)
        return made

    def _inlined(self, schema: Schema) -> Schema:
        """The schema without a reference or an "or null" on top; its own words before the referred ones."""
        if "anyOf" in schema:
            [part] = [part for part in schema["anyOf"] if part != {"type": "null"}]
            own = {name: value for name, value in schema.items() if name != "anyOf"}
            return self._inlined({**part, **own})
        if "$ref" in schema:
            referred = self._definitions[schema["$ref"].removeprefix("#/$defs/")]
            own = {name: value for name, value in schema.items() if name != "$ref"}
            return self._inlined({**referred, **own})
        return schema

    def _union(self, schema: Schema) -> Schema:
        """A union that a field decides, as one object with the fields of all members."""
        decided_by: str = schema["discriminator"]["propertyName"]
        members = {
            name: self._without_defaults(self._definitions[reference.removeprefix("#/$defs/")])
            for name, reference in schema["discriminator"]["mapping"].items()
        }
        return merged(decided_by, members, schema["description"])

    def _without_defaults(self, schema: Schema) -> Schema:
        # The API server would fill a default into every member of the union, where most refuse the field.
        return _Converter(self._definitions, defaults=False).convert(schema)

    def _map(self, schema: Schema, made: Schema) -> None:
        """Values of a map, and the length of its keys."""
        if "x-kubernetes-preserve-unknown-fields" in made:
            return
        patterns = schema.get("patternProperties", {})
        [values] = patterns.values() or [schema["additionalProperties"]]
        made["additionalProperties"] = self.convert(values)
        if not made["additionalProperties"].keys() & {"type", "x-kubernetes-int-or-string"}:
            return  # CEL has no type for such a map
        shortest, longest = schema["propertyNames"].get("minLength", 0), schema["propertyNames"]["maxLength"]
        made.setdefault(RULES, []).append(
            rule(
                f"self.all(key, size(key) >= {shortest} && size(key) <= {longest})",
                f"expected keys of {shortest} to {longest} characters",
            )
        )


def _exclusive_bounds(schema: Schema) -> None:
    """OpenAPI 3.0 says `exclusiveMinimum: true` beside `minimum`, where JSON schema says the number."""
    for bound in ("minimum", "maximum"):
        exclusive = f"exclusive{bound.capitalize()}"
        if exclusive in schema:
            schema[bound], schema[exclusive] = schema[exclusive], True
