"""The chart on a real cluster: installed, upgraded, uninstalled, and what it lets whom do."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

import chart
from chart import DASK_OPERATOR, NAMESPACE, OPERATOR
from cluster import Cluster, CommandError
from cluster_jobs import ClusterJob
from cluster_storage import Bucket

pytestmark = pytest.mark.usefixtures("operator")

Manifest = dict[str, Any]
JOBS = "influencejobs.influence-operator.dev"
SELECTOR = f"app.kubernetes.io/instance={OPERATOR}"


def installed() -> list[Manifest]:
    """The objects of install.yaml."""
    return list(yaml.load_all(chart.INSTALL.read_text(), Loader=yaml.CSafeLoader))


def ready(pod: Manifest) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))


def suspended_job(cluster: Cluster, namespace: str) -> Manifest:
    """A job that the operator does nothing about."""
    spec = {
        "task": {"entrypoint": "influence_job.examples.digits:task"},
        "method": {"name": "Ekfac", "regularization": 0.01},
        "output": {"url": "gs://nowhere/kept.zarr"},
        "suspend": True,
    }
    job = {"apiVersion": "influence-operator.dev/v1alpha1", "kind": "InfluenceJob", "spec": spec}
    cluster.apply(job | {"metadata": {"name": "kept"}}, namespace=namespace)
    made: Manifest = cluster.get(JOBS, "kept", namespace)
    return made


def may(cluster: Cluster, verb: str, resource: str, who: str, namespace: str) -> bool:
    """Whether the API server says yes; `resource` may be a subresource."""
    resource, _, subresource = resource.partition("/")
    asked = [verb, resource, f"--subresource={subresource}", "--as", who, "--namespace", namespace]
    try:
        cluster.kubectl("auth", "can-i", *asked)
    except CommandError as error:
        if "no" not in error.output.split():
            raise
        return False
    return True


def test_two_replicas_are_ready_and_one_of_them_leads(cluster: Cluster) -> None:
    chart.wait_for_replicas(cluster)
    replicas = chart.replicas(cluster)
    assert [ready(pod) for pod in replicas] == [True, True]
    assert chart.leader(cluster) in chart.names(replicas)
    assert [ready(pod) for pod in chart.replicas(cluster, DASK_OPERATOR)] == [True]


def test_the_release_fits_a_secret_with_room_for_more(cluster: Cluster) -> None:
    releases = cluster.get("secrets", "", NAMESPACE, f"owner=helm,name={OPERATOR}")
    assert max(len(secret["data"]["release"]) for secret in releases) < 500_000, "the limit is 1 MiB"


@pytest.mark.alone
def test_an_upgrade_to_the_same_changes_nothing(cluster: Cluster) -> None:
    def objects() -> dict[tuple[str, str], str]:
        """Generations, and resource versions where there are none."""
        release = cluster.helm("get", "manifest", OPERATOR, "--namespace", NAMESPACE)
        made = yaml.load_all(release, Loader=yaml.CSafeLoader)
        stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": [m for m in made if m]})
        found = cluster.kubectl("get", "--filename", "-", "--output", "json", stdin=stdin)
        items = [(item["kind"], item["metadata"]) for item in json.loads(found)["items"]]
        return {
            (kind, metadata["name"]): str(metadata.get("generation", metadata["resourceVersion"]))
            for kind, metadata in items
        }

    before, replicas = objects(), {pod["metadata"]["uid"] for pod in chart.replicas(cluster)}
    assert ("Deployment", OPERATOR) in before
    assert len(before) == len(installed()) - 1, "all but the namespace"
    chart.install(cluster)
    assert objects() == before
    assert {pod["metadata"]["uid"] for pod in chart.replicas(cluster)} == replicas


@pytest.mark.alone
def test_uninstalling_keeps_the_jobs_and_their_kind(cluster: Cluster, namespace: str) -> None:
    job = suspended_job(cluster, namespace)
    cluster.helm("uninstall", OPERATOR, "--namespace", NAMESPACE, "--wait")
    try:
        assert cluster.get(JOBS, "kept", namespace)["metadata"]["uid"] == job["metadata"]["uid"]
        left = "deployments,services,serviceaccounts,roles,networkpolicies,poddisruptionbudgets"
        assert cluster.get(left, "", NAMESPACE, SELECTOR) == []
        assert cluster.get("clusterroles,clusterrolebindings", "", "", SELECTOR) == []
    finally:
        chart.install(cluster)
    assert cluster.get(JOBS, "kept", namespace)["metadata"]["uid"] == job["metadata"]["uid"]


def test_install_yaml_is_accepted_whole_by_the_api_server(cluster: Cluster) -> None:
    """Forced: in this cluster helm owns the fields."""
    said = cluster.kubectl(
        *("apply", "--server-side", "--dry-run=server", "--force-conflicts"), f"--filename={chart.INSTALL}"
    )
    assert len(said.splitlines()) == len(installed())
    assert all(line.endswith("serverside-applied (server dry run)") for line in said.splitlines())


UNUSED_CRD = "daskautoscalers.kubernetes.dask.org"
"""No object of this kind exists here, so that it can be taken away."""


@pytest.mark.alone
def test_install_yaml_installs_all_that_a_job_needs(cluster: Cluster, namespace: str, bucket: Bucket) -> None:
    """In place of the release, with this checkout's images. All CRDs but one stay, as after a release."""
    objects = [thing for thing in installed() if thing["kind"] != "Namespace"]
    crds = [thing["metadata"]["name"] for thing in objects if thing["kind"] == "CustomResourceDefinition"]
    theirs = [thing for thing in objects if thing["kind"] != "CustomResourceDefinition"]
    cluster.helm("uninstall", OPERATOR, "--namespace", NAMESPACE, "--wait")
    cluster.kubectl("delete", "crd", UNUSED_CRD)
    try:
        apply = ("apply", "--server-side", "--force-conflicts", "--filename", "-")
        cluster.kubectl(*apply, stdin=with_own_images(cluster))
        assert UNUSED_CRD in crds
        cluster.kubectl("wait", "crd", *crds, "--for=condition=Established", "--timeout=60s")
        deployments = ("deployments", "--all", "--namespace", NAMESPACE)
        cluster.kubectl("wait", *deployments, "--for=condition=Available", "--timeout=110s")
        task = {"entrypoint": "gated_digits:few", "arguments": {"train": 100, "test": 10}}
        job = ClusterJob(cluster, namespace, bucket).apply(task=task, workers={"replicas": 1}).complete()
        assert job.status["result"]["shape"] == [10, 100]
    finally:
        remove(cluster, theirs)
        chart.install(cluster)


