"""What helm makes of the chart; nothing is installed. What needs no helm is in tests/unit/charts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml

from chart import CHART, DASK_OPERATOR, INSTALL, OPERATOR
from cluster import Cluster, CommandError, tool

Manifest = dict[str, Any]
OTHERS = {
    "watchNamespaces": ["one", "two"],
    "apiAudiences": ["one", "two"],
    "imagePullSecrets": [{"name": "changed"}],
    "tolerations": [{"key": "changed", "operator": "Exists"}],
    "daskOperator.extraEnv": [],
    "networkPolicy.singlePorts": [7443],
    "image.pullPolicy": "Always",
    "worker.image.pullPolicy": "Always",
    "log.format": "plain",
    "log.level": "debug",
    "metrics.namespace": "monitoring",
    **{f"{role}.{what}": "3" for role in ("driver", "scheduler", "worker") for what in ("cpu", "memory")},
}
"""Other values for those that not every value of their type may replace."""
WITHOUT_CREATING = {"serviceAccount.create": {"serviceAccount.name": "existing"}}
"""Values that another value needs."""


def leaves(values: Manifest, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


VALUES = dict(leaves(yaml.safe_load((CHART / "values.yaml").read_text())))


def changed(name: str, value: Any) -> Any:
    """Another value of the same type."""
    if name in OTHERS:
        return OTHERS[name]
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return f"{value}1"
        case dict():
            return {"changed": "yes"}
    raise AssertionError(f"{name}: no other value is known")


def template(cluster: Cluster, *options: str, release: str = OPERATOR) -> str:
    whole = (*options, "--namespace", "influence-system", "--kube-version", "1.35.0")
    return cluster.helm("template", release, str(CHART), *whole)


def rendered(cluster: Cluster, values: Manifest, release: str = OPERATOR) -> str:
    options = [f"--set-json={name}={json.dumps(value)}" for name, value in values.items()]
    return template(cluster, *options, release=release)


def manifests(cluster: Cluster, values: Manifest, release: str = OPERATOR) -> dict[tuple[str, str], Manifest]:
    """All that is installed, but for CRDs, by kind and name."""
    text = rendered(cluster, {"crds.influence": False, "crds.dask": False, **values}, release)
    loaded = yaml.load_all(text, Loader=yaml.CSafeLoader)
    return {(m["kind"], m["metadata"]["name"]): m for m in loaded if m}


def objects(cluster: Cluster, values: Manifest) -> list[tuple[str, str, str]]:
    """Kind, namespace and name of all that is installed."""
    loaded = yaml.load_all(rendered(cluster, values), Loader=yaml.CSafeLoader)
    named = [(m["kind"], m["metadata"]) for m in loaded if m]
    return sorted((kind, metadata.get("namespace", ""), metadata["name"]) for kind, metadata in named)


@cache
def by_default(cluster: Cluster) -> str:
    return rendered(cluster, {"crds.influence": False, "crds.dask": False})


def test_install_yaml_is_what_the_chart_makes_of_its_defaults(cluster: Cluster) -> None:
    spec = importlib.util.spec_from_file_location("manifests", CHART.parent / "manifests.py")
    assert spec is not None
    assert spec.loader is not None
    manifests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(manifests)
    assert INSTALL.read_text() == manifests.install(tool("helm")), "run `make manifests`"


def test_helm_finds_nothing_wrong_with_the_chart(cluster: Cluster) -> None:
    assert "0 chart(s) failed" in cluster.helm("lint", "--strict", str(CHART))


@pytest.mark.parametrize("name", VALUES)
def test_every_value_changes_something(cluster: Cluster, name: str) -> None:
    value = changed(name, VALUES[name])
    if name.startswith("crds."):
        assert len(rendered(cluster, {name: value})) < len(rendered(cluster, {}))
        return
    values = {"crds.influence": False, "crds.dask": False, name: value, **WITHOUT_CREATING.get(name, {})}
    assert rendered(cluster, values) != by_default(cluster)


def test_with_namespaces_to_watch_there_is_a_role_in_each_and_none_for_the_whole_cluster(
    cluster: Cluster,
) -> None:
    made = objects(cluster, {"watchNamespaces": ["one", "two"], "daskOperator.enabled": False})
    kinds = ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
    assert [found for found in made if found[0] in kinds] == [
        ("ClusterRole", "", "influence-operator-edit"),
        ("ClusterRole", "", "influence-operator-view"),
        ("Role", "influence-system", "influence-operator-leader"),
        ("Role", "one", "influence-operator"),
        ("Role", "two", "influence-operator"),
        ("RoleBinding", "influence-system", "influence-operator-leader"),
        ("RoleBinding", "one", "influence-operator"),
        ("RoleBinding", "two", "influence-operator"),
    ]


def test_without_the_dask_operator_nothing_is_named_after_it(cluster: Cluster) -> None:
    made = objects(cluster, {"daskOperator.enabled": False})
    assert [found for found in made if "dask" in found[2]] == []
    assert ("Deployment", "influence-system", "influence-operator") in made


def test_two_releases_in_one_namespace_contend_for_two_leases(cluster: Cluster) -> None:
    for release, name in (("influence-operator", "influence-operator"), ("own", "own-influence-operator")):
        made = manifests(cluster, {}, release)
        variables = made["Deployment", name]["spec"]["template"]["spec"]["containers"][0]["env"]
        assert {"name": "INFLUENCE_OPERATOR_LEASE_NAME", "value": name} in variables
        rules = made["Role", f"{name}-leader"]["rules"]
        assert [rule.get("resourceNames") for rule in rules] == [[name], None]


def test_the_operator_is_kept_from_pickles_as_the_dask_operator_is_if_somebody_asks(cluster: Cluster) -> None:
    made = manifests(cluster, {"networkPolicy.operatorEgress": True})
    ours, theirs = made["NetworkPolicy", OPERATOR]["spec"], made["NetworkPolicy", DASK_OPERATOR]["spec"]
    assert ours["policyTypes"] == theirs["policyTypes"] == ["Ingress", "Egress"]
    assert ours["egress"] == theirs["egress"]


def test_without_egress_rules_the_dask_operators_policy_still_lets_nobody_in(cluster: Cluster) -> None:
    made = manifests(cluster, {"networkPolicy.daskOperatorEgress": False})
    policy = made["NetworkPolicy", DASK_OPERATOR]["spec"]
    assert (policy["policyTypes"], policy.keys() & {"ingress", "egress"}) == (["Ingress"], set())


@pytest.mark.parametrize(
    "value",
    [
        "watchNamespace=team-a",
        "metrics.namspace=monitoring",
        "worker.memroy=1Gi",
        "daskOperator.enable=false",
        "watchNamespaces=team-a",
        "worker.memory=4GB",
        "worker.memory=",
        "worker.memory=null",
        "driver.cpu=-1",
        "image.pullPolicy=Sometimes",
        "worker.image.tag=20261130",
        "image.tag=12345",
    ],
)
def test_a_wrong_value_is_refused_by_its_name(cluster: Cluster, value: str) -> None:
    with pytest.raises(CommandError) as caught:
        template(cluster, f"--set={value}")
    assert "the schema" in caught.value.output
    for part in value.partition("=")[0].split("."):
        assert part in caught.value.output


def test_port_8786_is_not_opened_by_name_either(cluster: Cluster) -> None:
    with pytest.raises(CommandError, match=r"networkPolicy\.singlePorts: expected ports of DNS .* got 8786"):
        rendered(cluster, {"networkPolicy.singlePorts": [53, 8786]})


@pytest.mark.parametrize(
    "option",
    [
        "--set=image.tag=null",
        "--set-string=worker.image.tag=20261130",
        "--set=worker.image.tag=1.0@sha256:00",
        "--set=worker.cpu=2",
        "--set-json=worker.cpu=0.5",
        "--set=nodeSelector=null",
        "--set=nodeSelector.a=b",
        "--set-json=affinity={}",
        "--set=watchNamespaces={a,b}",
        "--set=resources.limits.memory=null",
        "--set=global.registry=example",
        "--set=daskOperator.global.registry=example",
        "--set=daskOperator.nodeSelector.a=b",
        "--set=daskOperator.metrics.worker.enabled=true",
    ],
)
def test_a_value_that_the_chart_can_do_something_with_is_taken(cluster: Cluster, option: str) -> None:
    assert "kind: Deployment" in template(cluster, option)


def test_a_tag_of_digits_stays_as_it_was_written(cluster: Cluster) -> None:
    tag = "20261130"
    assert f"influence-worker:{tag}" in template(cluster, f"--set-string=worker.image.tag={tag}")


def test_an_account_that_exists_must_be_named(cluster: Cluster) -> None:
    with pytest.raises(CommandError, match=r"serviceAccount\.name: expected the name of a ServiceAccount"):
        rendered(cluster, {"serviceAccount.create": False})
