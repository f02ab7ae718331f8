"""NetworkPolicies, evaluated over all flows between the pods that could meet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attempts import NAMESPACE, SETTINGS, UID, build, job, pod_metadata
from influence_operator.manifests import names
from influence_operator.manifests.attempt import AttemptManifests
from influence_operator.settings import Settings

PORTS = {"driver": (8080, 9090), "scheduler": (8786, 8787), "worker": (40000, 8788)}
OTHER_UID = "99999999-5b7d-4e61-9c8e-0d1f2a3b4c5d"
OPERATOR = ("influence-operator", dict(SETTINGS.operator_selector))
STRANGERS = {
    "another job's worker": (NAMESPACE, names.labels("digits", OTHER_UID, 1, names.Role.WORKER)),
    "the last attempt's driver": (NAMESPACE, names.labels("digits", UID, 2, names.Role.DRIVER)),
    "a pod of the namespace": (NAMESPACE, {}),
    "a pod called like the operator": (NAMESPACE, dict(SETTINGS.operator_selector)),
    "the dask operator": ("dask-operator", {"app.kubernetes.io/name": "dask-kubernetes-operator"}),
    "a neighbour of the operator": ("influence-operator", {}),
}


def allowed(made: AttemptManifests, source: tuple[str, dict[str, str]], role: str) -> set[int]:
    """Ports of the role's pod that `source` may reach: (namespace, labels)."""
    target = pod_metadata(made)[role]["labels"]
    chosen = [p["spec"] for p in made.network_policies if _matches(p["spec"]["podSelector"], target)]
    assert chosen, "no policy: everything would be open"
    rules = [rule for spec in chosen for rule in spec["ingress"]]
    found = {p["port"] for r in rules if any(_peer(peer, *source) for peer in r["from"]) for p in r["ports"]}
    return found & set(PORTS[role])


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return bool(selector["matchLabels"].items() <= labels.items())


def _peer(peer: dict[str, Any], namespace: str, labels: dict[str, str]) -> bool:
    if "namespaceSelector" in peer:
        if not _matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != NAMESPACE:
        return False
    return _matches(peer.get("podSelector", {"matchLabels": {}}), labels)


def table(source: tuple[str, dict[str, str]], settings: Settings = SETTINGS) -> dict[str, set[int]]:
    made = build(job(), settings=settings)
    return {role: allowed(made, source, role) for role in PORTS}


def test_pods_of_the_attempt_reach_the_scheduler_and_the_workers_comms() -> None:
    for metadata in pod_metadata(build(job())).values():
        own = (NAMESPACE, metadata["labels"])
        assert table(own) == {"driver": set(), "scheduler": {8786, 8787}, "worker": {40000}}


def test_the_operator_reaches_progress_and_the_schedulers_http_and_never_a_comm() -> None:
    assert table(OPERATOR) == {"driver": {8080}, "scheduler": {8787}, "worker": set()}


def test_the_named_namespace_reads_metrics_and_nothing_else() -> None:
    prometheus = ("monitoring", {"app": "prometheus"})
    assert table(prometheus) == {"driver": {9090}, "scheduler": set(), "worker": set()}
    nobody = replace(SETTINGS, metrics_namespace="")
    assert table(prometheus, nobody) == {"driver": set(), "scheduler": set(), "worker": set()}


def test_nobody_else_reaches_anything() -> None:
    for who, source in STRANGERS.items():
        assert table(source) == {"driver": set(), "scheduler": set(), "worker": set()}, who


def test_policies_restrict_ingress_alone() -> None:
    for policy in build(job()).network_policies:
        assert policy["spec"]["policyTypes"] == ["Ingress"]
