"""The CRD: what a structural schema must be, that it says the same as the model, and its committed copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from influence_job.cli.main import execute
from influence_job.crd import custom_resource_definition
from influence_job.crd.immutability import OF_THE_OUTPUT, OF_THE_SPEC
from influence_job.crd.unions import merged
from influence_job.spec import InfluenceJobSpec, parse_spec
from influence_job.status import InfluenceJobStatus
from job_samples import VALID

COMMITTED = Path(__file__).parents[3] / "charts/influence-operator/files/crds/influencejobs.yaml"
Schema = dict[str, Any]

MUTABLE = {
    "output",  # field by field: OF_THE_OUTPUT
    "image",
    "workers",
    "driver",
    "scheduler",
    "podDefaults",
    "suspend",
    "backoffLimit",
    "activeDeadlineSeconds",
    "startupDeadlineSeconds",
    "progressDeadlineSeconds",
    "cleanupPolicy",
    "ttlSecondsAfterFinished",
    "managedBy",
}
MUTABLE_OF_THE_OUTPUT = {"allowMixedHardware", "storageOptions", "credentialsSecretRef"}


def version() -> dict[str, Any]:
    [only] = custom_resource_definition()["spec"]["versions"]
    return only


def job_schema() -> Schema:
    return version()["schema"]["openAPIV3Schema"]


def spec_schema() -> Schema:
    return job_schema()["properties"]["spec"]


def parts(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every schema inside a schema."""
    yield path, schema
    for name, below in schema.get("properties", {}).items():
        yield from parts(below, f"{path}.{name}")
    for word in ("items", "additionalProperties"):
        if word in schema:
            yield from parts(schema[word], f"{path}[]")


def rules_of(schema: Schema) -> list[dict[str, str]]:
    return schema.get("x-kubernetes-validations", [])


ALL = [(path, part) for path, part in parts(job_schema()) if path != ".metadata"]