def with_own_images(cluster: Cluster) -> str:
    """install.yaml; a tool of images alone, such as kustomize's, would leave the variable out."""
    text, images = chart.INSTALL.read_text(), cluster.images
    ours = {
        "influence-operator": images.operator,
        "influence-worker": images.worker,
        "dask-kubernetes-operator": images.dask_operator,
    }
    for name, own in ours.items():
        text, replaced = re.subn(rf"\bghcr\.io/[\w-]+/{name}:[\w.-]+", own.name, text)
        assert replaced == 1, name
    return text


def remove(cluster: Cluster, objects: list[Manifest]) -> None:
    stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    cluster.kubectl("delete", "--ignore-not-found", "--filename", "-", stdin=stdin)


@pytest.fixture
def users(cluster: Cluster, namespace: str) -> None:
    """`editor` and `viewer` of the namespace, by the cluster's own roles."""
    for name, role in (("editor", "edit"), ("viewer", "view")):
        cluster.kubectl(
            "create", "rolebinding", name, f"--clusterrole={role}", f"--user={name}", "--namespace", namespace
        )
    # The roles are put together by a controller.
    for who, verb in (("editor", "create"), ("viewer", "get")):
        cluster.wait_until(
            lambda who=who, verb=verb: may(cluster, verb, JOBS, who, namespace),
            f"the role of {who}s to contain jobs",
            seconds=30,
        )


def test_editors_make_jobs_and_viewers_look_at_them(cluster: Cluster, namespace: str, users: None) -> None:
    def verbs(who: str, resource: str = JOBS) -> list[str]:
        asked = ("get", "list", "watch", "create", "patch", "delete")
        return [verb for verb in asked if may(cluster, verb, resource, who, namespace)]

    assert verbs("editor") == ["get", "list", "watch", "create", "patch", "delete"]
    assert verbs("editor", f"{JOBS}/scale") == ["get", "patch"]
    assert verbs("viewer") == ["get", "list", "watch"]
    assert verbs("editor", f"{JOBS}/status") == verbs("viewer", f"{JOBS}/status") == ["get"]


@pytest.mark.parametrize("account", [OPERATOR, DASK_OPERATOR])
def test_neither_operator_can_read_a_secret_or_run_a_command_in_a_pod(
    cluster: Cluster, namespace: str, account: str
) -> None:
    user = f"system:serviceaccount:{NAMESPACE}:{account}"
    for verb in ("get", "list", "watch"):
        assert not may(cluster, verb, "secrets", user, namespace)
    assert not may(cluster, "create", "pods/exec", user, namespace)
    assert may(cluster, "list", "pods", user, namespace)


def test_a_release_for_one_namespace_needs_no_rights_beyond_it(cluster: Cluster, namespace: str) -> None:
    """Beside the one for the whole cluster, with a lease of its own."""
    options = {
        "watchNamespaces": [namespace],
        "crds": {"influence": False, "dask": False},
        "rbac": {"aggregate": False},
        "daskOperator": {"enabled": False},
    }
    given = [f"--set-json={name}={json.dumps(value)}" for name, value in options.items()]
    cluster.helm(
        *("install", "own", str(chart.CHART), "--namespace", namespace, "--wait", "--timeout", "120s"),
        *(*chart.settings(cluster), *given),
    )
    replicas = chart.replicas(cluster, namespace=namespace)
    assert [ready(pod) for pod in replicas] == [True, True]
    assert chart.leader(cluster, namespace, "own-influence-operator") in chart.names(replicas)
    user = f"system:serviceaccount:{namespace}:own-influence-operator"
    assert may(cluster, "list", JOBS, user, namespace)
    assert not may(cluster, "list", JOBS, user, NAMESPACE)
    assert cluster.get("clusterroles", "", "", "app.kubernetes.io/instance=own") == []
