"""The NetworkPolicies of jobs and of the chart, enforced while a job runs under them."""

from __future__ import annotations

import json
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import chart
import packet_filter
import pods
from chart import DASK_OPERATOR, NAMESPACE, OPERATOR
from cluster import Cluster
from cluster_jobs import ClusterJob
from cluster_storage import Bucket, ClusterStorage
from influence_operator.manifests import names
from packet_filter import Enforced, Flow, Recorded

pytestmark = [pytest.mark.usefixtures("operator"), pytest.mark.host, pytest.mark.alone]

Object = dict[str, Any]

LATE_REGIONS = r"^influences/c/0/(9|1\d)$"
"""What the gate holds back: the regions from the tenth on."""
ANYTHING = "."
PORTS = (8786, 8787, 40000, 8080, 9090, 8788)
"""Everything that pods of a job listen on: scheduler, worker, the driver's progress and metrics, health."""
PROBE = """
    import json, socket, sys
    from concurrent.futures import ThreadPoolExecutor

    def ask(place):
        try:
            socket.create_connection(place, timeout=4).close()
            return "open"
        except TimeoutError:
            return "silent"
        except OSError as error:
            return type(error).__name__

    places = [tuple(place) for place in json.loads(sys.argv[1])]
    with ThreadPoolExecutor(len(places)) as threads:
        print(json.dumps(list(threads.map(ask, places))))
"""
LISTEN = """
    import socket, time
    listening = [socket.create_server(("0.0.0.0", port)) for port in (8786, 8787)]
    time.sleep(600)
"""

Pod = tuple[str, str]
"""Namespace and name."""


@pytest.fixture
def job(cluster: Cluster, namespace: str, bucket: Bucket) -> ClusterJob:
    return ClusterJob(cluster, namespace, bucket)


@pytest.fixture
def neighbour(cluster: Cluster, namespace: str, storage: ClusterStorage) -> ClusterJob:
    """Another job of the namespace."""
    return ClusterJob(cluster, namespace, storage.new_bucket(), "neighbour")


def start_stranger(cluster: Cluster, namespace: str) -> None:
    """A pod of the namespace that belongs to no job; it listens where schedulers do."""
    spec = pods.pod(cluster.images.operator.name, "python", "-c", textwrap.dedent(LISTEN))
    pods.start(cluster, namespace, "stranger", spec)
    cluster.kubectl(
        "wait", "pod/stranger", "--for=condition=Ready", "--timeout=60s", "--namespace", namespace
    )


def operators(cluster: Cluster) -> dict[str, list[Object]]:
    """Pods of our operator and of the dask operator."""
    names_ = {"operator": OPERATOR, "dask operator": DASK_OPERATOR}
    return {
        who: [pod for pod in chart.replicas(cluster, name) if pod["status"].get("podIP")]
        for who, name in names_.items()
    }


def ip(pod: Object) -> str:
    return str(pod["status"]["podIP"])


def reach(
    cluster: Cluster, sources: dict[str, Pod], targets: dict[str, str]
) -> dict[tuple[str, str, int], str]:
    """How each port of each target answers each source."""
    places = [(role, port) for role in targets for port in PORTS]
    question = json.dumps([(targets[role], port) for role, port in places])

    def ask(who: str) -> list[str]:
        answers: list[str] = pods.python(cluster, *sources[who], PROBE, question)
        return answers

    with ThreadPoolExecutor(len(sources)) as threads:
        answers = dict(zip(sources, threads.map(ask, sources), strict=True))
    return {
        (who, role, port): answer
        for who, given in answers.items()
        for (role, port), answer in zip(places, given, strict=True)
    }


def opened(answers: dict[tuple[str, str, int], str]) -> set[tuple[str, str, int]]:
    return {place for place, answer in answers.items() if answer == "open"}


