"""The DaskCluster: a scheduler and one-thread workers, all under the attempt's TLS.

dask-kubernetes makes a Deployment and a Service of the scheduler, a DaskWorkerGroup, and one Deployment per
worker; it puts the cluster's labels and those of each `metadata` on them, into their selectors and on their
pods. Its PodSpec is that of Kubernetes 1.21: quantities are strings, probes name their ports, and what it
does not know vanishes without a word. `idleTimeout` stays away: it speaks pickle.
"""

from __future__ import annotations

from influence_job.document import WORKER_PORT
from influence_operator.manifests import names
from influence_operator.manifests.child import Attempt, Manifest
from influence_operator.manifests.names import DASHBOARD_PORT, SCHEDULER_PORT, Role
from influence_operator.manifests.pods import pod_metadata, pod_spec

HEALTH_PORT = 8788
"""The workers' `/health`."""

# dask-kubernetes and distributed find the scheduler's ports by these names.
_COMM, _HTTP = "tcp-comm", "http-dashboard"

_LEAVE = """\
import json, os, urllib.request
ip = os.environ["POD_IP"]
worker = f"tls://[{ip}]:%(port)d" if ":" in ip else f"tls://{ip}:%(port)d"
urllib.request.urlopen(urllib.request.Request(
    "http://%(scheduler)s.%(namespace)s:%(http)d/api/v1/retire_workers",
    json.dumps({"workers": [worker]}).encode(),
    {"Content-Type": "application/json"},
), timeout=%(seconds)d).read()
"""
_LEAVE_SECONDS = 3


def dask_cluster(attempt: Attempt) -> Manifest:
    """The DaskCluster; after creation only its replicas may change."""
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": attempt.metadata(attempt.base),
        "spec": {
            "scheduler": {
                "metadata": pod_metadata(attempt, Role.SCHEDULER),
                "spec": pod_spec(attempt, Role.SCHEDULER, _scheduler()),
                "service": _service(attempt),
            },
            "worker": {
                "metadata": pod_metadata(attempt, Role.WORKER),
                "replicas": attempt.spec.workers.replicas,
                "spec": pod_spec(attempt, Role.WORKER, _worker(attempt)),
            },
        },
    }


def _service(attempt: Attempt) -> Manifest:
    return {
        "type": "ClusterIP",
        "selector": names.pod_selector(attempt.uid, attempt.number, Role.SCHEDULER),
        "ports": [
            {"name": name, "protocol": "TCP", "port": port, "targetPort": name}
            for name, port in ((_COMM, SCHEDULER_PORT), (_HTTP, DASHBOARD_PORT))
        ],
    }


def _scheduler() -> Manifest:
    health = {"httpGet": {"path": "/health", "port": _HTTP}}
    return {
        "command": [
            *("dask", "scheduler", "--protocol", "tls", "--host", "0.0.0.0"),
            *("--port", str(SCHEDULER_PORT), "--dashboard-address", f":{DASHBOARD_PORT}"),
        ],
        "ports": [
            {"name": _COMM, "containerPort": SCHEDULER_PORT, "protocol": "TCP"},
            {"name": _HTTP, "containerPort": DASHBOARD_PORT, "protocol": "TCP"},
        ],
        "startupProbe": {**health, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 300},
        "livenessProbe": {**health, "periodSeconds": 15, "timeoutSeconds": 10, "failureThreshold": 12},
    }


def _worker(attempt: Attempt) -> Manifest:
    return {
        "command": [
            *("dask", "worker", "--name", "$(DASK_WORKER_NAME)", "--nthreads", "1", "--nworkers", "1"),
            *("--no-nanny", "--worker-port", str(WORKER_PORT), "--memory-limit", "0"),
            *("--no-dashboard", "--dashboard-address", f":{HEALTH_PORT}", "--local-directory", "/tmp"),
        ],
        "ports": [
            {"name": "comm", "containerPort": WORKER_PORT, "protocol": "TCP"},
            {"name": "health", "containerPort": HEALTH_PORT, "protocol": "TCP"},
        ],
        # Ready once it has imported torch and listens, and from then on: a worker that hangs must go on
        # counting as ready, or the job's progress deadline would wait for it.
        "startupProbe": {
            "httpGet": {"path": "/health", "port": "health"},
            "periodSeconds": 1,
            "timeoutSeconds": 5,
            "failureThreshold": 900,
        },
        # A worker that leaves by request takes no suspicion onto its task, and its results are moved.
        "lifecycle": {"preStop": {"exec": {"command": ["python", "-c", _leave(attempt)]}}},
    }


def _leave(attempt: Attempt) -> str:
    return _LEAVE % {
        "port": WORKER_PORT,
        "scheduler": names.scheduler_name(attempt.base),
        "namespace": attempt.namespace,
        "http": DASHBOARD_PORT,
        "seconds": _LEAVE_SECONDS,
    }
