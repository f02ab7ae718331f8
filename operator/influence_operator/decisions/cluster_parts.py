"""What dask-kubernetes made of an attempt's DaskCluster, and what it left out.

Its `status.phase` lies, so that the objects themselves are counted. Read by scaling and healing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from influence_operator.decisions import observed
from influence_operator.decisions.course import Course
from influence_operator.decisions.snapshot import Object
from influence_operator.decisions.view import View
from influence_operator.manifests import names

_KOPF = "kopf.zalando.org/"
_LAST_HANDLED = f"{_KOPF}last-handled-configuration"
_BATCH = "Added maximum number of workers"
"""What a handler that makes workers in batches ends with: no error."""


@dataclass(frozen=True)
class ClusterParts:
    """The parts of a DaskCluster that is to stay."""

    cluster: Object
    missing: tuple[str, ...]
    """Parts that dask-kubernetes makes once and that are not there."""
    wanted: int
    """Workers that the job asks for."""
    asked: int
    """Workers that the DaskCluster asks for."""
    grouped: int
    """Workers that the DaskWorkerGroup asks for: the DaskCluster's number as of some moments ago."""
    deployments: tuple[str, ...]
    """Of workers, those that are being deleted left out."""
    unfinished: bool
    """Whether dask-kubernetes has noted on the DaskWorkerGroup what it has yet to do, or to repeat."""
    failure: str
    """What dask-kubernetes was told when it last failed to make a part, which it repeats; else empty."""

    @property
    def settled(self) -> bool:
        """Whether dask-kubernetes has carried out what it was last asked for."""
        return self.asked == self.grouped == len(self.deployments)

    @property
    def too_many(self) -> int:
        """Workers that are to go."""
        return max(0, len(self.deployments) - self.wanted)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be made, changed or taken away."""
        return not self.missing and self.settled and self.asked == self.wanted

    @property
    def phase(self) -> str:
        """Empty until a controller has taken the DaskCluster up."""
        return observed.text(self.cluster, "status", "phase")


def cluster_parts(view: View, course: Course) -> ClusterParts | None:
    """The parts, if the open attempt has a DaskCluster that is to stay."""
    cluster = view.cluster(course.number) if course.open else None
    if cluster is None or observed.being_deleted(cluster):
        return None
    group = view.worker_group(course.number)
    scheduler = names.scheduler_name(view.base(course.number))
    children = view.of(course.number)
    there = {
        f"Deployment {scheduler}": _has(children.deployments, scheduler),
        f"Service {scheduler}": _has(children.services, scheduler),
        f"DaskWorkerGroup {names.worker_group_name(view.base(course.number))}": group is not None,
    }
    return ClusterParts(
        cluster=cluster,
        missing=tuple(part for part, exists in there.items() if not exists),
        wanted=view.spec.workers.replicas,
        asked=_replicas(cluster),
        grouped=_replicas(group) if group is not None else 0,
        deployments=tuple(observed.name(made) for made in view.worker_deployments(course.number)),
        unfinished=bool(_unfinished(group)),
        failure=next(filter(None, map(_error, (*_unfinished(cluster), *_unfinished(group)))), ""),
    )


def _has(things: tuple[Object, ...], name: str) -> bool:
    return any(observed.name(thing) == name and not observed.being_deleted(thing) for thing in things)


def _unfinished(thing: Object | None) -> list[object]:
    """kopf, of which dask-kubernetes is made, keeps the state of its handlers so until the last has ended."""
    annotations = observed.look(thing, "metadata", "annotations")
    states = sorted(annotations.items(), key=str) if isinstance(annotations, Mapping) else ()
    return [state for key, state in states if str(key).startswith(_KOPF) and key != _LAST_HANDLED]


def _error(state: object) -> str:
    """What a handler's last try ended with."""
    try:
        said = observed.text(json.loads(state), "message") if isinstance(state, str) else ""
    except (ValueError, RecursionError):
        return ""
    return "" if said.startswith(_BATCH) else said


def _replicas(thing: Object) -> int:
    return max(0, observed.whole(thing, "spec", "worker", "replicas") or 0)
