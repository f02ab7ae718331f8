"""The cluster itself: what every other test here takes for granted."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import fsspec
import pytest
from kubernetes import client

import chart
import machine
from cluster import Cluster
from cluster_storage import ENDPOINT, Bucket, ClusterStorage
from pods import finish, phase_of, pod, start


def test_every_node_is_ready(cluster: Cluster) -> None:
    conditions = [
        {c.type: c.status for c in node.status.conditions} for node in cluster.core.list_node().items
    ]
    assert conditions
    assert [c["Ready"] for c in conditions] == ["True"] * len(conditions)


def test_a_pod_of_the_worker_image_has_what_a_job_needs(
    cluster: Cluster, namespace: str, bucket: Bucket
) -> None:
    """The libraries, the example's data, the names of services, a user who is nobody, files that stay."""
    script = f"""
        import json, os, shutil, socket, urllib.request
        import gcsfs, s3fs, torch
        from influence_job.examples import digits
        try:
            open("/opt/venv/own", "w")
        except OSError as error:
            read_only = error.errno == 30
        print(json.dumps({{
            "sum": float(torch.ones(3).sum()), "digits": len(digits.task(epochs=1).train),
            "uid": os.getuid(), "read only": read_only,
            "address": socket.gethostbyname("gcs.influence-storage.svc"),
            "commands": [shutil.which("influence"), shutil.which("dask")],
            "bucket": json.load(urllib.request.urlopen("{ENDPOINT}/storage/v1/b/{bucket.name}"))["name"],
        }}))
    """
    spec = pod(cluster.images.worker.name, "python", "-c", textwrap.dedent(script))
    said = json.loads(finish(cluster, namespace, "worker", spec))
    address = cluster.get("service", "gcs", "influence-storage")["spec"]["clusterIP"]
    assert said == {
        "sum": 3.0,
        "digits": 1400,
        "uid": 65532,
        "read only": True,
        "address": address,
        "commands": ["/opt/venv/bin/influence", "/opt/venv/bin/dask"],
        "bucket": bucket.name,
    }


def test_the_operator_image_holds_no_torch(cluster: Cluster, namespace: str) -> None:
    script = "import importlib.util as u; print([u.find_spec(n) is None for n in ('torch', 'kopf')])"
    spec = pod(cluster.images.operator.name, "python", "-c", script)
    assert finish(cluster, namespace, "operator", spec).strip() == "[True, False]"


def test_a_pod_that_the_restricted_standard_forbids_is_refused(cluster: Cluster, namespace: str) -> None:
    spec = pod(cluster.images.operator.name, "true", securityContext={})
    with pytest.raises(RuntimeError, match="violates PodSecurity"):
        start(cluster, namespace, "forbidden", spec)


def test_pods_are_given_the_gpus_that_the_node_advertises_and_no_more(
    cluster: Cluster, namespace: str
) -> None:
    def asking_for(gpus: int) -> dict[str, Any]:
        resources = {"requests": {"cpu": "10m"}, "limits": {"nvidia.com/gpu": str(gpus)}}
        return pod(cluster.images.operator.name, "sleep", "60", resources=resources)

    start(cluster, namespace, "one", asking_for(1))
    start(cluster, namespace, "too-many", asking_for(1000))
    cluster.wait_until(
        lambda: phase_of(cluster, namespace, "one") == "Running", "one GPU", seconds=60, namespace=namespace
    )
    cluster.wait_until(
        lambda: "Insufficient nvidia.com/gpu" in cluster.kubectl("get", "events", "--namespace", namespace),
        "the scheduler to say that no node has so many",
        seconds=60,
        namespace=namespace,
    )
    assert phase_of(cluster, namespace, "too-many") == "Pending"


def test_the_bucket_refuses_to_create_an_object_twice_and_counts_what_was_written(bucket: Bucket) -> None:
    files = fsspec.filesystem("gs", **bucket.options, skip_instance_cache=True)
    path = f"{bucket.name}/folder/once"
    files.pipe_file(path, b"first", mode="create")
    with pytest.raises(FileExistsError):
        files.pipe_file(path, b"second", mode="create")
    files.pipe_file(f"{bucket.name}/twice", b"a")
    files.pipe_file(f"{bucket.name}/twice", b"b")
    assert files.cat_file(path) == b"first"
    assert bucket.puts() == {"folder/once": 1, "twice": 2}
    assert bucket.puts("^folder/") == {"folder/once": 1}


def test_a_fault_meets_its_bucket_alone(bucket: Bucket, storage: ClusterStorage) -> None:
    other = storage.new_bucket()
    files = fsspec.filesystem("gs", **bucket.options, skip_instance_cache=True)
    bucket.fail_all(403)
    with pytest.raises(OSError, match=r"403|Forbidden"):
        files.pipe_file(f"{bucket.name}/x", b"a")
    files.pipe_file(f"{other.name}/x", b"a")
    bucket.heal()
    files.pipe_file(f"{bucket.name}/x", b"a")
    assert (bucket.puts(), other.puts()) == ({"x": 1}, {"x": 1})


