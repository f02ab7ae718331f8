"""The chart on the test cluster, installed as a user installs it but with the images of this checkout."""

from __future__ import annotations

from cluster import CHECKOUT, Cluster

CHART = CHECKOUT / "charts/influence-operator"
INSTALL = CHECKOUT / "charts/install.yaml"
NAMESPACE = "influence-system"
OPERATOR = "influence-operator"
"""The release, and in it the operator's Deployment and ServiceAccount."""
DASK_OPERATOR = "influence-operator-dask-kubernetes-operator"
"""Deployment and ServiceAccount of the dask operator in that release."""


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
    return [f"--set={name}={value}" for name, value in values.items()]


def install(cluster: Cluster) -> None:
    """Installs or upgrades both operators, for the whole cluster; they are ready afterwards."""
    cluster.make_namespace(NAMESPACE)
    cluster.helm(
        *("upgrade", "--install", OPERATOR, str(CHART), "--namespace", NAMESPACE, *settings(cluster)),
        # CRDs outlive the releases that brought them, whatever these were called.
        *("--take-ownership", "--wait", "--timeout", "180s"),
    )
