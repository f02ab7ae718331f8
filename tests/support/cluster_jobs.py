"""InfluenceJobs on the test cluster: apply one, wait for its conditions, kill its pods, read its bucket.

Each job's task comes in a ConfigMap (`gated_digits`), so no image is built for a test, and can be stopped at
a gate: an object that the test puts into the job's bucket when the job may go on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
from kubernetes.client import ApiException
from urllib3.exceptions import HTTPError

import stored
from cluster import Cluster, CommandError
from cluster_storage import ENDPOINT, Bucket
from influence_job.storage.store import Store

TASK = Path(__file__).with_name("gated_digits.py")
MISBEHAVING_TASK = TASK.with_name("misbehaving_task.py")
CONFIG_MAP = "gated-digits"
RESOURCE = ("influence-operator.dev", "v1alpha1")
STORE = "result.zarr"
REGIONS = 14
"""Of `BASE`: one group of test chunks, 1400 training examples in chunks of 100."""

BASE: dict[str, Any] = {
    "apiVersion": "influence-operator.dev/v1alpha1",
    "kind": "InfluenceJob",
    "metadata": {"name": "digits"},
    "spec": {
        "task": {
            "entrypoint": "gated_digits:task",
            "arguments": {"hidden": 16},
            "source": {"configMap": {"name": CONFIG_MAP}},
        },
        "method": {"name": "Ekfac", "regularization": 0.01},
        "device": "cpu",
        "chunks": {"test": 100, "train": 100},
        "workers": {"replicas": 2, "resources": {"requests": {"cpu": "50m"}, "limits": {"memory": "2Gi"}}},
        "driver": {"resources": {"requests": {"cpu": "50m", "memory": "256Mi"}}},
        "scheduler": {"resources": {"requests": {"cpu": "50m", "memory": "256Mi"}}},
    },
}
"""A job of some seconds; what it asks for fits a small node several times."""


def unplaced(name: str, **spec: Any) -> dict[str, Any]:
    """A job whose driver no node takes."""
    return {
        "apiVersion": BASE["apiVersion"],
        "kind": BASE["kind"],
        "metadata": {"name": name},
        "spec": {
            "task": {"entrypoint": "influence_job.examples.digits:task"},
            "method": BASE["spec"]["method"],
            "output": {"url": "gs://nowhere/digits.zarr"},
            "driver": {"nodeSelector": {"nobody": "has"}},
        }
        | spec,
    }


def merged(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with nested mappings merged; None removes a field, a `method` is replaced whole."""
    result = deepcopy(document)
    for name, value in changes.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict) and isinstance(result.get(name), dict) and name != "method":
            result[name] = merged(result[name], value)
        else:
            result[name] = value
    return result


