"""dask-kubernetes' own DaskJob with the same work as `cluster_jobs.BASE`, for comparison.

A scheduler, workers and a runner from the same image, asking for the same resources; the runner's program is
`plain_dask`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pods
from cluster import Cluster
from cluster_storage import Bucket
from influence_job.dask_settings import SETTINGS, THREAD_SETTINGS

PROGRAM = Path(__file__).with_name("plain_dask.py")
CONFIG_MAP = "plain-dask"
SUCCESSFUL, FAILED = "Successful", "Failed"
STORE = "plain.zarr"
_DASK = ("kubernetes.dask.org", "v1")
_ENVIRONMENT = THREAD_SETTINGS | {
    "HOME": "/tmp",
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    # As long as our own jobs wait for a scheduler on a busy node.
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": str(SETTINGS["distributed.comm.timeouts.connect"]),
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}


@dataclass(frozen=True)
class DaskJob:
    """One DaskJob, whether or not it exists now."""

    cluster: Cluster
    namespace: str
    bucket: Bucket
    name: str

    def apply_program(self) -> None:
        """The ConfigMap with the runner's program."""
        document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CONFIG_MAP}}
        self.cluster.apply(document | {"data": {PROGRAM.name: PROGRAM.read_text()}}, namespace=self.namespace)

    def manifest(self, workers: int = 1) -> dict[str, Any]:
        return {
            "apiVersion": "/".join(_DASK),
            "kind": "DaskJob",
            "metadata": {"name": self.name},
            "spec": {
                "job": {"spec": self._runner(workers)},
                "cluster": {"spec": {"scheduler": self._scheduler(), "worker": self._worker(workers)}},
            },
        }

    @property
    def status(self) -> str:
        """ClusterCreated, Running, Successful or Failed; empty at first."""
        found = self.cluster.objects.get_namespaced_custom_object(
            *_DASK, namespace=self.namespace, plural="daskjobs", name=self.name
        )
        return str(found.get("status", {}).get("jobStatus", ""))

    def _runner(self, workers: int) -> dict[str, Any]:
        variables = {
            "OUTPUT_URL": f"{self.bucket.url}/{STORE}",
            "STORAGE_OPTIONS": json.dumps(self.bucket.pod_options),
            "WORKERS": str(workers),
        }
        spec = self._pod("python", f"/program/{PROGRAM.name}", variables=variables)
        spec["volumes"].append({"name": "program", "configMap": {"name": CONFIG_MAP}})
        spec["containers"][0]["volumeMounts"].append({"name": "program", "mountPath": "/program"})
        return spec

    def _scheduler(self) -> dict[str, Any]:
        ports = {"tcp-comm": 8786, "http-dashboard": 8787}
        health = {"httpGet": {"path": "/health", "port": "http-dashboard"}, "periodSeconds": 1}
        spec = self._pod(
            *("dask", "scheduler", "--host", "0.0.0.0", "--dashboard-address", ":8787"),
            ports=[{"name": name, "containerPort": port} for name, port in ports.items()],
            readinessProbe=health,
        )
        service = {
            "type": "ClusterIP",
            "selector": {"dask.org/cluster-name": self.name, "dask.org/component": "scheduler"},
            "ports": [
                {"name": name, "protocol": "TCP", "port": port, "targetPort": name}
                for name, port in ports.items()
            ],
        }
        return {"spec": spec | {"restartPolicy": "Always"}, "service": service}

    def _worker(self, replicas: int) -> dict[str, Any]:
        spec = self._pod(
            *("dask", "worker", "--name", "$(DASK_WORKER_NAME)", "--nthreads", "1", "--no-nanny"),
            *("--memory-limit", "0", "--no-dashboard", "--local-directory", "/tmp"),
        )
        return {"replicas": replicas, "spec": spec | {"restartPolicy": "Always"}}

    def _pod(
        self, *command: str, variables: Mapping[str, str] = MappingProxyType({}), **container: Any
    ) -> dict[str, Any]:
        resources = {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}}
        env = [{"name": name, "value": value} for name, value in {**_ENVIRONMENT, **variables}.items()]
        image = self.cluster.images.worker.name
        return pods.pod(image, *command, env=env, resources=resources, **container)
