"""Who gets at a running job, and what its pods may do: certificates, tokens, labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from kubernetes import client

import pods
from cluster import Cluster
from cluster_jobs import ClusterJob
from cluster_storage import ClusterStorage
from influence_operator.cluster.certificates import attempt_material
from influence_operator.manifests import names

pytestmark = pytest.mark.usefixtures("operator")

Object = dict[str, Any]

LATE_REGIONS = r"^influences/c/0/(9|1\d)$"
"""What the gate holds back: the regions from the tenth on."""
TOKEN_FOLDER = "/tokens"
TOKEN_VOLUME = {
    "volumes": [
        {
            "name": "bucket-token",
            "projected": {
                "sources": [{"serviceAccountToken": {"audience": "https://bucket", "path": "token"}}]
            },
        }
    ],
    "volumeMounts": [{"name": "bucket-token", "mountPath": TOKEN_FOLDER, "readOnly": True}],
}
"""A token for a bucket, as workload identity has it: the only one that a job's pods may hold."""


# -- a job that stands at its gate ---------------------------------------------------------------


@pytest.fixture(scope="module")
def running(cluster: Cluster, operator: None, storage: ClusterStorage) -> Iterator[ClusterJob]:
    """Driver, scheduler and two workers, each with a token for a bucket."""
    namespace = cluster.make_namespace()
    job = ClusterJob(cluster, namespace, storage.new_bucket())
    gate = job.gate(LATE_REGIONS)
    try:
        job.apply(podDefaults=gate["podDefaults"] | TOKEN_VOLUME)
        job.at_gate()
        yield job
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def test_a_client_without_the_attempts_certificate_is_refused_by_scheduler_and_worker(
    running: ClusterJob,
) -> None:
    """From the driver's pod, which the NetworkPolicies let through."""
    now = datetime.now(UTC)
    (scheduler,), worker = running.pods("scheduler"), running.pods("worker")[0]
    addresses = [f"{scheduler['status']['podIP']}:8786", f"{worker['status']['podIP']}:40000"]
    script = """
        import asyncio, json, os, pathlib, sys, tempfile
        material, addresses = json.loads(sys.argv[1]), json.loads(sys.argv[2])
        own, foreign = pathlib.Path("/etc/influence/tls"), pathlib.Path(tempfile.mkdtemp())
        for name, text in material.items():
            (foreign / name).write_text(text)
        for name in [name for name in os.environ if name.startswith("DASK_")]:
            del os.environ[name]
        from distributed import Security
        from distributed.core import rpc

        async def identity(address, **given):
            try:
                connection = Security(**given).get_connection_args("client") if given else {}
                async with rpc(address, connection_args=connection, timeout=10) as remote:
                    return (await asyncio.wait_for(remote.identity(), 10))["type"]
            except Exception as error:
                return type(error).__name__ + "!"

        def files(ca, certificate=None):
            given = {"require_encryption": True, "tls_ca_file": str(ca / "ca.crt")}
            if certificate:
                given |= {"tls_client_cert": str(certificate / "tls.crt")}
                given |= {"tls_client_key": str(certificate / "tls.key")}
            return given

        async def main():
            tries = [files(own, own), files(own), files(own, foreign), files(foreign, foreign)]
            found = []
            for address in addresses:
                answers = [await identity("tls://" + address, **given) for given in tries]
                found.append([*answers, await identity("tcp://" + address)])
            print(json.dumps(found))

        asyncio.run(main())
    """
    material = attempt_material("another", now, now + timedelta(days=1))
    driver = running.running("driver")[0]
    said = pods.python(
        running.cluster, running.namespace, driver, script, json.dumps(material), json.dumps(addresses)
    )
    for answers, kind in zip(said, ("Scheduler", "Worker"), strict=True):
        assert answers[0] == kind, "the attempt's own certificate is let in"
        assert len(answers) == 5
        assert all(answer.endswith("!") for answer in answers[1:]), answers


