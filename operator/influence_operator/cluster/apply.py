"""Does what a decision says, in order, and tells what stood in the way.

The first action that fails ends the rest: a NetworkPolicy that was refused must not be followed by the pod
it was made for. Whatever was written is put into the cache at once. Called by the reconciler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, assert_never

from influence_operator.cluster.api import Api
from influence_operator.cluster.cache import Cache, JobKey
from influence_operator.cluster.certificates import attempt_material
from influence_operator.cluster.errors import ApiError, ClusterError
from influence_operator.cluster.gather import attempt, owned_by
from influence_operator.cluster.kinds import DASK_CLUSTER, DEPLOYMENT, INFLUENCE_JOB, Kind, kind_of
from influence_operator.cluster.memory import Outcome
from influence_operator.cluster.scheduler import SchedulerClient
from influence_operator.decisions import observed
from influence_operator.decisions.actions import (
    Action,
    Create,
    CreateTls,
    Delete,
    DeleteJob,
    Patch,
    RemoveFinalizer,
    RetireWorkers,
)
from influence_operator.decisions.snapshot import Children, Conflict
from influence_operator.manifests import names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Applier:
    """Carries out actions."""

    api: Api
    cache: Cache
    schedulers: SchedulerClient
    clock: Callable[[], datetime]

    async def apply(self, key: JobKey, actions: tuple[Action, ...]) -> Outcome:
        """Does the actions until one fails."""
        done = 0
        for action in actions:
            try:
                done += await self._do(key, action)
            except _TakenError as taken:
                return Outcome(done, conflicts=(taken.conflict,), error=taken)
            except _NotRetiredError as error:
                log.info("%s: %s", key, error)
                return Outcome(done, unretired=str(error))
            except ApiError as error:
                return Outcome(done, refusals=_refusals(action, error), error=error)
            except ClusterError as error:
                return Outcome(done, error=error)
        return Outcome(done)

    async def _do(self, key: JobKey, action: Action) -> bool:
        """Does one action; returns whether it changed anything."""
        match action:
            case Create():
                return await self._create(key, action.manifest)
            case CreateTls():
                return await self._create_tls(key, action)
            case Delete():
                kind = kind_of(action.api_version, action.kind)
                return await self._delete(key, kind, action.name, action.uid)
            case RemoveFinalizer():
                return await self._remove_finalizer(key, action)
            case Patch():
                return await self._patch(key, action)
            case RetireWorkers():
                return await self._retire(key, action)
            case DeleteJob():
                return await self._delete_job(key, action)
            case _:
                assert_never(action)

    async def _create(self, key: JobKey, manifest: Mapping[str, Any]) -> bool:
        kind, name = kind_of(manifest["apiVersion"], manifest["kind"]), manifest["metadata"]["name"]
        known = self.cache.child(key, kind, name)
        if known is not None and owned_by(known, key.uid):
            return False
        try:
            stored = await self.api.create(kind, key.namespace, manifest)
            log.info("%s: created %s %s", key, kind.kind, name)
        except ApiError as error:
            if not error.already_exists:
                raise
            stored = await self.api.get(kind, key.namespace, name)
            if not owned_by(stored, key.uid):
                raise _TakenError(Conflict(kind.kind, name)) from error
        self.cache.put(kind, stored)
        return True

    async def _create_tls(self, key: JobKey, action: CreateTls) -> bool:
        kind = kind_of(action.manifest["apiVersion"], action.manifest["kind"])
        name = action.manifest["metadata"]["name"]
        material = attempt_material(name, self.clock(), action.not_after)
        try:
            await self.api.create(kind, key.namespace, {**action.manifest, "stringData": material})
        except ApiError as error:
            if error.already_exists:
                return False
            raise
        return True

    async def _delete(self, key: JobKey, kind: Kind, name: str, uid: str | None) -> bool:
        try:
            answer = await self.api.delete(kind, key.namespace, name, uid)
            log.info("%s: deleted %s %s", key, kind.kind, name)
        except ApiError as error:
            if not error.not_found and not error.conflict:
                raise
            answer = {}  # gone, or another object has the name by now: ours is gone all the same
        if answer.get("kind") == kind.kind:
            self.cache.put(kind, answer)
        elif uid is not None:
            self.cache.forget(uid)
        return bool(answer)

    async def _patch(self, key: JobKey, action: Patch) -> bool:
        kind = kind_of(action.api_version, action.kind)
        patch = {**action.patch, "metadata": {**action.patch.get("metadata", {}), "uid": action.uid}}
        stored = await self.api.merge(kind, key.namespace, action.name, patch, action.subresource)
        self.cache.put(kind, stored)
        return True

    async def _remove_finalizer(self, key: JobKey, action: RemoveFinalizer) -> bool:
        kind = kind_of(action.api_version, action.kind)
        try:
            found = await self.api.get(kind, key.namespace, action.name)
        except ApiError as error:
            if not error.not_found:
                raise
            self.cache.forget(action.uid)
            return True
        finalizers = list(found["metadata"].get("finalizers") or ())
        if found["metadata"]["uid"] != action.uid or action.finalizer not in finalizers:
            return False
        place = f"/metadata/finalizers/{finalizers.index(action.finalizer)}"
        await self.api.json_patch(
            kind,
            key.namespace,
            action.name,
            [
                {"op": "test", "path": "/metadata/uid", "value": action.uid},
                {"op": "test", "path": place, "value": action.finalizer},
                {"op": "remove", "path": place},
            ],
        )
        log.info("%s: took finalizer %s from %s %s", key, action.finalizer, kind.kind, action.name)
        return True

    async def _retire(self, key: JobKey, action: RetireWorkers) -> bool:
        """Deletes `count` workers' Deployments: first those nobody would miss, then whom the scheduler names.

        Only then is the number left written, so that dask-kubernetes finds nothing to scale down itself.

        Raises:
            _NotRetiredError: the scheduler did not choose as many as it was asked for.
        """
        children = self.cache.children(key)
        uids = {
            deployment["metadata"]["name"]: deployment["metadata"]["uid"]
            for deployment in children.deployments
            if deployment["metadata"]["name"] in action.deployments
        }
        chosen = await self._whom_to_retire(key, children, action, set(uids))
        for name in chosen:
            await self._delete(key, DEPLOYMENT, name, uids[name])
        if len(chosen) < action.count:
            raise _NotRetiredError(f"the scheduler chose {len(chosen)} of {action.count} workers to retire")
        patch = {"metadata": {"uid": action.cluster_uid}, "spec": {"worker": {"replicas": action.replicas}}}
        stored = await self.api.merge(DASK_CLUSTER, key.namespace, action.cluster, patch)
        self.cache.put(DASK_CLUSTER, stored)
        return True

    async def _whom_to_retire(
        self, key: JobKey, children: Children, action: RetireWorkers, ours: set[str]
    ) -> list[str]:
        address = _scheduler(key, children)
        if not address:  # without a scheduler no worker holds anything
            return sorted(ours)[: action.count]
        try:
            connected = set(await self.schedulers.workers(address)) & ours
            idle = sorted(ours - connected)[: action.count]
            wanted = min(action.count - len(idle), len(connected))
            retired = await self.schedulers.retire(address, wanted) if wanted > 0 else ()
        except ClusterError as error:
            raise _NotRetiredError(f"the scheduler did not say whom to retire: {error}") from error
        return idle + [name for name in dict.fromkeys(retired) if name in connected][:wanted]

    async def _delete_job(self, key: JobKey, action: DeleteJob) -> bool:
        try:
            await self.api.delete(INFLUENCE_JOB, key.namespace, key.name, action.uid, action.resource_version)
            log.info("%s: deleted, ttlSecondsAfterFinished has passed", key)
        except ApiError as error:
            if not error.not_found:
                raise
        return True


class _TakenError(ClusterError):
    """Something that is not ours has a child's name."""

    def __init__(self, conflict: Conflict) -> None:
        super().__init__(f"{conflict.kind} {conflict.name} exists and does not belong to the job")
        self.conflict = conflict


class _NotRetiredError(ClusterError):
    """A scheduler, whose image is the tenant's, did not choose workers."""


def _scheduler(key: JobKey, children: Children) -> str:
    """The address of the latest attempt's scheduler; empty while none is ready."""
    made = (cluster for cluster in children.dask_clusters if owned_by(cluster, key.uid))
    latest = max(map(attempt, made), default=0)
    addresses = (
        observed.text(pod, "status", "podIP")
        for pod in children.pods
        if observed.label(pod, names.ROLE) == names.Role.SCHEDULER
        and attempt(pod) == latest
        and observed.ready(pod)
    )
    return next(filter(None, addresses), "")


def _refusals(action: Action, error: ApiError) -> tuple[str, ...]:
    """What the API server has against a child; other errors say nothing about the job."""
    if not error.refused or not isinstance(action, Create | CreateTls):
        return ()
    manifest = action.manifest
    return (f"{manifest['kind']} {manifest['metadata']['name']}: {error.message}"[:2048],)