OF_THE_ATTEMPT = [("scheduler", 8786), ("scheduler", 8787), ("worker", 40000)]
MAY_REACH = {
    *((who, *place) for who in ("driver", "scheduler", "worker") for place in OF_THE_ATTEMPT),
    ("operator", "driver", 8080),
    ("operator", "scheduler", 8787),
}
"""Source, target, port: all that NetworkPolicies let through. `worker` to `worker` is from one to another."""
LISTENED_ON = {
    ("driver", 8080), ("driver", 9090), ("scheduler", 8786), ("scheduler", 8787),
    ("worker", 40000), ("worker", 8788),
}  # fmt: skip

MUST_FLOW = {
    ("driver", "scheduler", 8786),
    ("worker", "scheduler", 8786),
    ("operator", "driver", 8080),
    ("driver", "storage", 4443),
    ("worker", "storage", 4443),
    # probes of the kubelet
    ("node", "driver", 8080),
    ("node", "scheduler", 8787),
    ("node", "worker", 8788),
}
MAY_FLOW = MUST_FLOW | {
    ("worker", "worker", 40000),
    ("scheduler", "worker", 40000),
    ("worker", "scheduler", 8787),  # leaving by request
    # tried before the node has heard that the scheduler is ready
    ("driver", "service", 8786),
    ("worker", "service", 8786),
    ("driver", "dns", 53),
    ("scheduler", "dns", 53),
    ("worker", "dns", 53),
}


def who_has(network: Enforced, job: ClusterJob, address: str) -> str:
    """What a person would call the owner of an address."""
    pod = network.pod(address)
    if pod is None:
        return "service" if network.is_service(address) else "node"
    labels = pod["metadata"].get("labels", {})
    if labels.get(names.JOB_UID) == job.uid:
        return str(labels[names.ROLE])
    known = {
        "influence-operator": "operator",
        "dask-kubernetes-operator": "dask operator",
    }
    by_namespace = {"influence-storage": "storage", "kube-system": "dns"}
    namespace = pod["metadata"]["namespace"]
    return known.get(labels.get("app.kubernetes.io/name", "")) or by_namespace.get(namespace) or namespace


def table(network: Enforced, job: ClusterJob, flows: list[Flow]) -> set[tuple[str, str, int]]:
    """Flows that begin or end at a pod of the job, by the names of both."""
    named = {
        (who_has(network, job, flow.source), who_has(network, job, flow.destination), flow.port)
        for flow in set(flows)
    }
    return {flow for flow in named if {flow[0], flow[1]} & set(names.Role)}


def test_a_job_runs_under_its_network_policies_which_let_nobody_else_in(
    job: ClusterJob, neighbour: ClusterJob
) -> None:
    cluster, namespace = job.cluster, job.namespace
    with packet_filter.enforced(cluster) as network, packet_filter.recorded() as record:
        neighbour.apply(**neighbour.gate(ANYTHING))
        job.apply(**job.gate(LATE_REGIONS))
        start_stranger(cluster, namespace)
        job.at_gate()
        job.wait_until(lambda: len(job.running("worker")) == 2, "two workers")
        neighbour.wait_until(lambda: neighbour.running("driver"), "a driver that runs")

        workers = job.pods("worker")
        targets = {"driver": ip(job.pods("driver")[0]), "scheduler": ip(job.pods("scheduler")[0])}
        targets["worker"] = ip(workers[1])
        sources = {role: (namespace, job.running(role)[0]) for role in ("driver", "scheduler")}
        sources["worker"] = (namespace, workers[0]["metadata"]["name"])
        sources["neighbour"] = (namespace, neighbour.running("driver")[0])
        sources["stranger"] = (namespace, "stranger")
        for who, found in operators(cluster).items():
            sources[who] = (NAMESPACE, found[0]["metadata"]["name"])

        of_the_job = record.flows()
        answers = reach(cluster, sources, targets)
        others_than_self = {place for place in answers if place[0] != place[1] or place[0] == "worker"}
        assert opened(answers) & others_than_self == MAY_REACH & others_than_self
        assert {answers[p] for p in others_than_self - MAY_REACH} == {"silent"}
        with network.lifted():
            unguarded = reach(cluster, {"stranger": sources["stranger"]}, targets)
        assert opened(unguarded) == {("stranger", *place) for place in LISTENED_ON}, "the probe can succeed"

        probed = len(record.flows())
        job.open_gate()
        job.complete()
        flowed = table(network, job, [*of_the_job, *record.flows()[probed:]])
        print("\n".join(f"{source} -> {target}:{port}" for source, target, port in sorted(flowed)))
        assert flowed - MAY_FLOW == set()
        assert MUST_FLOW - flowed == set()


