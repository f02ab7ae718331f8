"""The DaskCluster against the CRD of dask-kubernetes, and against what its controller makes of it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from dask_kubernetes.operator.controller.controller import (
    build_default_worker_group_spec,
    build_scheduler_deployment_spec,
    build_scheduler_service_spec,
    build_worker_deployment_spec,
)
from dask_kubernetes.operator.validation import validate_cluster_name

from attempts import all_of, build, containers, job, pod_metadata
from dask_crd import cluster_schema, dropped, mistakes
from influence_job.document import WORKER_PORT
from influence_operator.manifests import names


def test_the_crd_of_dask_kubernetes_drops_and_refuses_nothing(everything: Any) -> None:
    for made in (everything, build(job())):
        assert list(dropped(made.dask_cluster, cluster_schema())) == []
        assert list(mistakes(made.dask_cluster, cluster_schema())) == []


def test_the_check_above_finds_a_field_that_came_after_kubernetes_1_21_and_a_number_for_a_quantity() -> None:
    cluster = copy.deepcopy(build(job()).dask_cluster)
    spec = cluster["spec"]["worker"]["spec"]
    spec["schedulingGates"] = [{"name": "x"}]
    spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = 1
    assert list(dropped(cluster, cluster_schema())) == [".spec.worker.spec.schedulingGates"]
    (mistake,) = mistakes(cluster, cluster_schema())
    assert "expected string, got 1" in mistake


def test_it_never_idles_out_and_starts_with_the_replicas_of_the_spec() -> None:
    spec = build(job(workers={"replicas": 7})).dask_cluster["spec"]
    assert "idleTimeout" not in spec
    assert spec["worker"]["replicas"] == 7


def test_the_longest_name_is_accepted_by_dask_kubernetes() -> None:
    stored = job()
    stored["metadata"]["name"] = "j" * 40
    validate_cluster_name(build(stored, attempt=999_999).dask_cluster["metadata"]["name"])


def test_what_the_controller_makes_carries_our_labels_down_to_the_pods(everything: Any) -> None:
    cluster = everything.dask_cluster
    name, spec, common = cluster["metadata"]["name"], cluster["spec"], cluster["metadata"]["labels"]
    scheduler_labels = {**common, **spec["scheduler"]["metadata"]["labels"]}
    worker_labels = {**common, **spec["worker"]["metadata"]["labels"]}
    deployment = build_scheduler_deployment_spec(name, spec["scheduler"]["spec"], {}, scheduler_labels)
    service = build_scheduler_service_spec(name, spec["scheduler"]["service"], {}, scheduler_labels)
    group = build_default_worker_group_spec(name, spec["worker"], {}, worker_labels)
    worker = build_worker_deployment_spec(
        f"{name}-default", "research", name, "0123456789", spec["worker"]["spec"], {}, worker_labels
    )
    assert deployment["metadata"]["name"] == service["metadata"]["name"] == names.scheduler_name(name)
    assert group["metadata"]["name"] == names.worker_group_name(name)
    for made, role in (
        (deployment, "scheduler"),
        (service, "scheduler"),
        (group, "worker"),
        (worker, "worker"),
    ):
        assert made["metadata"]["labels"].items() >= {**common, names.ROLE: role}.items()
    for made in (deployment, worker):
        pod = made["spec"]["template"]["metadata"]["labels"]
        assert pod.items() >= common.items()
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_the_controller_leaves_the_schedulers_address_alone_and_names_the_worker(everything: Any) -> None:
    cluster = everything.dask_cluster
    name, spec = cluster["metadata"]["name"], cluster["spec"]["worker"]["spec"]
    made = build_worker_deployment_spec(f"{name}-default", "research", name, "0123456789", spec, {}, {})
    env = {v["name"]: v.get("value") for v in made["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["DASK_SCHEDULER_ADDRESS"] == names.scheduler_address(name, "research")
    assert env["DASK_WORKER_NAME"] == made["metadata"]["name"]
    assert "$(DASK_WORKER_NAME)" in containers(everything)["worker"]["command"]


def test_the_services_ports_have_the_names_that_dask_kubernetes_looks_for() -> None:
    made = build(job())
    service = made.dask_cluster["spec"]["scheduler"]["service"]
    assert {port["name"]: port["port"] for port in service["ports"]} == {
        "tcp-comm": 8786,
        "http-dashboard": 8787,
    }
    named = {port["name"] for port in containers(made)["scheduler"]["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= named
    assert service["selector"].items() <= pod_metadata(made)["scheduler"]["labels"].items()


def test_a_leaving_worker_asks_to_be_retired() -> None:
    asked: list[tuple[str, bytes]] = []

    class Scheduler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    program = containers(build(job()))["worker"]["lifecycle"]["preStop"]["exec"]["command"]
    with HTTPServer(("127.0.0.1", 0), Scheduler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"{names.scheduler_name('digits-3f2a9-1')}.research:8787"
        code = program[-1].replace(host, f"127.0.0.1:{server.server_port}")
        assert code != program[-1]
        subprocess.run(
            [sys.executable, "-c", code], check=True, env={**os.environ, "POD_IP": "10.0.0.7"}, timeout=30
        )
        server.shutdown()
    assert asked == [("/api/v1/retire_workers", b'{"workers": ["tls://10.0.0.7:%d"]}' % WORKER_PORT)]


@pytest.mark.parametrize("kind", ["Job", "DaskCluster"])
def test_probes_and_services_name_ports_that_the_container_has(everything: Any, kind: str) -> None:
    assert any(manifest["kind"] == kind for manifest in all_of(everything))
    for container in containers(everything).values():
        named = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe"):
            if probe in container:
                assert container[probe]["httpGet"]["port"] in named
