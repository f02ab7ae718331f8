"""The Dask scheduler's HTTP API, as a real scheduler and as a hostile image serve it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import dask
import pytest
from distributed import LocalCluster

from hostile_http import Answer, dripping, hostile_server, pouring, sending, silent
from influence_operator.cluster.errors import BadAnswerError, ClusterError
from influence_operator.cluster.scheduler import SchedulerClient

T = TypeVar("T")


def with_client(port: int, call: Callable[[SchedulerClient], Awaitable[T]]) -> T:
    async def run() -> T:
        client = SchedulerClient(port)
        try:
            return await call(client)
        finally:
            await client.close()

    return asyncio.run(run())


def workers(port: int) -> dict[str, str]:
    return with_client(port, lambda client: client.workers("127.0.0.1"))


def retire(port: int, count: int) -> tuple[str, ...]:
    return with_client(port, lambda client: client.retire("127.0.0.1", count))


def test_a_real_scheduler_names_its_workers_and_retires_as_many_as_it_is_asked():
    routes = ["distributed.http.scheduler.api", "distributed.http.health"]
    with (
        dask.config.set({"distributed.scheduler.http.routes": routes}),
        LocalCluster(
            n_workers=3, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
    ):
        port = cluster.scheduler.http_server.port
        before = workers(port)

        retired = retire(port, 2)

        assert len(before) == 3
        assert len(set(retired)) == 2
        assert set(workers(port)) == set(before) - set(retired)


@pytest.mark.parametrize(
    "answer",
    [
        pouring,
        dripping,
        silent,
        sending(b"", "404 Not Found"),
        sending(b"", "302 Found", "Location: http://169.254.169.254/"),
        sending(b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00."),
        sending(b"[" * 100_000),
        sending(b'{"workers": "all"}'),
        sending(b'{"workers": [{"address": "tcp://1"}]}'),
        sending(json.dumps({"workers": [{"name": "w" * 300, "address": "a"}]}).encode()),
        sending(json.dumps({"workers": [{"name": "w", "address": "a"}] * 10_001}).encode()),
        sending(b'{"workers": [{"name": ["w"], "address": "a"}]}'),
    ],
)
def test_a_hostile_scheduler_gets_an_error_in_good_time(answer: Answer):
    began = time.monotonic()
    with hostile_server(answer) as server, pytest.raises(ClusterError):
        workers(server.port)

    assert time.monotonic() - began < 10


def test_a_retirement_is_read_as_names_and_nothing_more():
    answer = {"tls://10.0.0.1:40000": {"name": "worker-a", "host": "x", "metrics": {"cpu": 3}}}
    with hostile_server(sending(json.dumps(answer).encode())) as server:
        assert retire(server.port, 1) == ("worker-a",)
        assert server.requests == ["POST /api/v1/retire_workers HTTP/1.1"]

    with hostile_server(sending(b'["worker-a"]')) as server, pytest.raises(BadAnswerError):
        retire(server.port, 1)
