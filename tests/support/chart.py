"""The chart on the test cluster, installed as a user installs it but with the images of this checkout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kubernetes import client

import machine
from cluster import CHECKOUT, Cluster

CHART = CHECKOUT / "charts/influence-operator"
INSTALL = CHECKOUT / "charts/install.yaml"
NAMESPACE = "influence-system"
OPERATOR = "influence-operator"
"""The release, and in it the operator's Deployment and ServiceAccount."""
DASK_OPERATOR = "influence-operator-dask-kubernetes-operator"
"""Deployment and ServiceAccount of the dask operator in that release."""
_APPLICATIONS = {OPERATOR: "influence-operator", DASK_OPERATOR: "dask-kubernetes-operator"}
"""What each one's pods are labelled as, whatever their release is called."""

Manifest = dict[str, Any]


def settings(cluster: Cluster) -> list[str]:
    """Arguments of helm that choose our images."""
    images = cluster.images
    values = {
        "image.repository": images.operator.repository,
        "image.tag": images.operator.tag,
        "worker.image.repository": images.worker.repository,
        "worker.image.tag": images.worker.tag,
        "daskOperator.image.name": images.dask_operator.repository,
        "daskOperator.image.tag": images.dask_operator.tag,
    }
    return [f"--set-string={name}={value}" for name, value in values.items()]


def install(cluster: Cluster) -> None:
    """Installs or upgrades both operators, for the whole cluster; they are ready afterwards."""
    cluster.make_namespace(NAMESPACE)
    # What a run left behind that was killed in the middle: helm would wait for it for ever.
    unfinished = "status in (pending-install,pending-upgrade,pending-rollback)"
    cluster.kubectl(
        *("delete", "secrets", "--namespace", NAMESPACE),
        *("--selector", f"owner=helm,name={OPERATOR},{unfinished}"),
    )
    cluster.helm(
        *("upgrade", "--install", OPERATOR, str(CHART), "--namespace", NAMESPACE, *settings(cluster)),
        # CRDs outlive the releases that brought them, whatever these were called.
        *("--take-ownership", "--wait", "--timeout", "180s"),
    )
    wait_for_owners(cluster)


def wait_for_owners(cluster: Cluster) -> None:
    """Waits until objects may say that an InfluenceJob or a DaskCluster owns them.

    For half a minute after a CRD came, an API server that guards `blockOwnerDeletion` knows no such kind and
    refuses the children of its objects.
    """
    ours, theirs = "influence-operator.dev/v1alpha1", "kubernetes.dask.org/v1"
    _wait_for_owner(cluster, OPERATOR, (ours, "InfluenceJob"), {"kind": "ConfigMap"})
    service = {"kind": "Service", "spec": {"ports": [{"port": 1}]}}
    _wait_for_owner(cluster, DASK_OPERATOR, (theirs, "DaskCluster"), service)


def _wait_for_owner(cluster: Cluster, account: str, owner: tuple[str, str], child: dict[str, Any]) -> None:
    """Tries, without making anything, what an operator will do."""
    version, kind = owner
    reference = {"apiVersion": version, "kind": kind, "name": "none", "uid": "none"}
    metadata = {"name": "owned", "ownerReferences": [reference | {"blockOwnerDeletion": True}]}
    stdin = json.dumps({"apiVersion": "v1", "metadata": metadata} | child)
    command = (
        *("create", "--dry-run=server", "--filename", "-", "--namespace", NAMESPACE),
        *("--as", f"system:serviceaccount:{NAMESPACE}:{account}"),
    )
    cluster.wait_until(lambda: cluster.kubectl(*command, stdin=stdin), f"a child of a {kind} to be taken", 90)


def wait_for_replicas(cluster: Cluster) -> None:
    """Waits until every replica of both operators is ready, and one of ours leads."""
    for deployment in (OPERATOR, DASK_OPERATOR):
        where = ("--namespace", NAMESPACE, "--timeout=120s")
        cluster.kubectl("rollout", "status", f"deployment/{deployment}", *where, seconds=130)

    cluster.wait_until(lambda: leader(cluster) in names(replicas(cluster)), "a replica that runs to lead", 60)


def pods(cluster: Cluster, operator: str = OPERATOR, namespace: str = NAMESPACE) -> list[Manifest]:
    """Every pod of one of the operators, those that are being deleted, too."""
    selector = f"app.kubernetes.io/name={_APPLICATIONS[operator]}"
    found: list[Manifest] = cluster.get("pods", "", namespace, selector)
    return found


def replicas(cluster: Cluster, operator: str = OPERATOR, namespace: str = NAMESPACE) -> list[Manifest]:
    """Those that are to stay."""
    return [pod for pod in pods(cluster, operator, namespace) if "deletionTimestamp" not in pod["metadata"]]


def names(found: list[Manifest]) -> set[str]:
    return {pod["metadata"]["name"] for pod in found}


def lease(cluster: Cluster, namespace: str = NAMESPACE, name: str = OPERATOR) -> Any:
    """The lease that the replicas of a Deployment contend for."""
    return client.CoordinationV1Api(cluster.api).read_namespaced_lease(name, namespace).spec


def leader(cluster: Cluster, namespace: str = NAMESPACE, name: str = OPERATOR) -> str:
    """The name of the pod that leads; empty while none does."""
    return str(lease(cluster, namespace, name).holder_identity or "")


@contextmanager
def without_api_server(cluster: Cluster) -> Iterator[None]:
    """The API server is away inside the block; after it, it takes what it took before."""
    with machine.down("kube-apiserver"):
        yield
    wait_for_owners(cluster)


def operator_processes(cluster: Cluster) -> dict[str, int]:
    """The operator's pods, and how often each was started anew: equal twice if none has ended in between."""
    return {
        pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["restartCount"]
        for pod in replicas(cluster)
    }
