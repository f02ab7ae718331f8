"""The pod of a role: what driver, scheduler and workers have in common.

Every pod fits the restricted Pod Security Standard and holds no token that the API server accepts.
"""

from __future__ import annotations

from typing import Any

from influence_operator.manifests import names
from influence_operator.manifests.child import Attempt, Manifest
from influence_operator.manifests.environment import environment, environment_sources
from influence_operator.manifests.names import Role
from influence_operator.manifests.resources import container_resources
from influence_operator.manifests.volumes import mounts, volumes

_STAYS_AWAY = 30
"""Seconds until pods of a lost node are made again elsewhere; Kubernetes' own default is 300."""
_GRACE = {
    # A driver flushes its ledger, with retries. What a worker or a scheduler holds can be computed again,
    # so that stopping a job need not wait for them.
    Role.DRIVER: 30,
    Role.SCHEDULER: 5,
    Role.WORKER: 5,
}


def pod_metadata(attempt: Attempt, role: Role) -> Manifest:
    """Labels and annotations of a pod: the user's, then ours."""
    settings = attempt.pod(role)
    own = names.labels(attempt.job_name, attempt.uid, attempt.number, role)
    manifest: Manifest = {"labels": {**settings.labels, **own}}
    annotations = dict(settings.annotations)
    if role is not Role.WORKER:
        # A job has one of each, and moving it costs every region in flight.
        annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] = "false"
    return manifest | {"annotations": annotations} if annotations else manifest


def pod_spec(attempt: Attempt, role: Role, container: Manifest) -> Manifest:
    """The pod's spec around `container`, which holds what only this role has."""
    settings = attempt.pod(role)
    grace = settings.termination_grace_period_seconds
    spec: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _pod_security(settings.fs_group),
        "terminationGracePeriodSeconds": _GRACE[role] if grace is None else grace,
        "tolerations": [*map(_tolerated, ("not-ready", "unreachable")), *_copies(settings.tolerations)],
        "containers": [_container(attempt, role) | container],
        "volumes": volumes(attempt, role),
    }
    optional = {
        "serviceAccountName": settings.service_account_name,
        "imagePullSecrets": _copies(settings.image_pull_secrets),
        "nodeSelector": dict(settings.node_selector),
        "affinity": dict(settings.affinity),
        "topologySpreadConstraints": _copies(settings.topology_spread_constraints),
        "priorityClassName": settings.priority_class_name,
        "runtimeClassName": settings.runtime_class_name,
    }
    return spec | {name: value for name, value in optional.items() if value}


def _container(attempt: Attempt, role: Role) -> Manifest:
    settings = attempt.pod(role)
    defaults = attempt.settings.defaults
    container = {
        "name": role.value,
        "image": attempt.image,
        "imagePullPolicy": str(settings.image_pull_policy or defaults.image_pull_policy),
        "env": environment(attempt, role),
        "envFrom": environment_sources(attempt, role),
        "resources": container_resources(role, settings.resources, defaults),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        # A process that dies without a last word is described by its log's end.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts(attempt, role),
    }
    if not container["envFrom"]:
        del container["envFrom"]
    return container


def _pod_security(fs_group: int | None) -> Manifest:
    context: Manifest = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    return context if fs_group is None else context | {"fsGroup": fs_group}


def _tolerated(taint: str) -> Manifest:
    return {
        "key": f"node.kubernetes.io/{taint}",
        "operator": "Exists",
        "effect": "NoExecute",
        "tolerationSeconds": _STAYS_AWAY,
    }


def _copies(items: list[dict[str, Any]]) -> list[Manifest]:
    return [dict(item) for item in items]
