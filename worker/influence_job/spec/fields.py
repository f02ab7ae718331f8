"""The kinds of values that a spec is made of: what each may hold and how long it may be.

Every string, list and map is bounded, because the API server estimates the cost of the CRD's rules
from these bounds. Pydantic and the standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class SpecModel(BaseModel):
    """A frozen part of the spec: camelCase in documents, unknown fields refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=True,
        use_attribute_docstrings=False,
    )


Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]

# Written so that pydantic and the API server read them alike: ASCII, no look-around.
_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
_PREFIXED = rf"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{_NAME}$"

ShortString = Annotated[str, Field(min_length=1, max_length=253)]
ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""Name of a Kubernetes object."""
QualifiedName = Annotated[str, Field(min_length=1, max_length=317, pattern=_PREFIXED)]
"""Key of a label or an annotation, or name of a resource: `name` or `domain/name`."""
Labels = Annotated[
    dict[QualifiedName, Annotated[str, Field(max_length=63, pattern=rf"^({_NAME})?$")]], Field(max_length=64)
]
Annotations = Annotated[dict[QualifiedName, Annotated[str, Field(max_length=4096)]], Field(max_length=64)]


def _not_finite(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """Numbers that JSON lacks, each with its path."""
    if isinstance(value, float) and not math.isfinite(value):
        yield ".".join(path), value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _not_finite(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, (*path, str(index)))


def _in_json(value: Any) -> Any:
    for path, number in _not_finite(value):
        raise refuse(
            path,
            f"expected a finite number, got {number}, which JSON lacks and no cluster can hold; write it as "
            "text, and let the code that reads it make a number of it",
        )
    return value


InJson = AfterValidator(_in_json)
"""Pydantic's JsonValue takes NaN and infinity."""

OpenValue = Annotated[
    JsonValue, InJson, WithJsonSchema({"x-kubernetes-preserve-unknown-fields": True, "nullable": True})
]
"""Any JSON value. Nullable: else the API server drops nulls, where `WithoutNull` tells of them."""
OpenObject = Annotated[
    dict[Annotated[str, Field(max_length=253)], JsonValue],
    Field(max_length=64),
    InJson,
    WithJsonSchema({"type": "object", "maxProperties": 64, "x-kubernetes-preserve-unknown-fields": True}),
]
"""An object whose schema belongs to somebody else: Kubernetes, fsspec or the user's entry point."""
OpenObjects = Annotated[list[OpenObject], Field(max_length=64)]

_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_LONGEST_QUANTITY = 32
_QUANTITY = r"^([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([numkMGTPE]?|[KMGTPE]i|[eE][-+]?[0-9]{1,2})$"


class Quantity(str):
    """A Kubernetes quantity: `"16Gi"`, `"500m"`, `"1"`; a number in a document becomes its string."""

    __slots__ = ()

    def __new__(cls, text: str) -> Quantity:
        """Raises ValueError for what Kubernetes would not read as a quantity."""
        if len(text) > _LONGEST_QUANTITY or not re.fullmatch(_QUANTITY, text):
            raise ValueError(f"expected a quantity such as 16Gi, 500m or 1, got {text!r}")
        return super().__new__(cls, text)

    @property
    def value(self) -> Fraction:
        """The exact number."""
        match = re.fullmatch(_QUANTITY, self)
        assert match, self
        number, suffix = Fraction(match[1]), match[2]
        if suffix in _BINARY:
            return number * 2 ** _BINARY[suffix]
        exponent = int(suffix[1:]) if suffix[:1] in ("e", "E") and len(suffix) > 1 else _DECIMAL[suffix]
        return number * Fraction(10) ** exponent

    @property
    def bytes(self) -> int:
        """The number as whole bytes, rounded down."""
        return int(self.value)

    @classmethod
    def _parse(cls, given: Any) -> Quantity:
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise PydanticCustomError("quantity", "expected a quantity such as 16Gi, 500m or 1")
        try:
            return cls(str(given))
        except ValueError:
            raise PydanticCustomError("quantity", "expected a quantity such as 16Gi, 500m or 1") from None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._parse, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {
            "x-kubernetes-int-or-string": True,
            "minimum": 0,
            "maxLength": _LONGEST_QUANTITY,
            "pattern": _QUANTITY,
        }


Quantities = Annotated[dict[QualifiedName, Quantity], Field(max_length=32)]
"""Resource name -> quantity."""


def _nulls(value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of nulls that stand under a key, which is where `kubectl apply` drops them."""
    if isinstance(value, dict):
        for name, item in value.items():
            if item is None:
                yield ".".join((*path, name))
            yield from _nulls(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _nulls(item, (*path, str(index)))


def _without_null(value: dict[str, Any]) -> dict[str, Any]:
    for path in _nulls(value):
        raise refuse(
            path,
            "expected a value, got nothing, which kubectl apply drops: leave it out, and let the code that "
            "reads it default to None",
        )
    return value


WithoutNull = AfterValidator(_without_null)
"""So that a file means the same on a laptop and however it comes into a cluster."""


def refuse(field: str, message: str) -> PydanticCustomError:
    """The error of a rule between fields: `field` is the dotted camelCase path below the model."""
    return PydanticCustomError("rule", "{message}", {"message": message, "field": field})
