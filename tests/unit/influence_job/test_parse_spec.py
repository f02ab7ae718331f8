"""A wrong spec, told in one message: what the operator puts into a condition."""

from __future__ import annotations

from typing import Any

import pytest

from influence_job.spec import InvalidSpecError, parse_spec
from job_samples import CHANGES, VALID, broken_rules

SHORTEST: dict[str, Any] = VALID["shortest"]["spec"]


def said_against(raw: Any) -> str:
    with pytest.raises(InvalidSpecError) as caught:
        parse_spec(raw)
    return str(caught.value)


def token_for(audience: str) -> dict[str, Any]:
    """A volume with a ServiceAccount's token."""
    return {"projected": {"sources": [{"serviceAccountToken": {"audience": audience}}]}}


def test_a_right_spec_is_returned() -> None:
    assert parse_spec(SHORTEST).output.url == "gs://bucket/digits.zarr"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "CUDA"}, 'spec.device: expected cuda | cpu, got "CUDA"; did you mean cuda?'),
        ({"backOffLimit": 3}, "spec.backOffLimit: unknown field; did you mean backoffLimit?"),
        ({"topK": 3}, "spec.topK: unknown field; it belongs under output"),
        (
            {"method": {"name": "GradDot", "regularization": 1}},
            "spec.method.regularization: unknown field; GradDot has none; remove it",
        ),
        (
            {"workers": {"tolerations": ["x"]}},
            'spec.workers.tolerations[0]: expected a mapping, got "x"',
        ),
        (
            {"method": {"name": "Cg", "regularization": 1, "preconditioner": {"name": "Nystroem"}}},
            "spec.method.preconditioner.rank: required, but absent (Rank of the approximation)",
        ),
        (
            {"task": {"entrypoint": "a:b", "arguments": {"seeds": [{"first": None}]}}},
            "spec.task.arguments.seeds[0].first: expected a value, got nothing, which kubectl apply drops: "
            "leave it out, and let the code that reads it default to None",
        ),
        (
            {"workers": {"volumes": [{"projected": {"sources": [{"serviceAccountToken": {}}]}}]}},
            "spec.workers.volumes[0].projected.sources[0].serviceAccountToken.audience: expected an "
            "audience: without one it is the API server's, and no pod of a job holds such",
        ),
        (
            {"driver": {"volumes": [token_for("https://kubernetes.default.svc")]}},
            "spec.driver.volumes[0].projected.sources[0].serviceAccountToken.audience: expected the audience "
            "of whom the token is for, got 'https://kubernetes.default.svc', which is the API server's: no "
            "pod of a job holds such a token",
        ),
        (
            {"podDefaults": {"labels": {"team": "a b"}}},
            'spec.podDefaults.labels.team: wrong form, got "a b"; it must match '
            "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$",
        ),
    ],
)
def test_a_problem_names_the_field_what_came_and_the_cure(change: dict[str, Any], message: str) -> None:
    assert said_against({**SHORTEST, **change}) == message


@pytest.mark.parametrize(
    "audience",
    [
        "https://kubernetes.default.svc",
        "https://kubernetes.default.svc.cluster.local",
        "https://Kubernetes.default.svc:443/",
        "kubernetes.default.svc",
        "kubernetes.default",
    ],
)
def test_no_volume_holds_a_token_with_a_name_of_the_api_server(audience: str) -> None:
    assert "which is the API server's" in said_against(
        {**SHORTEST, "workers": {"volumes": [token_for(audience)]}}
    )


@pytest.mark.parametrize(
    "audience", ["https://bucket", "https://bucket/kubernetes.default.svc", "sts.example"]
)
def test_a_volume_may_hold_a_token_for_somebody_else(audience: str) -> None:
    assert parse_spec({**SHORTEST, "workers": {"volumes": [token_for(audience)]}}).workers.volumes


def test_snake_case_is_unknown_as_it_is_to_the_api_server() -> None:
    said = said_against({**SHORTEST, "backoff_limit": 3})
    assert said == "spec.backoff_limit: unknown field; did you mean backoffLimit?"


@pytest.mark.parametrize("raw", [None, [], "text", 7, True])
def test_what_is_no_mapping_is_told_so(raw: Any) -> None:
    assert said_against(raw).startswith("spec: expected a mapping, got ")


def test_many_long_problems_make_a_message_that_fits_into_an_event() -> None:
    said = said_against({"x" * 5000 + str(index): "y" * 5000 for index in range(50)})
    assert len(said) < 1024
    assert said.endswith("; and 48 more")  # of 50 unknown fields and 3 missing ones


@pytest.mark.parametrize("case", list(broken_rules()), ids=lambda case: case.what)
def test_every_rule_between_fields_is_the_models_too(case: Any) -> None:
    said = said_against(case.document["spec"])
    assert str(case.path[-1]) in said


def test_the_changes_that_immutability_is_tested_with_are_right_in_themselves() -> None:
    def with_change(field: str, value: Any) -> dict[str, Any]:
        above, _, last = field.rpartition(".")
        return {**SHORTEST, above: {**SHORTEST[above], last: value}} if above else {**SHORTEST, last: value}

    for field, values in CHANGES.items():
        for value in values:
            parse_spec(with_change(field, value))
