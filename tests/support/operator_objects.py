"""Raw Kubernetes objects of one InfluenceJob, as an API server would send them, and a world made of them.

The world does what a decision says, so that a test can tell a story: pods start, a driver ends, a minute
passes. What controllers do (dask-kubernetes, the kubelet, the garbage collector) a test says itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import kopf
from kopf._cogs.configs.progress import ProgressRecord
from kopf._cogs.structs.ids import HandlerId

from influence_job.progress import Progress
from influence_operator.decisions.actions import (
    Action,
    Create,
    Decision,
    Delete,
    Patch,
    RemoveFinalizer,
)
from influence_operator.decisions.decide import decide
from influence_operator.decisions.snapshot import Children, DriverReport, Snapshot
from influence_operator.settings import Defaults, Settings
from manifests import manifest

Object = dict[str, Any]

UID = "0a1b2c3d-0000-4000-8000-00000000beef"
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
SETTINGS = Settings(Defaults(image="registry.example/worker:1"))
FINALIZER = "kopf.zalando.org/KopfFinalizerMarker"

_LISTS = {
    "ConfigMap": "config_maps",
    "NetworkPolicy": "network_policies",
    "Job": "driver_jobs",
    "DaskCluster": "dask_clusters",
    "DaskWorkerGroup": "worker_groups",
    "Deployment": "deployments",
    "Service": "services",
    "Pod": "pods",
}


def stamp(time: datetime) -> str:
    """As Kubernetes writes times."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def influence_job(**spec: Any) -> Object:
    """A stored InfluenceJob that nobody has looked at yet."""
    job = manifest(**spec)
    job["metadata"] |= {"namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "7"}
    return job | {"status": {"observedGeneration": -1}}


def base(attempt: int) -> str:
    """The name of an attempt's children."""
    return f"digits-{UID[:5]}-{attempt}"


def labels(attempt: int, role: str = "") -> dict[str, str]:
    """Our labels."""
    prefix = "influence-operator.dev/"
    own = {f"{prefix}job-uid": UID, f"{prefix}job": "digits", f"{prefix}attempt": str(attempt)}
    return own | ({f"{prefix}role": role} if role else {})


def child(kind: str, name: str, attempt: int, owner: str, role: str = "", **more: Any) -> Object:
    """An object of an attempt; its UID says what it is."""
    metadata = {
        "name": name,
        "namespace": "team",
        "uid": f"uid-of-{kind}-{name}",
        "labels": labels(attempt, role),
        "ownerReferences": [{"uid": owner}],
        "creationTimestamp": stamp(NOW),
    }
    return {"kind": kind, "metadata": metadata, **more}


def pod(attempt: int, role: str, name: str = "", owner: str = "", **status: Any) -> Object:
    """A pod that runs and is ready, unless `status` says otherwise."""
    owner = owner or (f"uid-of-Job-{base(attempt)}" if role == "driver" else "a-replica-set")
    running = {
        "phase": "Running",
        "podIP": "10.0.0.1",
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [{"name": role, "state": {"running": {}}}],
    }
    return child("Pod", name or f"{base(attempt)}-{role}", attempt, owner, role, status=running | status)


def waiting(role: str, reason: str, message: str = "") -> dict[str, Any]:
    """The status of a pod whose container waits."""
    state = {"waiting": {"reason": reason, "message": message}}
    return {
        "phase": "Pending",
        "conditions": [{"type": "Ready", "status": "False"}],
        "containerStatuses": [{"name": role, "state": state}],
    }


def unschedulable(message: str, since: datetime) -> dict[str, Any]:
    """The status of a pod that no node takes."""
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
        "lastTransitionTime": stamp(since),
    }
    return {"phase": "Pending", "conditions": [condition], "containerStatuses": []}


def terminated(
    role: str, code: int, message: str = "", at: datetime = NOW, reason: str = ""
) -> dict[str, Any]:
    """The status of a pod whose container has ended."""
    state = {"exitCode": code, "message": message, "reason": reason, "finishedAt": stamp(at)}
    return {
        "phase": "Succeeded" if code == 0 else "Failed",
        "conditions": [{"type": "Ready", "status": "False"}],
        "containerStatuses": [{"name": role, "state": {"terminated": state}}],
    }


