"""A Google Cloud Storage emulator in the test cluster, with a bucket per test.

Jobs reach it at `ENDPOINT`, the test's process through a relay or a port-forward. Before it stands the
faulty proxy (`storage_pod`): it keeps the log of requests, from which tests count what was written, and fails
as real storage does, for one bucket at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from cluster import Cluster, tool
from faulty_proxy import Request
from host_tests import CLUSTER_VARIABLE

NAMESPACE = "influence-storage"
PORT, CONTROL_PORT = 4443, 4444
ENDPOINT = f"http://gcs.{NAMESPACE}.svc:{PORT}"
"""For pods."""
PATIENCE_SECONDS = 60.0
_BEHIND = "127.0.0.1:4400"
_SCRIPTS = ("faulty_proxy.py", "storage_pod.py")


def install(cluster: Cluster) -> None:
    """Deploys emulator and proxy; what runs unchanged keeps its buckets."""
    cluster.make_namespace(NAMESPACE)
    scripts = {name: (Path(__file__).parent / name).read_text() for name in _SCRIPTS}
    digest = hashlib.sha256(json.dumps(scripts).encode()).hexdigest()[:10]
    cluster.apply(*_manifests(cluster, f"proxy-{digest}", scripts), namespace=NAMESPACE)
    cluster.kubectl("--namespace", NAMESPACE, "rollout", "status", "deployment/gcs", "--timeout=120s")


class ClusterStorage:
    """The emulator as the test's process sees it."""

    def __init__(self, cluster: Cluster) -> None:
        self._forward = _way_to(cluster)
        self._logs: defaultdict[str, list[Request]] = defaultdict(list)

    @property
    def endpoint(self) -> str:
        """For the test's own process."""
        return self._forward.url(PORT)

    def new_bucket(self) -> Bucket:
        """Makes an empty one."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self._ask(PORT, "/storage/v1/b?project=test", {"name": name})
        return Bucket(name, self)

    def call(self, bucket: str, method: str, *arguments: Any) -> None:
        """Calls a method of the proxy."""
        call = {"method": method, "arguments": arguments, "bucket": bucket}
        self._ask(CONTROL_PORT, "/call", call)

    def log(self, bucket: str) -> list[Request]:
        """What was asked of a bucket since the emulator started."""
        seen = self._logs[bucket]
        question = urllib.parse.urlencode({"bucket": bucket, "since": len(seen)})
        seen += [Request(**r) for r in self._ask(CONTROL_PORT, f"/log?{question}")]
        return list(seen)

    def _ask(self, port: int, path: str, content: Any = None) -> Any:
        """Tries again while the way is broken: tests take the API server away, and the forward with it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return _request(f"{self._forward.url(port)}{path}", content)
            except urllib.error.HTTPError:
                raise
            except (OSError, http.client.HTTPException):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def close(self) -> None:
        self._forward.close()


@dataclass(frozen=True)
class Bucket:
    """A bucket of one test; the methods that make faults are `FaultyProxy`'s."""

    name: str
    storage: ClusterStorage

    @property
    def url(self) -> str:
        return f"gs://{self.name}"

    @property
    def pod_options(self) -> dict[str, Any]:
        """`output.storageOptions` for a job in the cluster."""
        return {"endpoint_url": ENDPOINT, "token": "anon", "project": "test"}

    @property
    def options(self) -> dict[str, Any]:
        """The same for the test's own process."""
        return self.pod_options | {"endpoint_url": self.storage.endpoint}

    def log(self) -> list[Request]:
        """Every request so far."""
        return self.storage.log(self.name)

    def puts(self, matching: str = "") -> Counter[str]:
        """How often each object whose name matches was written."""
        done = [r.object_name for r in self.log() if r.action == "PUT" and r.reached]
        return Counter(name for name in done if re.search(matching, name))

    def fail_every(self, n: int, *statuses: int) -> None:
        self.storage.call(self.name, "fail_every", n, *statuses)

    def fail_all(self, status: int, matching: str = "") -> None:
        self.storage.call(self.name, "fail_all", status, matching)

    def lose_answers(self, count: int, matching: str = "") -> None:
        self.storage.call(self.name, "lose_answers", count, matching)

    def go_down(self) -> None:
        self.storage.call(self.name, "go_down")

    def heal(self) -> None:
        self.storage.call(self.name, "heal")


def _way_to(cluster: Cluster) -> machine.Relay | PortForward:
    """In our own cluster one that stands while API server and kubelet are away."""
    if CLUSTER_VARIABLE in os.environ:
        return PortForward(cluster, NAMESPACE, "service/gcs", PORT, CONTROL_PORT)
    service = cluster.core.read_namespaced_service("gcs", NAMESPACE)
    return machine.Relay(service.spec.cluster_ip, PORT, CONTROL_PORT)


class PortForward:
    """Ports of a pod or service at 127.0.0.1, by `kubectl port-forward`, started again when it has ended."""

    def __init__(self, cluster: Cluster, namespace: str, target: str, *ports: int) -> None:
        self._ports = {port: _free_port() for port in ports}
        self._command = [
            *(tool("kubectl"), "--kubeconfig", str(cluster.kubeconfig), "--namespace", namespace),
            *("port-forward", target, *(f"{local}:{port}" for port, local in self._ports.items())),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, port: int) -> str:
        """Where the port answers now; the same after every restart."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        return f"http://127.0.0.1:{self._ports[port]}"

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=10)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                for local in self._ports.values():
                    socket.create_connection(("127.0.0.1", local), timeout=1).close()
                return
            time.sleep(0.05)
        self.close()
        raise ConnectionError(f"{' '.join(self._command[3:])} did not open its ports")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _request(url: str, content: Any = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def _manifests(cluster: Cluster, config_map: str, scripts: dict[str, str]) -> list[dict[str, Any]]:
    labels = {"app": "gcs"}
    ports = [{"name": "storage", "port": PORT}, {"name": "control", "port": CONTROL_PORT}]
    service = {"selector": labels, "ports": ports, "publishNotReadyAddresses": True}  # while its node is lost
    deployment = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": _pod(cluster, config_map)},
    }
    kinds = {"Service": ("v1", service), "Deployment": ("apps/v1", deployment)}
    named = [
        {"apiVersion": version, "kind": kind, "metadata": {"name": "gcs"}, "spec": spec}
        for kind, (version, spec) in kinds.items()
    ]
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": config_map}, "data": scripts},
        *named,
    ]


def _pod(cluster: Cluster, config_map: str) -> dict[str, Any]:
    secure = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    small = {"requests": {"cpu": "20m", "memory": "64Mi"}}
    emulator = {
        "name": "emulator",
        "image": cluster.images.gcs.name,
        "args": [
            *("-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", "4400"),
            *("-public-host", _BEHIND, "-external-url", f"http://{_BEHIND}", "-log-level", "error"),
        ],
        "securityContext": secure,
        "resources": small,
    }
    proxy = {
        "name": "proxy",
        "image": cluster.images.dask_operator.name,  # has Python, and changes less often than our own
        "command": ["python3", "/proxy/storage_pod.py", f"http://{_BEHIND}", str(PORT), str(CONTROL_PORT)],
        "readinessProbe": {
            "httpGet": {"path": "/storage/v1/b?project=test", "port": PORT},
            "periodSeconds": 1,
        },
        "securityContext": secure,
        "resources": small,
        "volumeMounts": [{"name": "scripts", "mountPath": "/proxy"}],
    }
    return {
        "containers": [emulator, proxy],
        "volumes": [{"name": "scripts", "configMap": {"name": config_map}}],
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [{"operator": "Exists"}],  # stays through tests that lose the node
    }