def test_only_words_of_a_structural_schema_are_used() -> None:
    allowed = {
        *(
            "type",
            "description",
            "properties",
            "required",
            "items",
            "additionalProperties",
            "enum",
            "default",
        ),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern", "format", "nullable"),
        *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        *("x-kubernetes-validations", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string"),
        *("x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
    }
    assert {word for _, part in ALL for word in part} <= allowed
    for path, part in ALL:
        untyped = part.keys() & {"x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string"}
        assert "type" in part or untyped, path
        assert not ("properties" in part and "additionalProperties" in part), path
        assert isinstance(part.get("exclusiveMinimum", True), bool), path


def test_every_field_is_described() -> None:
    for path, part in ALL:
        for name, below in part.get("properties", {}).items():
            if (path, name) != ("", "metadata"):
                assert below.get("description", "").strip(), f"{path}.{name}"


def test_every_string_list_and_map_is_bounded() -> None:
    for path, part in ALL:
        match part.get("type"):
            case "string":
                assert part.keys() & {"maxLength", "enum"} or part.get("format") == "date-time", path
            case "array":
                assert "maxItems" in part, path
            case "object":
                assert "properties" in part or "maxProperties" in part, path
        if part.get("x-kubernetes-int-or-string"):
            assert "maxLength" in part, path


def filled(value: Any, schema: Schema) -> Any:
    """What the API server makes of a document: it drops nulls and adds defaults."""
    if isinstance(value, list):
        return [filled(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    named, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    made = {}
    for name, item in value.items():
        below = named.get(name, others)
        if item is not None or below.get("nullable") or not below:
            made[name] = filled(item, below)
    for name, below in named.items():
        if name not in made and "default" in below:
            made[name] = filled(copy.deepcopy(below["default"]), below)
    return made


@pytest.mark.parametrize("name", VALID)
def test_a_spec_that_was_filled_in_by_the_api_server_means_the_same(name: str) -> None:
    own = VALID[name]["spec"]
    assert parse_spec(filled(own, spec_schema())) == parse_spec(own)


def test_the_api_server_fills_in_what_the_model_would() -> None:
    spec = filled(VALID["shortest"]["spec"], spec_schema())
    assert spec["output"] == {
        "url": "gs://bucket/digits.zarr",
        "onExisting": "Resume",
        "dense": True,
        "topK": 100,
        "verify": "Sample",
        "maxBytes": "1Ti",
        "allowMixedHardware": False,
    }
    assert spec["workers"] == {"replicas": 1}
    assert (spec["backoffLimit"], spec["cleanupPolicy"], spec["mode"]) == (3, "Workers", "Up")


def test_a_method_gets_no_defaults_because_those_of_another_would_be_refused() -> None:
    assert filled({"name": "Ekfac"}, spec_schema()["properties"]["method"]) == {"name": "Ekfac"}


def test_the_valid_samples_set_every_field() -> None:
    def unset(schema: Schema, values: list[Any], path: str) -> Iterator[str]:
        for name, below in schema.get("properties", {}).items():
            found = [value[name] for value in values if isinstance(value, dict) and name in value]
            if not found:
                yield f"{path}.{name}"
            yield from unset(below, found, f"{path}.{name}")

    missing = set(unset(spec_schema(), [document["spec"] for document in VALID.values()], ""))
    # Three roles have the same settings as the fourth.
    assert {path for path in missing if path.split(".")[1] not in ("scheduler", "podDefaults")} == set()


def test_every_field_of_the_spec_is_either_immutable_or_known_to_change() -> None:
    assert set(spec_schema()["properties"]) == set(OF_THE_SPEC) | MUTABLE
    assert set(spec_schema()["properties"]["output"]["properties"]) == (
        set(OF_THE_OUTPUT) | MUTABLE_OF_THE_OUTPUT
    )


def test_an_immutable_field_can_neither_be_added_nor_removed_and_the_message_says_what_to_do() -> None:
    output = spec_schema()["properties"]["output"]
    for schema, fields in ((spec_schema(), OF_THE_SPEC), (output, OF_THE_OUTPUT)):
        for field in fields:
            [rule] = [r for r in rules_of(schema) if r["fieldPath"] == f".{field}" and "oldSelf" in r["rule"]]
            if field not in schema["required"]:
                assert f"has(self.{field}) == has(oldSelf.{field})" in rule["rule"]
            assert rule["message"].startswith("immutable")
            assert "delete the job and create it again" in rule["message"]
            assert rule["reason"] == "FieldValueForbidden"


def test_a_union_is_one_object_whose_rules_tell_what_belongs_to_which_name() -> None:
    method = spec_schema()["properties"]["method"]
    assert method["required"] == ["name"]
    assert method["properties"]["name"]["enum"] == [
        *("Arnoldi", "Cg", "Direct", "Ekfac", "GradDot", "InverseHarmonicMean", "Lissa", "Logra"),
        *("NystroemSketch", "TracIn", "Trak"),
    ]
    of = {rule["fieldPath"]: rule for rule in rules_of(method) if rule["message"].startswith("only for name")}
    assert of[".rtol"]["rule"] == "!has(self.rtol) || self.name in ['Cg', 'Lissa']"
    solvers = "Arnoldi | Cg | Direct | GradDot | InverseHarmonicMean | Lissa | NystroemSketch"
    assert of[".blocks"]["message"] == f"only for name: {solvers}; remove it or change name"
    assert of[".regularization"]["message"] == (
        "only for name: Arnoldi | Cg | Direct | Ekfac | InverseHarmonicMean | Lissa | Logra | "
        "NystroemSketch | Trak; remove it or change name"
    )
    conditioner = method["properties"]["preconditioner"]
    assert conditioner["required"] == ["name"]
    assert {
        "rule": "self.name != 'Nystroem' || has(self.rank)",
        "message": "required for name: Nystroem",
        "reason": "FieldValueRequired",
        "fieldPath": ".rank",
    } in rules_of(conditioner)


def test_an_output_is_not_the_store_that_is_read() -> None:
    found = {rule["rule"] for rule in rules_of(spec_schema()) if rule["fieldPath"] == ".output.url"}
    assert found == {
        f"!has(self.{field}) || self.{field}.url != self.output.url" for field in ("factors", "gradients")
    }


def test_members_of_a_union_whose_fields_differ_in_kind_are_refused() -> None:
    def member(kind: str) -> Schema:
        field = {"type": kind, "description": "x"}
        return {"properties": {"name": {}, "size": field}, "required": ["name"]}

    with pytest.raises(ValueError, match=r"members of a union differ in size: \['type'\]"):
        merged("name", {"A": member("string"), "B": member("integer")}, "x")


def test_a_new_job_is_not_taken_for_a_carried_out_one() -> None:
    status = job_schema()["properties"]["status"]
    assert status["default"] == {"observedGeneration": -1}
    assert InfluenceJobStatus.model_validate(status["default"]) == InfluenceJobStatus()
    assert not [path for path, part in parts(status) if path and "default" in part]


def test_columns_and_subresources_are_those_that_people_expect() -> None:
    columns = version()["additionalPrinterColumns"]
    shown = [column["name"] for column in columns if not column["priority"]]
    assert shown == ["Phase", "Stage", "Progress", "ETA", "Workers", "Age"]
    assert [column["name"] for column in columns if column["priority"]] == ["Reason", "Output"]
    assert version()["subresources"]["scale"]["specReplicasPath"] == ".spec.workers.replicas"
    names = custom_resource_definition()["spec"]["names"]
    assert (names["shortNames"], names["categories"]) == (["ij"], ["influence"])


def test_every_path_of_a_column_or_a_subresource_exists_in_the_schema() -> None:
    scale = [path for name, path in version()["subresources"]["scale"].items() if name.endswith("Path")]
    columns = [column["jsonPath"].split("[")[0] for column in version()["additionalPrinterColumns"]]
    known = {path for path, _ in parts(job_schema())} | {".metadata.creationTimestamp"}
    assert {*scale, *columns} <= known


def test_every_field_that_a_rule_names_exists() -> None:
    for path, part in ALL:
        for rule in rules_of(part):
            below = part
            for step in rule.get("fieldPath", "").split(".")[1:]:
                assert step in below["properties"], (path, rule)
                below = below["properties"][step]
            assert len(rule["message"]) < 2048


def test_the_generator_knows_every_field_of_the_model() -> None:
    aliases = {field.alias for field in InfluenceJobSpec.model_fields.values()}
    assert set(spec_schema()["properties"]) == aliases


def test_the_committed_manifest_is_what_influence_crd_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["crd"]) == 0
    printed = capsys.readouterr().out
    assert COMMITTED.read_text("utf-8") == printed, "run `make manifests`"
    assert yaml.safe_load(printed) == custom_resource_definition()
    assert "&id" not in printed
    assert len(printed) < 262_144, "client-side apply keeps a copy in an annotation of this size at most"
