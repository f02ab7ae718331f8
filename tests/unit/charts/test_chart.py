"""The chart as it is committed. What needs helm is in tests/cluster/test_chart_rendering.py."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from influence_job.crd import custom_resource_definition
from influence_job.spec import Quantity
from influence_operator.cluster.kinds import RIGHTS
from influence_operator.settings import PREFIX, Defaults, Settings, read

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts/influence-operator"
Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def installed() -> list[Manifest]:
    """What install.yaml installs; a test in tests/cluster holds it against the chart."""
    return list(yaml.load_all((ROOT / "charts/install.yaml").read_text(), Loader=yaml.CSafeLoader))


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def container(manifests: list[Manifest], deployment: str) -> Manifest:
    (found,) = named(manifests, "Deployment", deployment)["spec"]["template"]["spec"]["containers"]
    return found


def environment(manifests: list[Manifest]) -> dict[str, str]:
    variables = container(manifests, "influence-operator")["env"]
    return {
        v["name"]: v.get("value", v.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath"))
        for v in variables
    }


def rights(role: Manifest) -> dict[tuple[str, str], set[str]]:
    """Verbs by API group and resource."""
    granted: dict[tuple[str, str], set[str]] = defaultdict(set)
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                granted[group, resource] |= set(rule["verbs"])
    return granted


def needed(*, own_namespace: bool) -> dict[tuple[str, str], set[str]]:
    """The same, from the operator's own table."""
    return {
        (r.kind.group, f"{r.kind.plural}/{r.subresource}" if r.subresource else r.kind.plural): set(r.verbs)
        for r in RIGHTS
        if r.own_namespace is own_namespace
    }


def test_generated_files_are_what_make_manifests_writes() -> None:
    spec = importlib.util.spec_from_file_location("manifests", ROOT / "charts/manifests.py")
    assert spec is not None
    assert spec.loader is not None
    manifests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(manifests)
    files = manifests.chart_files()
    stale = [str(path.relative_to(ROOT)) for path, text in files.items() if path.read_text() != text]
    assert stale == [], "run `make manifests`"
    generated = {
        path for folder in ("files", "charts") for path in (CHART / folder).rglob("*") if path.is_file()
    }
    assert generated == set(files)


def test_the_crd_that_is_installed_is_that_of_the_spec_and_is_kept(installed: list[Manifest]) -> None:
    crd = named(installed, "CustomResourceDefinition", "influencejobs.influence-operator.dev")
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == custom_resource_definition()


def test_the_crds_of_dask_kubernetes_are_unchanged_and_kept(installed: list[Manifest]) -> None:
    originals = [
        yaml.safe_load(path.read_text()) for path in (CHART / "files/dask-kubernetes").glob("*.yaml")
    ]
    assert len(originals) == 4
    for original in originals:
        crd = named(installed, "CustomResourceDefinition", original["metadata"]["name"])
        assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
        assert crd == original


def test_the_operator_may_do_what_it_does_and_nothing_else(installed: list[Manifest]) -> None:
    assert rights(named(installed, "ClusterRole", "influence-operator")) == needed(own_namespace=False)
    leader = named(installed, "Role", "influence-operator-leader")
    assert rights(leader) == needed(own_namespace=True)
    for rule in leader["rules"]:
        assert rule["verbs"] == ["create"] or rule["resourceNames"] == [Settings.lease_name]
    assert environment(installed)[f"{PREFIX}LEASE_NAME"] == Settings.lease_name


def test_who_may_edit_in_a_namespace_may_create_jobs_and_who_may_view_may_look(
    installed: list[Manifest],
) -> None:
    reading, writing = {"get", "list", "watch"}, {"create", "update", "patch", "delete", "deletecollection"}
    for suffix, verbs in (("view", reading), ("edit", writing)):
        role = named(installed, "ClusterRole", f"influence-operator-{suffix}")
        assert role["metadata"]["labels"][f"rbac.authorization.k8s.io/aggregate-to-{suffix}"] == "true"
        assert rights(role)["influence-operator.dev", "influencejobs"] == verbs
        assert ("influence-operator.dev", "influencejobs/status") not in rights(role) or suffix == "view"


def test_the_dask_operators_finalizers_rule_goes_to_its_own_account(installed: list[Manifest]) -> None:
    account = "influence-operator-dask-kubernetes-operator"
    binding = named(installed, "ClusterRoleBinding", f"{account}-finalizers")
    (subject,) = binding["subjects"]
    pod = named(installed, "Deployment", account)["spec"]["template"]["spec"]
    assert subject["name"] == pod["serviceAccountName"] == account
    granted = rights(named(installed, "ClusterRole", binding["roleRef"]["name"]))
    assert granted["kubernetes.dask.org", "daskclusters/finalizers"] == {"update"}


def test_every_setting_of_the_operator_is_set_to_its_default(installed: list[Manifest]) -> None:
    given = environment(installed)
    names = {f.name for kind in (Settings, Defaults) for f in fields(kind)} - {"defaults"}
    ports = {"health_port", "metrics_port"}  # of a pod of its own: nothing to choose
    assert given.keys() == {PREFIX + name.upper() for name in names - ports}
    selector = named(installed, "Deployment", "influence-operator")["spec"]["selector"]["matchLabels"]
    image = given[f"{PREFIX}IMAGE"]
    default = read({f"{PREFIX}IMAGE": image})
    assert read(given) == Settings(
        default.defaults, namespace="metadata.namespace", pod="metadata.name", operator_selector=selector
    )


def test_probes_and_metrics_meet_the_ports_the_operator_serves(installed: list[Manifest]) -> None:
    ports = {
        port["name"]: port["containerPort"] for port in container(installed, "influence-operator")["ports"]
    }
    assert ports == {"health": Settings.health_port, "metrics": Settings.metrics_port}


