"""One of the operator's replicas leads: whoever holds the Lease.

A loop of our own on `coordination.k8s.io`, for the client library's creates no Lease and does not release
one. The holder renews; whoever sees that nobody renewed for `seconds` of ITS clock takes over, so that no
two clocks are compared. `left` says for how long this replica may still write: a process that was frozen
wakes to find it at zero. Used by `influence_operator.process`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from influence_operator.cluster.api import Api
from influence_operator.cluster.errors import ApiError, ClusterError, LeaseLostError
from influence_operator.cluster.kinds import LEASE

RENEWALS = 5
"""The holder renews so often in the time after which it would be followed; a try takes no longer than the
wait between two, so that another can follow one that gets no answer."""
AGAIN = 1 / 30
"""A try that failed is followed by another after this part of that time, counted from its beginning."""
SURE = 2 / 3
"""The holder takes itself for the leader for this part of that time."""

log = logging.getLogger(__name__)


def boot_time() -> float:
    """Seconds that go on while the process is stopped or the machine suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """The Lease, as one replica sees it."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        seconds: int,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._seconds = seconds
        self._clock = clock
        self._seen: tuple[str, float] = ("", 0.0)
        """Resource version last seen, and when it was new to us."""
        self._held: Mapping[str, Any] | None = None
        self._renewed = float("-inf")
        self._unsure = False
        """Whether a write got no answer that says what became of it: it may be stored, or yet will be."""

    def left(self) -> float:
        """Seconds for which this replica surely leads; at most 0 if it does not."""
        return self._renewed + self._seconds * SURE - self._clock()

    async def acquire(self) -> None:
        """Waits until this replica leads."""
        told = ""
        while True:
            try:
                holder = await self._try()
                if self._held:
                    return
                if holder != told:
                    log.info("standing by: %s leads", holder)
                told = holder
            except ClusterError as error:
                log.warning("cannot read the lease: %s", error)
            await asyncio.sleep(self._seconds / 10)

    async def keep(self) -> None:
        """Renews for ever.

        Raises:
            LeaseLostError: it could not be renewed in time, or another replica has it.
        """
        pause = self._seconds / RENEWALS
        while True:
            await asyncio.sleep(min(pause, max(0.0, self.left())))
            if self.left() <= 0:
                raise LeaseLostError(f"the lease was not renewed for {self._seconds * SURE:.0f} s")
            began = self._clock()
            if await self._renew():
                pause = self._seconds / RENEWALS
            else:
                pause = max(0.0, began + self._seconds * AGAIN - self._clock())

    async def release(self) -> None:
        """Lets another replica lead at once. Nothing may be written afterwards."""
        if self._held and self.left() > 0:
            self._renewed = float("-inf")
            try:
                await self._write("", 1, 2.0)
            except ClusterError as error:
                log.warning("cannot release the lease: %s", error)
        self._renewed = float("-inf")
        self._held = None

    async def _renew(self) -> bool:
        """One try; whether the lease is known to be renewed.

        Raises:
            LeaseLostError: another replica has it, or it was deleted.
        """
        timeout = min(self.left(), self._seconds / RENEWALS)
        try:
            async with asyncio.timeout(timeout):
                if self._unsure:
                    await self._look()
                await self._write(self._identity, self._seconds, timeout)
        except (ClusterError, TimeoutError) as error:
            if isinstance(error, ApiError) and error.not_found:
                raise LeaseLostError(f"the lease is gone: {error}") from error
            log.warning("cannot renew the lease: %s", str(error) or f"no answer within {timeout:.1f} s")
            return False
        return True

    async def _look(self) -> None:
        """Whose the lease is. Ours in another version is what a write without an answer has made of it."""
        found = await self._api.get(LEASE, self._namespace, self._name)
        holder = (found.get("spec") or {}).get("holderIdentity")
        if holder != self._identity:
            raise LeaseLostError(f"{holder or 'nobody'} holds the lease")
        self._held = found

    async def _try(self) -> str:
        """Takes the lease if it is free or has run out; returns who holds it."""
        try:
            found = await self._api.get(LEASE, self._namespace, self._name)
        except ApiError as error:
            if not error.not_found:
                raise
            await self._create()
            return self._identity
        spec = found.get("spec") or {}
        holder, version = spec.get("holderIdentity") or "", found["metadata"]["resourceVersion"]
        if version != self._seen[0]:
            self._seen = (version, self._clock())
        seconds = spec.get("leaseDurationSeconds") or self._seconds
        if holder and self._clock() < self._seen[1] + seconds:
            return str(holder)
        self._held = found
        try:
            await self._write(self._identity, self._seconds, self._seconds / 3)
        except ClusterError:
            self._held = None
            raise
        return self._identity

    async def _create(self) -> None:
        asked = self._clock()
        body = {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.kind,
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": self._spec({}, self._identity, self._seconds),
        }
        self._held = await self._api.create(LEASE, self._namespace, body)
        self._renewed = asked

    async def _write(self, holder: str, seconds: int, timeout: float) -> None:
        assert self._held is not None
        asked = self._clock()
        body = {**self._held, "spec": self._spec(self._held.get("spec") or {}, holder, seconds)}
        self._unsure = True
        self._held = await self._api.update(LEASE, self._namespace, self._name, body, timeout)
        self._unsure = False
        if holder:
            self._renewed = asked

    def _spec(self, before: Mapping[str, Any], holder: str, seconds: int) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        changed = holder != before.get("holderIdentity")
        taken_over = bool(changed and holder and before)
        return {
            **before,
            "holderIdentity": holder,
            "leaseDurationSeconds": seconds,
            "renewTime": now,
            "acquireTime": now if changed else before.get("acquireTime", now),
            "leaseTransitions": before.get("leaseTransitions", 0) + taken_over,
        }