def test_the_dask_operator_makes_a_cluster_of_two_workers(
    cluster: Cluster, namespace: str, dask_operator: None
) -> None:
    image = cluster.images.worker.name
    scheduler = pod(image, "dask", "scheduler", "--host", "0.0.0.0")
    scheduler["containers"][0]["ports"] = [
        {"name": "tcp-comm", "containerPort": 8786},
        {"name": "http-dashboard", "containerPort": 8787},
    ]
    worker = pod(image, "dask", "worker", "--name", "$(DASK_WORKER_NAME)", "--no-nanny", "--nthreads", "1")
    for spec in (scheduler, worker):
        del spec["restartPolicy"]
    service = {
        "selector": {"dask.org/cluster-name": "two", "dask.org/component": "scheduler"},
        "ports": [
            {"name": "tcp-comm", "port": 8786, "targetPort": "tcp-comm"},
            {"name": "http-dashboard", "port": 8787, "targetPort": "http-dashboard"},
        ],
    }
    dask = {"scheduler": {"spec": scheduler, "service": service}, "worker": {"replicas": 2, "spec": worker}}
    two = {"apiVersion": "kubernetes.dask.org/v1", "kind": "DaskCluster", "metadata": {"name": "two"}}
    cluster.apply(two | {"spec": dask}, namespace=namespace)
    script = """
        from dask.distributed import Client
        with Client("tcp://two-scheduler:8786", timeout=60) as client:
            client.wait_for_workers(2, 60)
            print(sum(client.gather(client.map(abs, range(-3, 3)))))
    """
    spec = pod(image, "python", "-c", textwrap.dedent(script))
    cluster.wait_until(
        lambda: cluster.get("service", "two-scheduler", namespace), "the scheduler's name", 60, namespace
    )
    assert finish(cluster, namespace, "client", spec).strip() == "9"


@pytest.mark.host
def test_the_audit_log_tells_who_asked_for_what_and_whether_they_got_it(
    cluster: Cluster, namespace: str
) -> None:
    log = machine.AuditLog()
    stranger = client.CoreV1Api(cluster.api_as("default", namespace))
    with pytest.raises(client.ApiException, match="Forbidden"):
        stranger.list_namespaced_secret(namespace)
    who = f"system:serviceaccount:{namespace}:default"
    (entry,) = cluster.wait_until(lambda: log.entries(who), "the audit log to tell", seconds=10)
    assert entry["verb"] == "list"
    assert entry["objectRef"]["resource"] == "secrets"
    assert entry["annotations"]["authorization.k8s.io/decision"] == "forbid"


@pytest.mark.host
def test_whoever_lacks_the_right_to_finalize_an_owner_may_not_block_its_deletion(
    cluster: Cluster, namespace: str
) -> None:
    """OwnerReferencesPermissionEnforcement, which some clusters have on and ours therefore has."""
    cluster.kubectl(
        "create",
        "rolebinding",
        "edit",
        "--clusterrole=edit",
        "--serviceaccount",
        f"{namespace}:default",
        "--namespace",
        namespace,
    )
    cluster.kubectl("create", "configmap", "owner", "--namespace", namespace)
    owner = cluster.get("configmap", "owner", namespace)["metadata"]["uid"]
    reference = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": "owner",
        "uid": owner,
        "blockOwnerDeletion": True,
    }
    child = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "child", "ownerReferences": [reference]},
    }
    who = ("--namespace", namespace, "--as", f"system:serviceaccount:{namespace}:default")
    with pytest.raises(RuntimeError, match="cannot set blockOwnerDeletion"):
        cluster.kubectl("create", "--filename", "-", *who, stdin=json.dumps(child))


@pytest.mark.host
@pytest.mark.alone
@pytest.mark.parametrize("component", ["kubelet", "containerd", "kube-apiserver", "kube-controller-manager"])
def test_a_component_that_was_killed_comes_back_and_pods_do_not_notice(
    cluster: Cluster, operator: None, namespace: str, component: str
) -> None:
    start(cluster, namespace, "lasting", pod(cluster.images.operator.name, "sleep", "300"))
    cluster.wait_until(lambda: phase_of(cluster, namespace, "lasting") == "Running", "a pod", 60, namespace)
    before = container_of(cluster, namespace)
    with chart.without_api_server(cluster) if component == "kube-apiserver" else machine.down(component):
        pass
    assert container_of(cluster, namespace) == before
    finish(cluster, namespace, "later", pod(cluster.images.operator.name, "true"))


def container_of(cluster: Cluster, namespace: str) -> tuple[str, int]:
    (status,) = cluster.core.read_namespaced_pod("lasting", namespace).status.container_statuses
    return status.container_id, status.restart_count


@pytest.mark.host
@pytest.mark.alone
def test_a_node_whose_kubelet_is_away_counts_as_lost_within_half_a_minute(cluster: Cluster) -> None:
    def ready() -> str:
        (node,) = cluster.core.list_node().items
        return next(c.status for c in node.status.conditions if c.type == "Ready")

    with machine.down("kubelet"):
        cluster.wait_until(lambda: ready() == "Unknown", "the node to count as lost", seconds=40)
    cluster.wait_until(lambda: ready() == "True", "the node to come back", seconds=60)


@pytest.mark.host
@pytest.mark.alone
def test_the_bucket_answers_its_test_again_after_the_api_server_was_away(
    cluster: Cluster, operator: None, bucket: Bucket
) -> None:
    files = fsspec.filesystem("gs", **bucket.options, skip_instance_cache=True)
    files.pipe_file(f"{bucket.name}/before", b"a")
    with chart.without_api_server(cluster):
        pass
    assert bucket.puts() == {"before": 1}
    bucket.fail_all(503)
    bucket.heal()