DASK_OPERATOR = "influence-operator-dask-kubernetes-operator"


def policy_of(manifests: list[Manifest], operator: str) -> Manifest:
    """The spec of the NetworkPolicy that chooses an operator's pods."""
    policy: Manifest = named(manifests, "NetworkPolicy", operator)["spec"]
    labels = named(manifests, "Deployment", operator)["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    return policy


def ports_out(policy: Manifest, protocol: str, *, knows_end_port: bool = True) -> set[int]:
    """What a network plugin lets out; one that does not know `endPort` sees the first port of a range."""
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    (rule,) = policy["egress"]
    assert "to" not in rule
    ends = [(p["port"], p.get("endPort", p["port"])) for p in rule["ports"] if p["protocol"] == protocol]
    return {port for first, last in ends for port in range(first, (last if knows_end_port else first) + 1)}


def test_nothing_gets_from_the_dask_operator_to_the_schedulers_pickles(installed: list[Manifest]) -> None:
    policy = policy_of(installed, DASK_OPERATOR)
    assert set(range(1, 65536)) - ports_out(policy, "TCP") == {8786}
    assert ports_out(policy, "UDP") == set(range(1, 65536))


def test_the_dask_operator_works_where_the_network_plugin_knows_no_end_port(
    installed: list[Manifest],
) -> None:
    """It reaches DNS, the API server and schedulers' HTTP API, and their pickles no more than elsewhere."""
    policy = policy_of(installed, DASK_OPERATOR)
    dns, api_servers, dashboard = {53, 5353}, {443, 6443, 8443, 16443}, {8787}
    assert ports_out(policy, "TCP", knows_end_port=False) == {1} | dns | api_servers | dashboard
    assert dns <= ports_out(policy, "UDP", knows_end_port=False)


def test_the_operator_which_speaks_no_pickle_is_kept_from_nothing(installed: list[Manifest]) -> None:
    """Where a plugin takes a range for less than it is, no rule is better than one."""
    policy = policy_of(installed, "influence-operator")
    assert policy["policyTypes"] == ["Ingress"]
    assert "egress" not in policy


@pytest.mark.parametrize("name", ["influence-operator", "influence-operator-dask-kubernetes-operator"])
def test_containers_have_requests_a_memory_limit_and_a_read_only_root(
    installed: list[Manifest], name: str
) -> None:
    found = container(installed, name)
    assert {"cpu", "memory"} <= found["resources"]["requests"].keys()
    assert "memory" in found["resources"]["limits"]
    assert found["securityContext"]["readOnlyRootFilesystem"] is True


def test_every_namespaced_object_names_its_namespace(installed: list[Manifest]) -> None:
    whole_cluster = ("Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding")
    for manifest in installed:
        expected = None if manifest["kind"] in whole_cluster else "influence-system"
        assert manifest["metadata"].get("namespace") == expected, manifest["metadata"]["name"]


def test_versions_are_those_of_the_package_and_of_the_pinned_dask_kubernetes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project["project"]["version"]
    (dask,) = chart["dependencies"]
    assert f"dask-kubernetes=={dask['version']}" in project["dependency-groups"]["test"]
    assert values["daskOperator"]["image"]["tag"] == dask["version"]


def schema_of_values() -> Manifest:
    schema: Manifest = json.loads((CHART / "values.schema.json").read_text())
    return schema


def closed(schema: Manifest, path: str = "") -> Iterator[tuple[str, Manifest]]:
    """Every object whose keys are all named, with its path."""
    if schema.get("additionalProperties") is False:
        yield path, schema
    for name, below in schema.get("properties", {}).items():
        yield from closed(below, f"{path}.{name}" if path else name)


def at(values: Manifest, path: str) -> Manifest:
    for part in filter(None, path.split(".")):
        values = values[part]
    return values


def test_the_schema_of_values_names_each_value_and_no_other() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    theirs = yaml.safe_load((CHART / "charts/dask-kubernetes-operator/values.yaml").read_text())
    given_by_helm = {"": {"global"}, "daskOperator": {"global", *theirs}}
    found = dict(closed(schema_of_values()))
    assert found.keys() == {
        *("", "image", "driver", "scheduler", "worker", "worker.image", "metrics", "log", "serviceAccount"),
        *("rbac", "crds", "networkPolicy", "daskOperator"),
    }
    for path, schema in found.items():
        assert schema["properties"].keys() == at(values, path).keys() | given_by_helm.get(path, set()), path


def test_the_schema_takes_the_quantities_that_the_operator_takes() -> None:
    own = TypeAdapter(Quantity).json_schema()
    quantity = schema_of_values()["definitions"]["quantity"]
    assert {name: quantity[name] for name in ("pattern", "maxLength", "minimum")} == {
        name: own[name] for name in ("pattern", "maxLength", "minimum")
    }


def test_every_value_has_a_comment_right_above_it() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    values = [
        (above, line)
        for above, line in pairwise(lines)
        if re.match(r" *\w+: +[^#]", line)  # a value, neither a comment, a heading nor an item of a list
    ]
    assert len(values) > 40
    bare = [line for above, line in values if not above.lstrip().startswith("#")]
    assert bare == ["      value: dask"]  # of the item above it


def test_the_documents_name_values_that_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    _, _, table = (ROOT / "docs/install.md").read_text().partition("\n| value |")
    cells = [row.split("|")[1] for row in table.partition("\n\n")[0].splitlines()[2:]]
    names = [name for cell in cells for name in re.findall(r"`([A-Za-z.]+)[^`]*`", cell)]
    assert len(names) > 10
    for name in names:
        found = values
        for part in name.split("."):
            assert part in found, name
            found = found[part]