def progress(attempt: int = 1, **fields: Any) -> Progress:
    """A driver's document, by the names of its JSON."""
    document = {"contractVersion": 1, "jobUid": UID, "attempt": attempt, "recorded": 0} | fields
    return Progress.model_validate(document)


def words(**fields: Any) -> str:
    """A driver's termination message."""
    return progress(**fields).model_dump_json(by_alias=True)


def problem(reason: str, message: str) -> dict[str, str]:
    """`lastError` of a progress document."""
    return {"reason": reason, "message": message}


@dataclass
class World:
    """A cluster with one job; tests change it, decisions change it."""

    job: Object = field(default_factory=influence_job)
    now: datetime = NOW
    objects: list[Object] = field(default_factory=list)
    report: Progress | None = None
    """What the driver answers at /progress, while its pod is there."""
    problem: str = ""
    """Why it cannot be read, if it cannot be."""
    unread_since: datetime | None = None
    """Since when, of a driver that is ready."""
    looked: datetime | None = None
    """When this process last made a pass; None for a new operator."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of the snapshot."""
    settings: Settings = SETTINGS
    """The operator's."""
    events: list[str] = field(default_factory=list)
    """Reasons of all Events so far."""

    @property
    def status(self) -> dict[str, Any]:
        """The stored status."""
        status: dict[str, Any] = self.job["status"]
        return status

    @property
    def attempt(self) -> int:
        """The number of the present attempt."""
        number: int = self.status["attempts"]["current"]
        return number

    def snapshot(self) -> Snapshot:
        """What a pass would see."""
        lists: dict[str, list[Object]] = {name: [] for name in _LISTS.values()}
        for thing in self.objects:
            lists[_LISTS[thing["kind"]]].append(thing)
        children = Children(**{name: tuple(things) for name, things in lists.items()})
        report = None
        if self.problem and self.find("Pod", "driver"):
            report = DriverReport(self.attempt, None, self.problem, self.unread_since)
        elif self.report and self.find("Pod", "driver"):
            report = DriverReport(self.report.attempt, self.report)
        return Snapshot(self.job, children, self.now, driver=report, looked=self.looked, **self.more)

    def decide(self) -> Decision:
        """What would be done."""
        return decide(self.snapshot(), self.settings)

    def step(self, seconds: float = 0.0) -> Decision:
        """Time passes, and one pass is made."""
        self.now += timedelta(seconds=seconds)
        decision = self.decide()
        self.looked = self.now if decision.again_after else None
        self.job = copy.deepcopy(self.job) | {"status": json.loads(json.dumps(decision.status))}
        self.events += [event.reason for event in decision.events]
        for action in decision.actions:
            self._do(action)
        return decision

    def unreadable(self, problem: str) -> None:
        """From now on the driver's `/progress` cannot be read."""
        self.problem, self.unread_since = problem, self.now

    def change(self, **spec: Any) -> None:
        """The user changes the spec."""
        self.job = copy.deepcopy(self.job)
        self.job["spec"] |= spec
        self.job["metadata"]["generation"] += 1

    def add(self, *things: Object) -> None:
        """Objects come, each in the place of one with its name."""
        for thing in things:
            self.objects = [o for o in self.objects if _key(o) != _key(thing)]
            self.objects.append(thing)

    def remove(self, kind: str, name: str = "") -> None:
        """Objects go."""
        self.objects = [o for o in self.objects if o["kind"] != kind or name not in o["metadata"]["name"]]

    def find(self, kind: str, name: str = "") -> list[Object]:
        """Objects of a kind whose name holds `name`."""
        return [o for o in self.objects if o["kind"] == kind and name in o["metadata"]["name"]]

    def condition(self, kind: str) -> str:
        """`True Reason`; empty for a condition that is absent."""
        for condition in self.status.get("conditions", ()):
            if condition["type"] == kind:
                return f"{condition['status']} {condition['reason']}"
        return ""

    def message(self, kind: str) -> str:
        """The message of a condition."""
        return next(c["message"] for c in self.status["conditions"] if c["type"] == kind)

    def _do(self, action: Action) -> None:
        match action:
            case Create():
                self.add(self._stored(action.manifest))
            case Delete(kind=kind, name=name):
                self.objects = [o for o in self.objects if (o["kind"], o["metadata"]["name"]) != (kind, name)]
            case RemoveFinalizer(name=name):
                self.remove("DaskCluster", name)
            case Patch(kind=kind, name=name, patch=patch):
                (thing,) = self.find(kind, name)
                _merge(thing, patch)

    def _stored(self, made: Mapping[str, Any]) -> Object:
        stored: Object = copy.deepcopy(dict(made))
        uid = f"uid-of-{stored['kind']}-{stored['metadata']['name']}"
        stored["metadata"] |= {"uid": uid, "creationTimestamp": stamp(self.now)}
        return stored