def _answered(ask: Callable[[], Any]) -> Any:
    """An answer of the API server without a kubectl process, which costs a tenth of a second of a core.

    Raises:
        CommandError: as kubectl would have ended.
    """
    try:
        return ask()
    except (ApiException, HTTPError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise CommandError(["get"], 1, str(reason).replace(" ", "")) from None


@dataclass(frozen=True)
class ClusterJob:
    """One InfluenceJob, whether or not it exists now."""

    cluster: Cluster
    namespace: str
    bucket: Bucket
    name: str = "digits"

    # -- making it ------------------------------------------------------------------------------

    def manifest(self, **changes: Any) -> dict[str, Any]:
        """The manifest with fields of the spec changed; it writes to this job's bucket."""
        output = {"url": f"{self.bucket.url}/{STORE}", "storageOptions": self.bucket.pod_options}
        document = merged(BASE, {"metadata": {"name": self.name}, "spec": {"output": output}})
        return merged(document, {"spec": changes})

    def apply(self, **changes: Any) -> ClusterJob:
        """Applies task and job as a user does."""
        self.apply_source()
        self.cluster.apply(self.manifest(**changes), namespace=self.namespace)
        return self

    def apply_source(self, task: Path = TASK) -> None:
        """The ConfigMap with the task's module."""
        source = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": CONFIG_MAP},
            "data": {task.name: task.read_text()},
        }
        self.cluster.apply(source, namespace=self.namespace)

    def apply_misbehaving(self, **changes: Any) -> ClusterJob:
        """The job with a task whose module does in the driver what the environment says."""
        self.apply_source(MISBEHAVING_TASK)
        task = {"entrypoint": f"{MISBEHAVING_TASK.stem}:task", "arguments": None}
        self.cluster.apply(self.manifest(task=task, **changes), namespace=self.namespace)
        return self

    def gate(self, path: str, at: str = "gate", pace: float = 0.0) -> dict[str, Any]:
        """Changes of a manifest: whoever writes an object matching `path` waits for `open_gate(at)`.

        Before every region a worker waits for `pace` seconds.
        """
        variables = {
            "GATE_URL": f"{ENDPOINT}/storage/v1/b/{self.bucket.name}/o/{at}",
            "GATE_PATH": path,
            "PACE_SECONDS": str(pace),
        }
        return {"podDefaults": {"env": [{"name": n, "value": v} for n, v in variables.items()]}}

    def at_gate(self, at: str = "gate", seconds: float = 120) -> None:
        """Waits until a process of the job stands at the gate."""

        def reached() -> bool:
            self.not_failed()
            return bool(self.standing(at))

        self.wait_until(reached, f"the gate {at} reached", seconds)

    def standing(self, at: str = "gate", since: int = 0) -> set[str]:
        """Addresses of those who asked at the gate, from entry `since` of the bucket's log on."""
        asked = [r for r in self.bucket.log()[since:] if r.object_name == at]
        return {r.client for r in asked if r.action == "GET" and r.status == 404}

    def open_gate(self, at: str = "gate") -> None:
        self.files.pipe_file(f"{self.bucket.name}/{at}", b"open")

    def patch(self, **changes: Any) -> None:
        """A merge patch of the spec."""
        patch = json.dumps({"spec": changes})
        self.kubectl("patch", "influencejob", self.name, "--type=merge", "--patch", patch)

    def delete(self, wait: bool = True) -> None:
        self.kubectl("delete", "influencejob", self.name, f"--wait={str(wait).lower()}")

    # -- what it says ---------------------------------------------------------------------------

    def kubectl(self, *arguments: str, seconds: float = 120) -> str:
        return self.cluster.kubectl(*arguments, "--namespace", self.namespace, seconds=seconds)

    def get(self) -> dict[str, Any]:
        return _answered(
            lambda: self.cluster.objects.get_namespaced_custom_object(
                *RESOURCE, namespace=self.namespace, plural="influencejobs", name=self.name
            )
        )

    @property
    def uid(self) -> str:
        return str(self.get()["metadata"]["uid"])

    @property
    def status(self) -> dict[str, Any]:
        return self.get().get("status", {})

    def condition(self, kind: str) -> dict[str, Any]:
        """A condition, {} while it is absent."""
        found = [c for c in self.status.get("conditions", []) if c["type"] == kind]
        return found[0] if found else {}

    def is_true(self, kind: str) -> bool:
        return self.condition(kind).get("status") == "True"

    def wait_until(self, predicate: Callable[[], Any], what: str, seconds: float = 120) -> Any:
        return self.cluster.wait_until(predicate, f"{self.name}: {what}", seconds, self.namespace)

    def wait_for(self, kind: str, seconds: float = 180, reason: str = "") -> dict[str, Any]:
        """Waits until a condition is true; fails at once when the job is Failed instead."""

        def there() -> bool:
            if kind != "Failed":
                self.not_failed()
            return self.is_true(kind)

        self.wait_until(there, f"condition {kind}", seconds)
        found = self.condition(kind)
        assert not reason or found["reason"] == reason, found
        return found

    def not_failed(self) -> None:
        """Fails the test when the job has Failed."""
        failed = self.condition("Failed")
        if failed.get("status") == "True":
            raise AssertionError(f"{self.name} failed: {failed}\n{self.cluster.describe(self.namespace)}")

    def complete(self, seconds: float = 240) -> ClusterJob:
        self.wait_for("Complete", seconds)
        return self

    @property
    def attempt(self) -> int:
        return int(self.status.get("attempts", {}).get("current", 0))

    @property
    def counted_failures(self) -> int:
        return int(self.status.get("attempts", {}).get("countedFailures", 0))

    def events(self) -> list[tuple[str, str]]:
        """Type and reason of the job's Events."""
        found = self.cluster.get("events", namespace=self.namespace)
        return [
            (event["type"], event["reason"])
            for event in found
            if event["involvedObject"]["kind"] == "InfluenceJob"
            and event["involvedObject"]["name"] == self.name
        ]

    def events_of(self, kind: str) -> set[tuple[str, str]]:
        """Type and reason of Events about objects of a kind in the job's namespace."""
        found = self.cluster.get("events", namespace=self.namespace)
        return {(e["type"], e["reason"]) for e in found if e["involvedObject"]["kind"] == kind}

    # -- its pods -------------------------------------------------------------------------------

    def children(self, kinds: str) -> list[dict[str, Any]]:
        """Objects of this job, of all its attempts."""
        found: list[dict[str, Any]] = self.cluster.get(
            kinds, namespace=self.namespace, selector=f"influence-operator.dev/job={self.name}"
        )
        return found

    def pods(self, role: str = "") -> list[dict[str, Any]]:
        """Pods that are not being deleted."""
        selector = f"influence-operator.dev/job={self.name}"
        selector += f",influence-operator.dev/role={role}" if role else ""
        answer = _answered(
            lambda: self.cluster.core.list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False
            )
        )
        found = json.loads(answer.data)["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def running(self, role: str) -> list[str]:
        """Names of the pods of a role whose container is ready."""
        return [
            pod["metadata"]["name"]
            for pod in self.pods(role)
            if all(c["ready"] for c in pod["status"].get("containerStatuses", [{"ready": False}]))
        ]

    def kill(self, role: str, count: int = 1) -> list[str]:
        """Deletes pods without grace, and returns their names."""
        names = self.running(role)[:count]
        assert names, f"no {role} runs\n{self.cluster.describe(self.namespace)}"
        self.kubectl("delete", "pods", *names, "--grace-period=0", "--force")
        return names

    def gone(self) -> bool:
        """Whether nothing that carries the job's label is left."""
        kinds = "pods,jobs,daskclusters,deployments,services,configmaps,secrets,networkpolicies"
        try:
            return not self.children(kinds)
        except CommandError:
            return False

    # -- its result -----------------------------------------------------------------------------

    @cached_property
    def files(self) -> Any:
        """The bucket as fsspec's filesystem."""
        return fsspec.filesystem("gs", **self.bucket.options, skip_instance_cache=True)

    def store(self) -> Store:
        return stored.open_store(f"{self.bucket.url}/{STORE}", self.bucket.options)

    def result(self) -> dict[str, bytes]:
        """Every object whose bytes must not depend on how the job was run."""
        with self.store() as store:
            return stored.result(store)

    def held(self) -> set[tuple[str, int]]:
        """Rows of the ledger."""
        with self.store() as store:
            return stored.held(store)

    def held_regions(self) -> set[int]:
        return {index for kind, index in self.held() if kind == "region"}

    def writes_of(self, rows: set[tuple[str, int]]) -> dict[str, int]:
        """How often each object was written that stands for one of the rows."""
        with self.store() as store:
            pattern = stored.held_objects(store, rows).pattern
        return dict(self.bucket.puts(rf"^{STORE}/(?:{pattern})$"))

    def half_done(self, seconds: float = 180) -> set[tuple[str, int]]:
        """Waits at the gate until the ledger holds some regions; these rows must not be computed again."""
        self.at_gate(seconds=seconds)
        deadline = time.monotonic() + 60
        while not (held := self.held_regions()):
            assert time.monotonic() < deadline, self.cluster.describe(self.namespace)
            time.sleep(0.5)
        assert len(held) < REGIONS, "the gate did not hold the job"
        return self.held()
