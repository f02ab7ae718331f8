"""Pods that every API server refuses, whatever runs in it: named before a Deployment is refused instead.

What depends on the cluster (quotas, limit ranges, webhooks) is told when it happens, by `diagnosis`.
"""

from __future__ import annotations

from collections.abc import Iterator

from influence_job.spec import InfluenceJobSpec, PodSettings
from influence_operator.decisions.snapshot import Object
from influence_operator.manifests.child import Attempt
from influence_operator.manifests.names import Role
from influence_operator.manifests.pod_settings import is_extended
from influence_operator.manifests.volumes import mounts, volumes
from influence_operator.settings import Defaults, Settings

_FIELDS = {Role.DRIVER: "driver", Role.SCHEDULER: "scheduler", Role.WORKER: "workers"}
_ANY_SETTINGS = Settings(Defaults(image=""))
"""Nothing that is looked at here depends on the operator's settings."""


def refused_pods(job: Object, spec: InfluenceJobSpec) -> tuple[str, ...]:
    """What a user must change before pods can be made; empty for most jobs.

    Args:
        job: the InfluenceJob as stored.
        spec: its parsed spec.
    """
    made = Attempt(job, spec, 1, _ANY_SETTINGS, {} if spec.task.source else None)
    own = {Role.DRIVER: spec.driver, Role.SCHEDULER: spec.scheduler, Role.WORKER: spec.workers}
    found = (
        problem
        for role, settings in own.items()
        for problem in (*_resources(made, role, settings), *_mounts(made, role, settings))
    )
    return tuple(dict.fromkeys(found))


def _resources(made: Attempt, role: Role, own: PodSettings) -> Iterator[str]:
    def field(kind: str, name: str) -> str:
        given = name in getattr(own.resources, kind)
        return f"spec.{_FIELDS[role] if given else 'podDefaults'}.resources.{kind}.{name}"

    merged = made.pod(role).resources
    for name, request in merged.requests.items():
        path, limit = field("requests", name), merged.limits.get(name)
        if limit is None:
            if _is_device(name):
                wanted = f"spec.{_FIELDS[role]}.resources.limits.{name}"
                yield f"{path}: expected a limit of the same number, got none; set {wanted}: {request}"
        elif _is_device(name) and request.value != limit.value:
            yield f"{path}: expected the limit, {limit}, got {request}; remove it: the limit is requested"
        elif request.value > limit.value:
            bound = field("limits", name)
            yield f"{path}: expected at most the limit, {limit}, got {request}; lower it, or raise {bound}"
    for name, limit in merged.limits.items():
        if _is_device(name) and limit.value.denominator != 1:
            yield f"{field('limits', name)}: expected a whole number of devices, got {limit}; write 1 or more"


def _mounts(made: Attempt, role: Role, own: PodSettings) -> Iterator[str]:
    there = {str(volume.get("name")) for volume in volumes(made, role)}
    for mount in mounts(made, role):
        name = mount.get("name")
        if str(name) in there:
            continue
        path, settings = f"spec.{_FIELDS[role]}", own
        if mount not in own.volume_mounts:
            path, settings = "spec.podDefaults", made.spec.pod_defaults
        shown = "nothing" if name is None else repr(name)[:64]
        yield (
            f"{path}.volumeMounts[{settings.volume_mounts.index(mount)}].name: expected a volume of the "
            f"{role.value}'s pods, got {shown}; add it to {path}.volumes"
        )


def _is_device(resource: str) -> bool:
    """Whether containers must have as much as they ask for, in whole numbers."""
    return is_extended(resource) and "kubernetes.io/" not in resource
