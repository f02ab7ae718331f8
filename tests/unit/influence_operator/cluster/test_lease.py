"""How a leader renews its lease when answers are late, lost or of another replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest

from influence_operator.cluster.errors import ApiError, LeaseLostError, UnreachableError
from influence_operator.cluster.lease import SURE, Lease

SECONDS = 15
Object = Mapping[str, Any]
Run = Callable[[Coroutine[Any, Any, None]], None]


class FakeApi:
    """Stores one Lease. A test delays what it does, by the number of the renewal."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.made = 0.0
        self.tries: list[float] = []
        """When a renewal was asked for."""
        self.stored: list[float] = []
        """When one was stored."""
        self.late: dict[int, float] = {}
        """Seconds until a renewal is stored."""
        self.silent: dict[int, float] = {}
        """Seconds from then until it is answered."""
        self.asked_for: set[tuple[object, object]] = set()
        """Namespace and name of every request."""
        self.deaf = False
        """Whether nothing is answered."""
        self._storing: list[asyncio.Task[Object]] = []

    async def get(self, _: object, namespace: str, name: str) -> Object:
        """The Lease."""
        self.asked_for.add((namespace, name))
        if self.deaf:
            await asyncio.sleep(1000)
        if self.lease is None:
            raise ApiError("get", 404, "NotFound", "no lease")
        return self.lease

    async def create(self, _: object, namespace: str, body: Object) -> Object:
        """Stores the first."""
        self.asked_for.add((namespace, body["metadata"]["name"]))
        self.made = _now()
        return self._store(body)

    async def update(self, _: object, namespace: str, name: str, body: Object, timeout: float) -> Object:
        """Stores another version, whoever still waits for the answer."""
        self.asked_for.add((namespace, name))
        number = len(self.tries)
        self.tries.append(_now())
        storing = asyncio.create_task(self._update(body, self.late.get(number, 0.0)))
        self._storing.append(storing)
        storing.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may ask
        try:
            async with asyncio.timeout(timeout):
                answer = await asyncio.shield(storing)
                await asyncio.sleep(1000 if self.deaf else self.silent.get(number, 0.0))
                return answer
        except TimeoutError as error:
            raise UnreachableError("update: no answer") from error

    def write(self, **spec: Any) -> None:
        """What somebody else does."""
        assert self.lease is not None
        self._store({**self.lease, "spec": {**self.lease["spec"], **spec}})

    async def _update(self, body: Object, seconds: float) -> Object:
        await asyncio.sleep(seconds)
        if self.lease is None:
            raise ApiError("update", 404, "NotFound", "no lease")
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError("update", 409, "Conflict", "the object has been modified")
        if not self.deaf:
            self.stored.append(_now())
            self._store(body)
        return self.lease

    def _store(self, body: Object) -> Object:
        self.version += 1
        metadata = {**body["metadata"], "resourceVersion": str(self.version)}
        self.lease = {**body, "metadata": metadata}
        return self.lease


def _now() -> float:
    return asyncio.get_running_loop().time()


async def leading(api: FakeApi) -> Lease:
    clock = asyncio.get_running_loop().time
    lease = Lease(api, "ns", "own", "me", SECONDS, clock)  # type: ignore[arg-type]
    await lease.acquire()
    return lease


async def led_for(api: FakeApi, lease: Lease, seconds: float) -> None:
    """Leads so long; at no time longer than others wait after the last write that was stored."""
    keeping = asyncio.create_task(lease.keep())
    until = _now() + seconds
    while _now() < until and not keeping.done():
        assert lease.left() <= max(api.made, *api.stored, 0.0) + SECONDS * SURE - _now() + 1e-6
        await asyncio.sleep(0.1)
    if keeping.done():
        await keeping
    assert lease.left() > 0
    keeping.cancel()


def test_the_lease_has_the_name_that_was_given(run_at_once: Run):
    """Two installations in one namespace contend for two."""

    async def scenario() -> None:
        api = FakeApi()
        api.silent[0] = 4.0
        lease = await leading(api)
        await led_for(api, lease, 20.0)
        await lease.release()

        assert api.asked_for == {("ns", "own")}

    run_at_once(scenario())