def _key(thing: Object) -> tuple[str, str]:
    return thing["kind"], thing["metadata"]["name"]


def _merge(target: Object, patch: Mapping[str, Any]) -> None:
    for name, value in patch.items():
        if isinstance(value, Mapping):
            _merge(target.setdefault(name, {}), value)
        else:
            target[name] = value


def dask_parts(attempt: int, workers: int) -> list[Object]:
    """What dask-kubernetes makes of an attempt's DaskCluster."""
    cluster, group = f"uid-of-DaskCluster-{base(attempt)}", f"{base(attempt)}-default"
    scheduler = f"{base(attempt)}-scheduler"
    return [
        child("Deployment", scheduler, attempt, cluster, "scheduler"),
        child("Service", scheduler, attempt, cluster, "scheduler"),
        child("DaskWorkerGroup", group, attempt, cluster, spec={"worker": {"replicas": workers}}),
        *(worker_deployment(attempt, index) for index in range(workers)),
    ]


def kept_by_kopf(thing: Object, handler: str, message: str) -> None:
    """dask-kubernetes' handler of `thing` failed and will be repeated: kopf keeps so in annotations."""
    record = ProgressRecord(
        started=stamp(NOW),
        stopped=None,
        delayed=stamp(NOW + timedelta(seconds=60)),
        purpose="create",
        retries=1,
        success=False,
        failure=False,
        message=message,
        subrefs=None,
    )
    body, patch = kopf.Body(thing), kopf.Patch()
    kopf.AnnotationsProgressStorage().store(key=HandlerId(handler), record=record, body=body, patch=patch)
    thing["metadata"]["annotations"] = dict(patch["metadata"]["annotations"])


def worker_deployment(attempt: int, index: int) -> Object:
    """A worker's Deployment."""
    group = f"uid-of-DaskWorkerGroup-{base(attempt)}-default"
    return child("Deployment", worker_name(attempt, index), attempt, group, "worker")


def worker_name(attempt: int, index: int) -> str:
    """The name of a worker's Deployment."""
    return f"{base(attempt)}-default-worker-{index:04}"


def started(**spec: Any) -> World:
    """A job whose first attempt has its driver Job and a driver that runs."""
    world = World(influence_job(**spec))
    world.step()
    world.add(pod(1, "driver"))
    world.report = progress(1)
    return world


def computing(workers: int = 2, **spec: Any) -> World:
    """A job in the middle of its scores."""
    world = started(**spec | {"workers": {"replicas": workers}})
    world.report = progress(1, workersNeeded=True, stage="Loading")
    world.step(1)
    (cluster,) = world.find("DaskCluster")
    cluster["status"] = {"phase": "Running"}
    world.add(*dask_parts(1, workers), pod(1, "scheduler"))
    world.add(*(pod(1, "worker", worker_name(1, index)) for index in range(workers)))
    world.report = progress(
        1,
        workersNeeded=True,
        stage="Scores",
        regions={"done": 10, "total": 100},
        recorded=10,
        rate=2.0,
        etaSeconds=45.0,
        workers=workers,
    )
    world.step(10)
    return world


def driver_ends(world: World, code: int, message: str = "", reason: str = "") -> None:
    """The driver's container ends, and the Job's controller has drawn the conclusion."""
    number = world.attempt
    world.add(pod(number, "driver", **terminated("driver", code, message, world.now, reason)))
    world.report = None
    (job,) = world.find("Job")
    kind = "Complete" if code == 0 else "Failed"
    job["status"] = {"conditions": [{"type": kind, "status": "True"}]}


def pods_end(world: World) -> None:
    """What was deleted has gone, with everything that it owned."""
    world.remove("Pod")
    for kind in ("Deployment", "Service", "DaskWorkerGroup"):
        world.remove(kind)
