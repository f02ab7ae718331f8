"""Pods of one container that tests start themselves, as the restricted Pod Security Standard admits them."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from cluster import Cluster

SECURE = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def pod(image: str, *command: str, **changes: Any) -> dict[str, Any]:
    """The spec of a pod of one container that the restricted standard admits."""
    container = {
        "name": "main",
        "image": image,
        "command": list(command),
        "securityContext": SECURE,
        "resources": {"requests": {"cpu": "10m"}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    } | changes
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}],
    }


def start(cluster: Cluster, namespace: str, name: str, spec: dict[str, Any]) -> None:
    cluster.apply(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}, namespace=namespace
    )


def finish(cluster: Cluster, namespace: str, name: str, spec: dict[str, Any]) -> str:
    """Runs a pod to its end and returns what it printed."""
    start(cluster, namespace, name, spec)
    phase = cluster.wait_until(
        lambda: {"Succeeded": "good", "Failed": "bad"}.get(phase_of(cluster, namespace, name)),
        f"pod {name} to end",
        seconds=120,
        namespace=namespace,
    )
    assert phase == "good", cluster.describe(namespace)
    return cluster.kubectl("logs", name, "--namespace", namespace)


def phase_of(cluster: Cluster, namespace: str, name: str) -> str:
    return str(cluster.core.read_namespaced_pod(name, namespace).status.phase)


def python(cluster: Cluster, namespace: str, name: str, script: str, *arguments: str) -> Any:
    """What a script prints in a running pod, from JSON."""
    program = ("python", "-c", textwrap.dedent(script), *arguments)
    return json.loads(cluster.kubectl("exec", name, "--namespace", namespace, "--", *program))