@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize("seconds", [4.0, 7.0, 60.0])
def test_a_renewal_whose_answer_is_late_or_lost_ends_nothing(run_at_once: Run, number: int, seconds: float):
    """It was stored: the version that the leader knows is an old one."""

    async def scenario() -> None:
        api = FakeApi()
        api.silent[number] = seconds
        lease = await leading(api)

        await led_for(api, lease, 40.0)

        assert len(api.stored) >= 40 / 5

    run_at_once(scenario())


@pytest.mark.parametrize("seconds", [3.2, 5.0, 20.0])
def test_a_renewal_that_is_stored_after_the_next_try_began_is_no_other_replica(
    run_at_once: Run, seconds: float
):
    """Whichever is stored first: the other meets a conflict, and the lease is still ours."""

    async def scenario() -> None:
        for later in (0.0, 2.5):
            api = FakeApi()
            api.late = {1: seconds, 2: later}

            await led_for(api, await leading(api), 40.0)

    run_at_once(scenario())


def test_a_leader_without_answers_tries_several_times_and_ends_before_anyone_may_follow(run_at_once: Run):
    async def scenario() -> None:
        api = FakeApi()
        lease = await leading(api)
        await led_for(api, lease, 10.0)
        renewed = api.stored[-1]
        api.deaf = True

        with pytest.raises(LeaseLostError, match="not renewed for 10 s"):
            await lease.keep()

        assert _now() == pytest.approx(renewed + SECONDS * SURE)
        assert lease.left() <= 0

    run_at_once(scenario())


def test_a_leader_that_cannot_write_tries_several_times(run_at_once: Run):
    async def scenario() -> None:
        api = FakeApi()
        api.late = dict.fromkeys(range(100), 1000.0)
        lease = await leading(api)

        with pytest.raises(LeaseLostError, match="not renewed for 10 s"):
            await lease.keep()

        assert len(api.tries) >= 3
        assert _now() == pytest.approx(SECONDS * SURE)

    run_at_once(scenario())


def test_a_change_of_the_lease_that_leaves_its_holder_ends_nothing(run_at_once: Run):
    """As `kubectl annotate` would."""

    async def scenario() -> None:
        api = FakeApi()
        lease = await leading(api)
        await led_for(api, lease, 10.0)
        api.write(strategy="theirs")

        await led_for(api, lease, 10.0)

        assert api.lease is not None
        assert api.lease["spec"]["strategy"] == "theirs"

    run_at_once(scenario())


@pytest.mark.parametrize(("holder", "named"), [("another", "another"), ("", "nobody")])
def test_another_holder_ends_the_leader_at_its_next_renewal(run_at_once: Run, holder: str, named: str):
    async def scenario() -> None:
        api = FakeApi()
        lease = await leading(api)
        await led_for(api, lease, 10.0)
        began = _now()
        api.write(holderIdentity=holder)

        with pytest.raises(LeaseLostError, match=f"{named} holds the lease"):
            await lease.keep()

        assert _now() - began < 4.0
        assert api.lease is not None
        assert api.lease["spec"]["holderIdentity"] == holder

    run_at_once(scenario())


def test_another_holder_is_found_behind_an_answer_that_was_lost(run_at_once: Run):
    async def scenario() -> None:
        api = FakeApi()
        lease = await leading(api)
        api.silent[0] = 60.0
        keeping = asyncio.create_task(lease.keep())
        await asyncio.sleep(4.0)
        assert len(api.stored) == 1
        api.write(holderIdentity="another")

        with pytest.raises(LeaseLostError, match="another holds the lease"):
            await keeping

        assert len(api.tries) == 1, "nothing was written over it"

    run_at_once(scenario())


def test_a_lease_that_was_deleted_ends_the_leader(run_at_once: Run):
    """Whoever creates it leads."""

    async def scenario() -> None:
        api = FakeApi()
        lease = await leading(api)
        api.lease = None

        with pytest.raises(LeaseLostError, match="the lease is gone"):
            await lease.keep()

        assert _now() < 4.0

    run_at_once(scenario())