def test_a_scheduler_that_answers_404_draws_nobody_to_its_own_port(job: ClusterJob) -> None:
    """There pickles are taken from, and given to, a process whose image the tenant chose.

    Scaled down as a user does, nobody even tries. A tenant can open the job's policies and have
    dask-kubernetes scale down: it asks, gets the 404, tries, and the chart's policy for its pod stops it.
    """
    cluster = job.cluster
    with packet_filter.enforced(cluster) as network, packet_filter.recorded() as record:
        job.apply(**job.gate(LATE_REGIONS))
        job.at_gate()
        base = names.base_name(job.name, job.uid, 1)
        scheduler = make_scheduler_deaf(job, base)
        ours = {who: [ip(pod) for pod in found] for who, found in operators(cluster).items()}
        tries = {
            who: [network.count(address, 8786) for address in addresses] for who, addresses in ours.items()
        }
        assert flows_to(record, scheduler, 8787, ours["operator"]) == [], "asked without need"

        job.kubectl("scale", f"influencejob/{job.name}", "--replicas=1")
        job.wait_until(
            lambda: len(flows_to(record, scheduler, 8787, ours["operator"])) >= 3,
            "the operator to ask the scheduler, over and over",
        )
        job.wait_until(
            lambda: job.condition("ClusterReady").get("reason") == "ScaleDownBlocked",
            "the condition that says why two workers stay",
        )
        assert "expected status 200, got 404" in job.condition("ClusterReady")["message"]
        assert job.events().count(("Warning", "ScaleDownBlocked")) == 1
        assert {who: sum(count() for count in counts) for who, counts in tries.items()} == {
            "operator": 0,
            "dask operator": 0,
        }
        cluster_ = cluster.get("daskcluster", base, job.namespace)
        assert cluster_["spec"]["worker"]["replicas"] == 2, "dask-kubernetes was told to scale down"
        assert len(job.pods("worker")) == 2

        let_everybody_in(job)
        patch = json.dumps({"spec": {"worker": {"replicas": 1}}})
        job.kubectl("patch", "daskcluster", base, "--type=merge", "--patch", patch)
        job.wait_until(lambda: sum(count() for count in tries["dask operator"]), "the fall-back to pickle")
        assert flows_to(record, scheduler, 8787, ours["dask operator"])
        drawn = flows_to(record, scheduler, 8786, ours["operator"] + ours["dask operator"])
        assert drawn == []


def make_scheduler_deaf(job: ClusterJob, base: str) -> str:
    """The tenant replaces the scheduler by one whose HTTP API answers 404; returns its address."""
    old = job.running("scheduler")
    routes = 'DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES=["distributed.http.health"]'
    job.kubectl("set", "env", f"deployment/{base}-scheduler", routes)
    job.wait_until(
        lambda: job.running("scheduler") not in ([], old) and len(job.pods("scheduler")) == 1,
        "the new scheduler alone",
    )
    return ip(job.pods("scheduler")[0])


def let_everybody_in(job: ClusterJob) -> None:
    """Policies add up: any that lets somebody in does."""
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "everybody"},
        "spec": {"podSelector": {}, "ingress": [{}]},
    }
    job.cluster.apply(policy, namespace=job.namespace)
    time.sleep(3 * packet_filter.POLL_SECONDS + 1)


def flows_to(record: Recorded, address: str, port: int, sources: list[str]) -> list[Flow]:
    return [
        flow
        for flow in record.flows()
        if flow.destination == address and flow.port == port and flow.source in sources
    ]
