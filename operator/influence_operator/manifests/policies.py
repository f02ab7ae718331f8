"""NetworkPolicies: who may reach an attempt's pods. Ingress alone; they exist before the first pod.

The certificates are the boundary; these keep others from the plain HTTP of the scheduler and of the driver.
A kubelet's probes are always let in.
"""

from __future__ import annotations

from typing import Any

from influence_job.document import METRICS_PORT, PROGRESS_PORT, WORKER_PORT
from influence_operator.manifests.child import Attempt, Manifest
from influence_operator.manifests.names import DASHBOARD_PORT, SCHEDULER_PORT, Role

Peer = dict[str, Any]
_NAMESPACE_NAME = "kubernetes.io/metadata.name"


def network_policies(attempt: Attempt) -> tuple[Manifest, ...]:
    """One policy per role."""
    own, operator = {"podSelector": attempt.selector()}, _operator(attempt)
    driver = [_from(operator, PROGRESS_PORT)]
    if attempt.settings.metrics_namespace:
        driver.append(_from(_namespace(attempt.settings.metrics_namespace), METRICS_PORT))
    scheduler = [_from(own, SCHEDULER_PORT, DASHBOARD_PORT), _from(operator, DASHBOARD_PORT)]
    return (
        _policy(attempt, Role.DRIVER, driver),
        _policy(attempt, Role.SCHEDULER, scheduler),
        _policy(attempt, Role.WORKER, [_from(own, WORKER_PORT)]),
    )


def _policy(attempt: Attempt, role: Role, ingress: list[Manifest]) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": attempt.metadata(f"{attempt.base}-{role.value}"),
        "spec": {"podSelector": attempt.selector(role), "policyTypes": ["Ingress"], "ingress": ingress},
    }


def _from(peer: Peer, *ports: int) -> Manifest:
    return {"from": [peer], "ports": [{"protocol": "TCP", "port": port} for port in ports]}


def _operator(attempt: Attempt) -> Peer:
    settings = attempt.settings
    return {
        **_namespace(settings.namespace),
        "podSelector": {"matchLabels": dict(settings.operator_selector)},
    }


def _namespace(name: str) -> Peer:
    return {"namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: name}}}