FIND_TOKENS = r"""
    import json, os, re
    token = re.compile(rb"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}")
    kernel = {"proc", "sysfs", "cgroup", "cgroup2", "mqueue", "devpts", "overlay"}
    mounts = [line.split()[:3] for line in open("/proc/mounts")]
    found = {}
    for _, folder, kind in mounts:
        inside = [(folder, [], [""])] if os.path.isfile(folder) else os.walk(folder)
        for place, _, files in inside if kind not in kernel else ():
            for path in (os.path.join(place, name).rstrip("/") for name in files):
                try:
                    if not os.path.isfile(path) or os.path.getsize(path) > 1_000_000:
                        continue
                    with open(path, "rb") as file:
                        tokens = token.findall(file.read())
                except OSError:
                    continue
                found |= {t.decode(): path for t in tokens}
    for t in token.findall("\n".join(os.environ.values()).encode()):
        found[t.decode()] = "environment"
    print(json.dumps(found))
"""


def accepted(cluster: Cluster, token: str) -> bool:
    """Whether the API server takes the token for anybody."""
    settings = client.Configuration()
    settings.host = cluster.api.configuration.host
    settings.ssl_ca_cert = cluster.api.configuration.ssl_ca_cert
    settings.api_key["authorization"] = f"Bearer {token}"
    try:
        client.AuthenticationV1Api(client.ApiClient(settings)).create_self_subject_review(
            client.V1SelfSubjectReview()
        )
    except client.ApiException as error:
        if error.status != 401:
            raise
        return False
    return True


def test_every_token_in_a_pod_of_a_job_is_refused_by_the_api_server(running: ClusterJob) -> None:
    cluster, namespace = running.cluster, running.namespace
    found_pods = [pod for role in names.Role for pod in running.running(role)]
    assert len(found_pods) == 4
    for pod in found_pods:
        found = pods.python(cluster, namespace, pod, FIND_TOKENS)
        assert [path.startswith(TOKEN_FOLDER) for path in found.values()] == [True], found
        assert not any(accepted(cluster, token) for token in found), pod


def test_a_token_that_the_api_server_takes_would_have_been_found(cluster: Cluster, namespace: str) -> None:
    spec = pods.pod(cluster.images.operator.name, "sleep", "300")
    pods.start(cluster, namespace, "ordinary", spec | {"automountServiceAccountToken": True})
    cluster.kubectl(
        "wait", "pod/ordinary", "--for=condition=Ready", "--timeout=60s", "--namespace", namespace
    )
    found = pods.python(cluster, namespace, "ordinary", FIND_TOKENS)
    assert [accepted(cluster, token) for token in found] == [True]


def test_every_pod_of_a_job_runs_where_pods_are_restricted(running: ClusterJob) -> None:
    labels = running.cluster.get("namespace", running.namespace)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {role: len(running.running(role)) for role in names.Role} == {
        "driver": 1,
        "scheduler": 1,
        "worker": 2,
    }
    spec = pods.pod(running.cluster.images.operator.name, "true") | {"securityContext": {}}
    with pytest.raises(RuntimeError, match=r"violates PodSecurity \"restricted"):
        pods.start(running.cluster, running.namespace, "unrestricted", spec)


def test_what_others_label_as_a_jobs_changes_nothing(running: ClusterJob, namespace: str) -> None:
    """Labels are anybody's to set: in the job's namespace under another name, and in another namespace."""
    before = running.status["attempts"]
    uid = running.uid
    spoofed = [
        (namespace, names.labels("digits", uid, 1)),
        (namespace, names.labels("digits", uid, 7)),
        (running.namespace, names.labels("somebody-else", uid, 1)),
        (running.namespace, names.labels("digits", uid, 7)),
        (running.namespace, names.labels("digits", "00000000-0000-4000-8000-000000000000", 1)),
    ]
    for number, (where, labels) in enumerate(spoofed):
        for kind in ("ConfigMap", "Service"):
            metadata = {"name": f"spoofed-{number}", "labels": labels}
            body = {"spec": {"ports": [{"port": 80}]}} if kind == "Service" else {}
            thing = {"apiVersion": "v1", "kind": kind, "metadata": metadata}
            running.cluster.apply(thing | body, namespace=where)
    drivers = running.running("driver")
    with pytest.raises(AssertionError, match="waited"):
        running.cluster.wait_until(
            lambda: running.status["attempts"] != before or running.running("driver") != drivers,
            "the job disturbed",
            seconds=15,
        )
    owned = [job["metadata"]["name"] for job in running.children("jobs")]
    assert owned == [names.base_name("digits", uid, 1)]
    assert running.is_true("Ready")
