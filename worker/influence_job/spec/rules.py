"""Rules between fields as the API server checks them: CEL expressions that travel with a model's schema.

A model states here what its validators state in Python, so that `kubectl apply` refuses what the driver would
refuse. `influence_job.crd` copies them into the CRD.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic.config import JsonDict

KEY = "x-kubernetes-validations"

POSITIVE_REGULARIZATION = "!has(self.regularization) || self.regularization > 0.0"
"""Of a method, which may leave it out."""


class Refusal(StrEnum):
    """How the API server introduces the message."""

    INVALID = "FieldValueInvalid"
    FORBIDDEN = "FieldValueForbidden"
    REQUIRED = "FieldValueRequired"


def rule(expression: str, message: str, field: str = "", refusal: Refusal = Refusal.INVALID) -> JsonDict:
    """One rule: `expression` holds, or `message` is told of `field`, which stands below `self`."""
    made: JsonDict = {"rule": expression, "message": message, "reason": refusal.value}
    return made | {"fieldPath": f".{field}"} if field else made


def rules(*given: JsonDict) -> JsonDict:
    """For `json_schema_extra`."""
    return {KEY: list(given)}
