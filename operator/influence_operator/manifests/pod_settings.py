"""`podDefaults` and one role's own settings become one: own values win, maps and named lists merge by key.

Called once per role; the result is again a `PodSettings`, without anything that a role must not inherit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from influence_job.spec import PodSettings, ResourcesSpec
from influence_operator.manifests.names import PREFIX, Role

OpenObject = Mapping[str, Any]


def merged(role: Role, own: PodSettings, defaults: PodSettings) -> PodSettings:
    """The settings of a role's pods."""

    def first(name: str) -> Any:
        value = getattr(own, name)
        return getattr(defaults, name) if value is None else value

    # Unchecked: both were, and together they may be longer than one of them may.
    return PodSettings.model_construct(
        resources=_resources(role, own.resources, defaults.resources),
        node_selector={**defaults.node_selector, **own.node_selector},
        tolerations=[*defaults.tolerations, *own.tolerations],
        affinity={**defaults.affinity, **own.affinity},
        topology_spread_constraints=_by_key(
            defaults.topology_spread_constraints,
            own.topology_spread_constraints,
            "topologyKey",
            "whenUnsatisfiable",
        ),
        priority_class_name=first("priority_class_name"),
        labels=_without_ours({**defaults.labels, **own.labels}),
        annotations=_without_ours({**defaults.annotations, **own.annotations}),
        env=_by_key(defaults.env, own.env, "name"),
        env_from=[*defaults.env_from, *own.env_from],
        volumes=_by_key(defaults.volumes, own.volumes, "name"),
        volume_mounts=_by_key(defaults.volume_mounts, own.volume_mounts, "mountPath"),
        fs_group=first("fs_group"),
        service_account_name=first("service_account_name"),
        image_pull_secrets=_by_key(defaults.image_pull_secrets, own.image_pull_secrets, "name"),
        image_pull_policy=first("image_pull_policy"),
        runtime_class_name=first("runtime_class_name"),
        termination_grace_period_seconds=first("termination_grace_period_seconds"),
    )


def is_extended(resource: str) -> bool:
    """Whether a resource is a device such as nvidia.com/gpu, which only workers inherit."""
    return "/" in resource


def _resources(role: Role, own: ResourcesSpec, defaults: ResourcesSpec) -> ResourcesSpec:
    def inherited(quantities: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: quantity
            for name, quantity in quantities.items()
            if role is Role.WORKER or not is_extended(name)
        }

    # A request of podDefaults may be larger than a limit of the role's own, which then is the request too.
    requests = {n: q for n, q in inherited(defaults.requests).items() if n not in own.limits}
    return ResourcesSpec.model_construct(
        limits={**inherited(defaults.limits), **own.limits}, requests={**requests, **own.requests}
    )


def _by_key(defaults: Iterable[OpenObject], own: Iterable[OpenObject], *keys: str) -> list[Any]:
    """`defaults` without what `own` names again, then `own`."""

    def key(item: OpenObject) -> tuple[str, ...]:
        return tuple(str(item.get(name)) for name in keys)

    taken = {key(item) for item in own}
    return [*(item for item in defaults if key(item) not in taken), *own]


def _without_ours(entries: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in entries.items() if not name.startswith(PREFIX)}
