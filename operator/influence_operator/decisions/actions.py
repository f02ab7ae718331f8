"""What a pass may do. Decisions return these; `influence_operator.cluster.apply` does them in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal


@dataclass(frozen=True)
class Create:
    """Create a manifest; one that exists and is ours is left as it is, one that is not becomes a Conflict."""

    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class CreateTls:
    """Make an attempt's CA and certificate and store them as an immutable Secret.

    `manifest` is the Secret without data. AlreadyExists counts as ours.
    """

    manifest: Mapping[str, Any]
    not_after: datetime


@dataclass(frozen=True)
class Delete:
    """Delete one child, if it still has this UID; pods it owns go with it (background propagation)."""

    api_version: str
    kind: str
    name: str
    uid: str | None
    """None only for Secrets, which cannot be read."""


@dataclass(frozen=True)
class RemoveFinalizer:
    """Take one finalizer from an object that has been deleting for too long; no other is touched."""

    api_version: str
    kind: str
    name: str
    uid: str
    finalizer: str


@dataclass(frozen=True)
class Patch:
    """A JSON merge patch of a child, refused when the UID differs."""

    api_version: str
    kind: str
    name: str
    uid: str
    patch: Mapping[str, Any]
    subresource: Literal["", "status", "scale"] = ""


@dataclass(frozen=True)
class RetireWorkers:
    """Ask the scheduler to retire `count` workers, delete their Deployments, then set the replicas.

    Only Deployments named in `deployments` (those of this attempt) are deleted, whatever the scheduler says.
    """

    cluster: str
    """Name of the DaskCluster."""
    cluster_uid: str
    count: int
    deployments: tuple[str, ...]
    replicas: int
    """The DaskCluster's `spec.worker.replicas` afterwards."""


@dataclass(frozen=True)
class DeleteJob:
    """Delete the InfluenceJob itself: ttlSecondsAfterFinished has passed."""

    uid: str
    resource_version: str


Action = Create | CreateTls | Delete | RemoveFinalizer | Patch | RetireWorkers | DeleteJob


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event about the InfluenceJob."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """What one pass does. The status is written before the actions when `status_first`, else after them."""

    actions: tuple[Action, ...]
    status: Mapping[str, Any]
    """The whole desired status, as JSON; equal to the stored one: nothing is written."""
    urgent: bool
    """A transition: written at once. Otherwise progress, which may be delayed."""
    events: tuple[Event, ...] = ()
    again_after: float | None = None
    """Seconds until a pass is due though nothing changes."""
    status_first: bool = False
    """The attempt number must be stored before its children are created, the end before they are deleted."""
