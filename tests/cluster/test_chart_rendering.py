"""What helm makes of the chart; nothing is installed. What needs no helm is in tests/unit/charts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml

from chart import CHART, INSTALL
from cluster import Cluster, CommandError, tool

Manifest = dict[str, Any]
LISTS = {
    "watchNamespaces": ["one", "two"],
    "apiAudiences": ["one", "two"],
    "imagePullSecrets": [{"name": "changed"}],
    "tolerations": [{"key": "changed", "operator": "Exists"}],
    "daskOperator.extraEnv": [],
}
"""Other values for those that are lists."""
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
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return f"{value}1"
        case dict():
            return {"changed": "yes"}
    return LISTS[name]


def rendered(cluster: Cluster, values: Manifest) -> str:
    options = [f"--set-json={name}={json.dumps(value)}" for name, value in values.items()]
    options += ["--namespace", "influence-system", "--kube-version", "1.35.0"]
    return cluster.helm("template", "influence-operator", str(CHART), *options)


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


def test_an_account_that_exists_must_be_named(cluster: Cluster) -> None:
    with pytest.raises(CommandError, match=r"serviceAccount\.name: expected the name of a ServiceAccount"):
        rendered(cluster, {"serviceAccount.create": False})
