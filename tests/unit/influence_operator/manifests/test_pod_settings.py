"""`podDefaults` and a role's own settings; what a user may not change."""

from __future__ import annotations

from typing import Any

from attempts import build, containers, job, pod_metadata, pod_specs, variables
from influence_operator.manifests import names


def merged(field: str, default: Any, own: Any) -> dict[str, Any]:
    """Role -> the pod spec's field, where `podDefaults` has one value and workers have another."""
    made = build(job(podDefaults={field: default}, workers={field: own}))
    return {role: spec.get(field) for role, spec in pod_specs(made).items()}


def test_an_own_value_wins_over_pod_defaults() -> None:
    found = merged("priorityClassName", "low", "high")
    assert found == {"driver": "low", "scheduler": "low", "worker": "high"}


def test_maps_merge_by_key() -> None:
    found = merged("nodeSelector", {"pool": "a", "zone": "a"}, {"zone": "b", "gpu": "l4"})
    assert found["driver"] == {"pool": "a", "zone": "a"}
    assert found["worker"] == {"pool": "a", "zone": "b", "gpu": "l4"}


def test_volumes_merge_by_name() -> None:
    found = merged(
        "volumes",
        [{"name": "data", "emptyDir": {}}, {"name": "models", "emptyDir": {}}],
        [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
    )
    volumes = {volume["name"]: volume for volume in found["worker"]}
    assert volumes["data"] == {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
    assert "models" in volumes
    assert len(volumes) == len(found["worker"])


def test_environment_variables_merge_by_name() -> None:
    made = build(
        job(
            podDefaults={"env": [{"name": "LEVEL", "value": "info"}, {"name": "MODE", "value": "a"}]},
            workers={"env": [{"name": "LEVEL", "value": "debug"}]},
        )
    )
    values = {role: variables(container) for role, container in containers(made).items()}
    assert (values["worker"]["LEVEL"], values["worker"]["MODE"]) == ("debug", "a")
    assert values["driver"]["LEVEL"] == "info"


def test_tolerations_add_up_below_ours() -> None:
    found = merged("tolerations", [{"key": "a"}], [{"key": "b"}])
    keys = [item["key"] for item in found["worker"]]
    assert keys == ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable", "a", "b"]


def test_pods_of_a_lost_node_are_given_up_after_thirty_seconds() -> None:
    for spec in pod_specs(build(job())).values():
        assert [(t["effect"], t["tolerationSeconds"]) for t in spec["tolerations"]] == [("NoExecute", 30)] * 2


def test_more_settings_than_one_list_may_hold_are_merged_all_the_same() -> None:
    def some(prefix: str) -> list[dict[str, str]]:
        return [{"name": f"{prefix}{index}", "value": ""} for index in range(64)]

    made = build(job(podDefaults={"env": some("A")}, workers={"env": some("B")}))
    assert {f"A{i}" for i in range(64)} < variables(containers(made)["worker"]).keys()


def test_labels_and_annotations_reach_the_pods_but_never_replace_ours() -> None:
    given = {"team": "attribution", names.JOB_UID: "another", names.ROLE: "driver"}
    evict = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "true", "note": "x"}
    made = build(job(podDefaults={"labels": given, "annotations": evict}))
    for role, metadata in pod_metadata(made).items():
        assert metadata["labels"]["team"] == "attribution"
        assert metadata["labels"][names.JOB_UID] == job()["metadata"]["uid"]
        assert metadata["labels"][names.ROLE] == role
        assert metadata["annotations"]["note"] == "x"
    metadata = pod_metadata(made)
    for role in ("driver", "scheduler"):
        assert metadata[role]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


def test_items_without_a_usable_name_are_left_to_the_api_server() -> None:
    for odd in (
        {},
        {"name": ["a", {}], "mountPath": {"b": 1}, "topologyKey": []},
        {"name": None},
        {"name": 5},
    ):
        fields = {"env": [odd], "volumes": [odd], "volumeMounts": [odd], "topologySpreadConstraints": [odd]}
        made = build(job(podDefaults=fields, workers=fields))
        spec = pod_specs(made)["worker"]
        assert odd in spec["containers"][0]["env"]
        assert odd in spec["containers"][0]["volumeMounts"]
        assert odd in spec["volumes"]


def test_an_image_and_its_pull_policy_are_those_of_all_three_roles() -> None:
    made = build(job(image="example/mine:1", podDefaults={"imagePullPolicy": "Never"}))
    for container in containers(made).values():
        assert (container["image"], container["imagePullPolicy"]) == ("example/mine:1", "Never")
    for container in containers(build(job())).values():
        assert container["image"] == "registry.example/influence-worker:0.1.0"
