"""Volumes of a job's pods, and where its container mounts them.

The root file system is read-only: what a process writes goes to one of three emptyDirs of limited size.
A user's volume named like one of these, or mounted at its path, takes its place; the attempt's own volumes
cannot be replaced.
"""

from __future__ import annotations

from typing import Any

from influence_job.document import (
    CREDENTIALS_DIRECTORY,
    DIRECTORY,
    FILE,
    SOURCE_DIRECTORY,
    TLS_DIRECTORY,
)
from influence_operator.manifests.child import Attempt
from influence_operator.manifests.config_map import source_items
from influence_operator.manifests.environment import HOME
from influence_operator.manifests.names import Role

Volume = dict[str, Any]

SCRATCH = {
    "tmp": ("/tmp", {"sizeLimit": "10Gi"}),
    "home": (HOME, {"sizeLimit": "10Gi"}),
    # In memory, and so within the container's memory limit.
    "shm": ("/dev/shm", {"medium": "Memory", "sizeLimit": "1Gi"}),
}
_READABLE = 0o444
"""The files belong to root; the process does not run as root."""


def volumes(attempt: Attempt, role: Role) -> list[Volume]:
    """The pod's volumes: the attempt's, scratch space, the user's."""
    own = [volume for volume, _ in _own(attempt, role)]
    reserved = {volume["name"] for volume in own}
    user = [dict(volume) for volume in attempt.pod(role).volumes if str(volume.get("name")) not in reserved]
    given = {str(volume.get("name")) for volume in user}
    mounted = {str(mount.get("name")) for mount in mounts(attempt, role)}
    scratch = [
        {"name": name, "emptyDir": dict(source)}
        for name, (_, source) in SCRATCH.items()
        if name not in given and name in mounted
    ]
    return [*own, *scratch, *user]


def mounts(attempt: Attempt, role: Role) -> list[Volume]:
    """The container's mounts, in the same order."""
    own = [
        {"name": volume["name"], "mountPath": path, "readOnly": True} for volume, path in _own(attempt, role)
    ]
    reserved = {mount["mountPath"] for mount in own}
    user = [dict(m) for m in attempt.pod(role).volume_mounts if str(m.get("mountPath")) not in reserved]
    taken = {str(mount.get("mountPath")).rstrip("/") for mount in user}
    scratch = [{"name": name, "mountPath": path} for name, (path, _) in SCRATCH.items() if path not in taken]
    return [*own, *scratch, *user]


def _own(attempt: Attempt, role: Role) -> list[tuple[Volume, str]]:
    found = [(_secret("influence-tls", attempt.base, defaultMode=_READABLE), TLS_DIRECTORY)]
    if role is Role.DRIVER:
        items = [{"key": FILE, "path": FILE}]
        found.append((_config_map("influence-job", attempt.base, items), DIRECTORY))
    if attempt.source is not None:
        volume = _config_map("influence-task", attempt.base, source_items(attempt.source))
        found.append((volume, SOURCE_DIRECTORY))
    credentials = attempt.spec.output.credentials_secret_ref
    if credentials is not None and role is not Role.SCHEDULER:
        volume = _secret("influence-credentials", credentials.name, defaultMode=_READABLE)
        found.append((volume, CREDENTIALS_DIRECTORY))
    return found


def _secret(name: str, secret: str, **more: Any) -> Volume:
    return {"name": name, "secret": {"secretName": secret, **more}}


def _config_map(name: str, config_map: str, items: list[dict[str, str]]) -> Volume:
    return {"name": name, "configMap": {"name": config_map, "items": items}}
