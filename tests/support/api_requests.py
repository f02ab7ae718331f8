"""Who asked the API server for what in a namespace, and what the operator says of itself.

Counted from the audit log, by ServiceAccount: other namespaces and other clients do not disturb the figures,
and a request that a client forgets to count is counted. Used by `scale`.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

import chart
from cluster import Cluster
from machine import AuditLog

OURS = f"system:serviceaccount:{chart.NAMESPACE}:{chart.OPERATOR}"
THEIRS = f"system:serviceaccount:{chart.NAMESPACE}:{chart.DASK_OPERATOR}"
"""The dask operator, which is told of DaskClusters by ours and of DaskJobs by a user."""
WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
QUIET_SECONDS = 5.0
METRICS_PORT = 9090

Requests = Counter[tuple[str, str]]
"""Numbers by verb and resource; a subresource follows its resource after a slash."""


def asked(log: AuditLog, account: str, namespace: str) -> Requests:
    """What an account asked about a namespace since the log was opened. Watches are not about one."""
    return Counter(
        (entry["verb"], resource(entry["objectRef"]))
        for entry in log.entries(account)
        if entry.get("objectRef", {}).get("namespace") == namespace
    )


def resource(reference: dict[str, str]) -> str:
    """As RBAC spells it."""
    return "/".join(filter(None, (reference["resource"], reference.get("subresource"))))


def by_verb(requests: Requests) -> Counter[str]:
    verbs: Counter[str] = Counter()
    for (verb, _), number in requests.items():
        verbs[verb] += number
    return verbs


def writes(requests: Requests) -> Requests:
    """Those that change something."""
    return Counter({key: number for key, number in requests.items() if key[0] in WRITES})


def created(log: AuditLog, namespace: str, kind: str) -> dict[str, datetime.datetime]:
    """When each object of a resource was there, by name; of an applied one when it was first applied."""
    times: dict[str, datetime.datetime] = {}
    for entry in log.entries():
        reference = entry.get("objectRef", {})
        made = entry.get("responseStatus", {}).get("code") == 201
        if made and (reference.get("namespace"), resource(reference)) == (namespace, kind):
            stamp = datetime.datetime.fromisoformat(entry["stageTimestamp"])
            times.setdefault(reference["name"], stamp)
    return times


def settled(log: AuditLog, account: str, namespace: str, seconds: float = 120) -> Requests:
    """What an account had asked when it had changed nothing in the namespace for some seconds."""
    deadline, before, since = time.monotonic() + seconds, -1, time.monotonic()
    while time.monotonic() < deadline:
        requests = asked(log, account, namespace)
        now = writes(requests).total()
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() > since + QUIET_SECONDS:
            return requests
        time.sleep(1)
    raise AssertionError(f"{account} wrote for {seconds:g} s in {namespace}: {requests}")


class Leader:
    """The replica that leads, through the API server's proxy."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @property
    def pod(self) -> str:
        """Its name; empty while nobody leads."""
        return chart.leader(self._cluster)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over the labels that are not given."""
        return sum(
            value
            for sample, found, value in self._samples()
            if sample == name and labels.items() <= found.items()
        )

    @property
    def memory(self) -> float:
        """Resident bytes."""
        return self.metric("process_resident_memory_bytes")

    @property
    def processor_seconds(self) -> float:
        return self.metric("process_cpu_seconds_total")

    def restart(self) -> None:
        """Every replica ends and another takes its place; the new leader has seen every job afterwards."""
        before = chart.names(chart.pods(self._cluster))
        self._cluster.kubectl(
            "rollout", "restart", f"deployment/{chart.OPERATOR}", "--namespace", chart.NAMESPACE
        )
        chart.wait_for_replicas(self._cluster)
        jobs = len(self._jobs())

        def has_seen_all() -> bool:
            passes = self.metric("influence_operator_reconciles_total")
            return passes >= jobs and self.metric("influence_operator_queue_depth") == 0

        self._cluster.wait_until(lambda: self.pod and self.pod not in before, "a new leader", 60)
        self._cluster.wait_until(has_seen_all, f"a pass over each of {jobs} jobs", 120)

    def _jobs(self) -> list[Any]:
        found = self._cluster.objects.list_cluster_custom_object(
            "influence-operator.dev", "v1alpha1", "influencejobs"
        )
        return list(found["items"])

    def _samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        text = self._cluster.core.connect_get_namespaced_pod_proxy_with_path(
            f"{self.pod}:{METRICS_PORT}", chart.NAMESPACE, "metrics"
        )
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value
