"""The CRD on a real API server: what it accepts, what it refuses and with which words, what kubectl shows.

No operator is needed; one that runs leaves these jobs alone, because `managedBy` names somebody else.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiException

import refusals
from cluster import CHECKOUT, Cluster, CommandError
from influence_job.crd import PLURAL, custom_resource_definition
from influence_job.spec import API_VERSION, parse_spec
from job_samples import CHANGES, VALID, Json, broken_rules, job, without_options
from refusals import GROUP, VERSION, create, own_refusal, refusal, spec_schema, wrong_manifests


@pytest.fixture
def chance() -> random.Random:
    return refusals.chance()


def unmanaged(document: dict[str, Json], name: str = "") -> dict[str, Json]:
    """The job under a name, kept from every operator."""
    made = copy.deepcopy(document)
    if name:
        made["metadata"]["name"] = name
    if isinstance(made["spec"], dict):
        made["spec"].setdefault("managedBy", "tests")
    return made


def test_the_api_server_finds_no_fault_with_the_definition(crd: Cluster) -> None:
    definition = crd.get("crd", custom_resource_definition()["metadata"]["name"])
    conditions = {c["type"]: c["status"] for c in definition["status"]["conditions"]}
    assert conditions["Established"] == "True"
    assert conditions["NamesAccepted"] == "True"
    assert "NonStructuralSchema" not in conditions
    stored = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert stored["properties"]["spec"] == spec_schema(), "nothing was dropped from the schema"


@pytest.mark.parametrize("name", VALID)
def test_a_stored_job_means_what_its_author_wrote(name: str, crd: Cluster, namespace: str) -> None:
    document = unmanaged(VALID[name])
    stored = create(crd, namespace, document)
    assert parse_spec(stored["spec"]) == parse_spec(document["spec"])
    assert stored["status"] == {"observedGeneration": -1}


def test_jobs_with_fewer_fields_are_accepted_and_mean_the_same(
    crd: Cluster, namespace: str, chance: random.Random
) -> None:
    tried = 0
    for round_ in range(200):
        document = without_options(VALID[list(VALID)[round_ % len(VALID)]], chance)
        if own_refusal(document) is None:
            tried += 1
            stored = create(crd, namespace, document, dry=True)
            assert parse_spec(stored["spec"]) == parse_spec(document["spec"]), document
    assert tried > 20


def examples() -> Iterator[Any]:
    for path in sorted((CHECKOUT / "examples").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text("utf-8")):
            if document and document.get("kind") == "InfluenceJob":
                yield pytest.param(document, id=str(path.relative_to(CHECKOUT)))


@pytest.mark.parametrize("document", list(examples()))
def test_our_examples_are_accepted(document: dict[str, Json], crd: Cluster, namespace: str) -> None:
    assert refusal(crd, namespace, document) is None


def test_whatever_the_api_server_refuses_a_laptop_refuses_too(
    crd: Cluster, namespace: str, chance: random.Random
) -> None:
    for case in [*broken_rules(), *chance.sample(wrong_manifests(), 150)]:
        said = refusal(crd, namespace, case.document)
        assert said is None or own_refusal(case.document), f"only the API server says: {case.what}: {said}"


@pytest.mark.parametrize(
    "name",
    ["two.parts", "1st", "x" * 41, "Capital", "-dash", "dash-", "under_score", "ü", "a\x00", "a/b", ""],
)
def test_a_name_that_children_cannot_carry_on_is_refused(name: str, crd: Cluster, namespace: str) -> None:
    said = refusal(crd, namespace, unmanaged(VALID["shortest"], name) if name else _without_name())
    assert said is not None
    assert "name" in said


def test_the_longest_name_is_accepted(crd: Cluster, namespace: str) -> None:
    assert refusal(crd, namespace, unmanaged(VALID["shortest"], "x" * 40)) is None


def _without_name() -> dict[str, Json]:
    made = unmanaged(VALID["shortest"])
    made["metadata"] = {}
    return made


def changed(document: dict[str, Json], field: str, value: Json) -> dict[str, Json]:
    made = copy.deepcopy(document)
    *above, last = field.split(".")
    place = made["spec"]
    for step in above:
        place = place[step]
    place[last] = value
    return made


def replace(crd: Cluster, namespace: str, document: dict[str, Json]) -> Json:
    return crd.objects.replace_namespaced_custom_object(
        GROUP, VERSION, namespace, PLURAL, document["metadata"]["name"], document
    )


def said_against(crd: Cluster, namespace: str, document: dict[str, Json]) -> str:
    with pytest.raises(ApiException) as caught:
        replace(crd, namespace, document)
    assert caught.value.status == 422, caught.value
    return str(json.loads(caught.value.body)["message"])


@pytest.mark.parametrize("field", CHANGES)
def test_what_determines_the_result_is_immutable(field: str, crd: Cluster, namespace: str) -> None:
    for name in ("shortest", "ekfac"):
        stored = create(crd, namespace, unmanaged(VALID[name], name))
        for value in CHANGES[field]:
            wanted = changed(stored, field, value)
            if wanted == stored:
                continue
            said = said_against(crd, namespace, wanted)
            assert f"spec.{field}: Forbidden: immutable" in said
            assert "delete the job and create it again" in said


@pytest.mark.parametrize("field", ["device", "factorDtype", "chunks"])
def test_an_immutable_field_cannot_be_removed(field: str, crd: Cluster, namespace: str) -> None:
    stored = create(crd, namespace, unmanaged(VALID["ekfac"]))
    del stored["spec"][field]
    assert f"spec.{field}: Forbidden: immutable" in said_against(crd, namespace, stored)


def test_factors_are_immutable(crd: Cluster, namespace: str) -> None:
    stored = create(crd, namespace, unmanaged(VALID["jacobi"]))
    said = said_against(crd, namespace, changed(stored, "factors.url", "gs://bucket/other.zarr"))
    assert "spec.factors: Forbidden: immutable" in said
    stored["spec"]["operation"] = "Influences"
    del stored["spec"]["factors"]
    assert "spec.factors: Forbidden: immutable" in said_against(crd, namespace, stored)


def test_arguments_are_immutable_to_their_depth(crd: Cluster, namespace: str) -> None:
    stored = create(crd, namespace, unmanaged(VALID["ekfac"]))
    stored["spec"]["task"]["arguments"]["deep"]["list"][-1]["a"] = 0
    assert "spec.task: Forbidden: immutable" in said_against(crd, namespace, stored)


def test_everything_else_may_change(crd: Cluster, namespace: str) -> None:
    stored = create(crd, namespace, unmanaged(VALID["ekfac"]))
    spec = stored["spec"]
    spec["output"] |= {"allowMixedHardware": False, "storageOptions": {"project": "other"}}
    del spec["output"]["credentialsSecretRef"]
    spec |= {"image": "other/image:1", "suspend": False, "backoffLimit": 9, "cleanupPolicy": "All"}
    spec |= {"activeDeadlineSeconds": 1, "startupDeadlineSeconds": 1, "progressDeadlineSeconds": 1}
    spec |= {"ttlSecondsAfterFinished": 10, "managedBy": "others", "podDefaults": {"fsGroup": 1}}
    spec["workers"] = {"replicas": 1000}
    for role in ("driver", "scheduler"):
        spec[role] = {"env": [{"name": "A", "value": "b"}]}
    assert replace(crd, namespace, stored)["metadata"]["generation"] == 2


@pytest.mark.parametrize("name", VALID)
def test_applying_the_same_again_in_either_way_changes_nothing(
    name: str, crd: Cluster, namespace: str
) -> None:
    document = unmanaged(VALID[name])
    for way in ((), (), ("--server-side", "--force-conflicts"), ("--server-side",)):
        crd.kubectl("apply", *way, "-f", "-", "--namespace", namespace, stdin=json.dumps(document))
    stored = crd.get("influencejob", "sample", namespace)
    assert stored["metadata"]["generation"] == 1
    assert parse_spec(stored["spec"]) == parse_spec(document["spec"])


def status_of(crd: Cluster, namespace: str, name: str, status: dict[str, Json]) -> None:
    crd.objects.patch_namespaced_custom_object_status(
        GROUP, VERSION, namespace, PLURAL, name, {"status": status}
    )


def test_kubectl_shows_the_columns(crd: Cluster, namespace: str) -> None:
    create(crd, namespace, unmanaged(VALID["shortest"]))
    status_of(
        crd,
        namespace,
        "sample",
        {
            "observedGeneration": 1,
            "phase": "Running",
            "stage": "Scores",
            "progress": {"done": 37, "total": 112, "display": "37/112", "eta": "39s"},
            "workers": {"desired": 4, "ready": 4, "display": "4/4"},
            "conditions": [
                {
                    "type": kind,
                    "status": "True",
                    "reason": reason,
                    "message": "x",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
                for kind, reason in (("ClusterReady", "WorkersReady"), ("Ready", "Running"))
            ],
        },
    )
    heading, row = crd.kubectl("get", "ij", "--namespace", namespace).splitlines()
    assert heading.split() == ["NAME", "PHASE", "STAGE", "PROGRESS", "ETA", "WORKERS", "AGE"]
    assert row.split()[:6] == ["sample", "Running", "Scores", "37/112", "39s", "4/4"]
    heading, row = crd.kubectl("get", "influence", "--namespace", namespace, "--output", "wide").splitlines()
    assert heading.split()[-2:] == ["REASON", "OUTPUT"]
    assert row.split()[-2:] == ["Running", "gs://bucket/digits.zarr"]


def test_kubectl_explains_what_a_method_may_hold_and_when_changes_take_effect(crd: Cluster) -> None:
    explained = crd.kubectl("explain", "influencejob.spec.method")
    assert "How (H + λI)^-1 is applied" in explained
    assert "name\t<string> -required-" in explained
    assert "λ, added to the diagonal of H. No default" in " ".join(explained.split())
    assert "Keys the draws" in explained
    for field in ("image", "driver", "scheduler", "workers", "podDefaults"):
        told = " ".join(crd.kubectl("explain", f"influencejob.spec.{field}").split())
        assert "changes take effect with the next attempt" in told.lower(), field
    recursive = crd.kubectl("explain", "influencejob", "--recursive")
    for field in (
        "credentialsSecretRef",
        "preconditioner",
        "observedGeneration",
        "topologySpreadConstraints",
    ):
        assert field in recursive


def test_kubectl_scales_within_the_limits(crd: Cluster, namespace: str) -> None:
    create(crd, namespace, unmanaged(VALID["shortest"]))
    where = ("influencejob/sample", "--namespace", namespace)
    crd.kubectl("scale", *where, "--replicas=3", "--current-replicas=1")
    assert crd.get("influencejob", "sample", namespace)["spec"]["workers"]["replicas"] == 3
    for replicas in ("0", "1001"):
        with pytest.raises(CommandError, match=r"spec\.workers\.replicas"):
            crd.kubectl("scale", *where, f"--replicas={replicas}")
    status_of(crd, namespace, "sample", {"workers": {"ready": 2, "selector": "role=worker"}})
    scale = json.loads(
        crd.kubectl("get", "--raw", f"/apis/{API_VERSION}/namespaces/{namespace}/{PLURAL}/sample/scale")
    )
    assert scale["status"] == {"replicas": 2, "selector": "role=worker"}


def test_the_spec_cannot_be_changed_with_the_status_nor_the_status_with_the_spec(
    crd: Cluster, namespace: str
) -> None:
    create(crd, namespace, job({**VALID["shortest"]["spec"], "managedBy": "tests"}))
    crd.objects.patch_namespaced_custom_object_status(
        GROUP,
        VERSION,
        namespace,
        PLURAL,
        "sample",
        {"spec": {"suspend": True}, "status": {"phase": "Pending"}},
    )
    crd.objects.patch_namespaced_custom_object(
        GROUP, VERSION, namespace, PLURAL, "sample", {"status": {"phase": "Complete"}}
    )
    stored = crd.get("influencejob", "sample", namespace)
    assert (stored["spec"]["suspend"], stored["status"]["phase"]) == (False, "Pending")
    assert stored["metadata"]["generation"] == 1
