"""What the watches have told: every InfluenceJob, and every child by its job.

Filled by the watches and by the operator's own writes, so that a pass that follows a write sees it before
the watch tells of it. Read by `cluster.gather` and by the reconciler; nothing here speaks to the network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from influence_operator.cluster.kinds import (
    CONFIG_MAP,
    DASK_CLUSTER,
    DASK_WORKER_GROUP,
    DEPLOYMENT,
    INFLUENCE_JOB,
    JOB,
    NETWORK_POLICY,
    POD,
    SERVICE,
    Kind,
)
from influence_operator.decisions.snapshot import Children
from influence_operator.manifests import names
from influence_operator.manifests.config_map import without_contents

Object = Mapping[str, Any]

REMEMBERED_DELETIONS = 10_000
"""UIDs that a late answer to a write of ours must not bring back."""


class JobKey(NamedTuple):
    """An InfluenceJob, which may be gone while children of it are left."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Cache:
    """Objects by UID. An older version never replaces a newer one, but from a list: what the API server keeps
    may have been restored, and is counted on from there.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, Object] = {}
        self._children: dict[JobKey, dict[str, tuple[Kind, Object]]] = {}
        self._places: dict[str, JobKey] = {}
        """Of each child, the job under which it is kept."""
        self._gone: OrderedDict[str, None] = OrderedDict()

    def put(self, kind: Kind, obj: Object, listed: bool = False) -> JobKey | None:
        """Takes up an object as the API server sent it; returns the job that it concerns.

        A list may have been made before a write of ours; the watch that follows it tells of that again.
        """
        key, uid = _key(kind, obj), obj["metadata"]["uid"]
        if key is None or uid in self._gone:
            return key
        if kind == INFLUENCE_JOB:
            self._jobs[uid] = _newer(None if listed else self._jobs.get(uid), _trimmed(kind, obj))
            return key
        if self._places.setdefault(uid, key) != key:
            self._take_out(uid)  # somebody changed its labels
            self._places[uid] = key
        siblings = self._children.setdefault(key, {})
        known = None if listed else siblings.get(uid)
        siblings[uid] = (kind, _newer(known[1] if known else None, _trimmed(kind, obj)))
        return key

    def remove(self, kind: Kind, obj: Object) -> JobKey | None:
        """Forgets an object that is gone for good; returns the job that it concerned."""
        key = _key(kind, obj)
        if key is not None:
            self.forget(obj["metadata"]["uid"])
        return key

    def forget(self, uid: str) -> None:
        """Forgets a child, or a job itself."""
        self._gone[uid] = None
        if len(self._gone) > REMEMBERED_DELETIONS:
            self._gone.popitem(last=False)
        self._jobs.pop(uid, None)
        self._take_out(uid)

    def _take_out(self, uid: str) -> None:
        key = self._places.pop(uid, None)
        if key is None:
            return
        del self._children[key][uid]
        if not self._children[key]:
            del self._children[key]

    def find(self, kind: Kind, obj: Object) -> Object | None:
        """What is known of an object that a watch tells of."""
        key, uid = _key(kind, obj), obj["metadata"]["uid"]
        if kind == INFLUENCE_JOB:
            return self._jobs.get(uid)
        known = self._children.get(key, {}).get(uid) if key else None
        return known[1] if known else None

    def job(self, key: JobKey) -> Object | None:
        """The InfluenceJob, if it is there; a child's label may name another than its UID does."""
        job = self._jobs.get(key.uid)
        return job if job is not None and _key(INFLUENCE_JOB, job) == key else None

    def job_keys(self) -> set[JobKey]:
        """Every job that is there, and every one of which children are left."""
        present = {key for job in self._jobs.values() if (key := _key(INFLUENCE_JOB, job))}
        return present | set(self._children)

    def jobs(self) -> Iterator[Object]:
        """Every InfluenceJob."""
        yield from self._jobs.values()

    def children(self, key: JobKey) -> Children:
        """The job's children of all attempts, each kind in order of name."""
        found: dict[Kind, list[Object]] = {}
        for kind, obj in self._children.get(key, {}).values():
            found.setdefault(kind, []).append(obj)

        def of(kind: Kind) -> tuple[Object, ...]:
            return tuple(sorted(found.get(kind, ()), key=lambda obj: str(obj["metadata"]["name"])))

        return Children(
            config_maps=of(CONFIG_MAP),
            network_policies=of(NETWORK_POLICY),
            driver_jobs=of(JOB),
            dask_clusters=of(DASK_CLUSTER),
            worker_groups=of(DASK_WORKER_GROUP),
            deployments=of(DEPLOYMENT),
            services=of(SERVICE),
            pods=of(POD),
        )

    def child(self, key: JobKey, kind: Kind, name: str) -> Object | None:
        """One child by name."""
        for child_kind, obj in self._children.get(key, {}).values():
            if child_kind == kind and obj["metadata"]["name"] == name:
                return obj
        return None


def _key(kind: Kind, obj: Object) -> JobKey | None:
    metadata = obj["metadata"]
    if kind == INFLUENCE_JOB:
        return JobKey(metadata["namespace"], metadata["name"], metadata["uid"])
    labels = metadata.get("labels") or {}
    if names.JOB_UID not in labels:
        return None
    return JobKey(metadata["namespace"], labels.get(names.JOB, ""), labels[names.JOB_UID])


def _newer(known: Object | None, given: Object) -> Object:
    return given if known is None or version(given) >= version(known) else known


def version(obj: Object) -> int:
    """The resource version as a number; 0 if it is none."""
    # Comparable by promise since Kubernetes 1.35, and numbers of etcd before.
    version = str(obj["metadata"].get("resourceVersion", ""))
    return int(version) if version.isdigit() else 0


def _trimmed(kind: Kind, obj: Object) -> Object:
    """Without what nothing decides by: field managers, and the contents of a task's source (up to 1 MiB)."""
    metadata = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    rest = {key: value for key, value in obj.items() if key != "metadata"}
    if kind == CONFIG_MAP:
        rest = dict(without_contents(obj))
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata} | rest
