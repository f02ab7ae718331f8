"""How requests to the API server are repeated, counted and fenced, against a server that follows a script."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from kubernetes.aio.client import Configuration

from hostile_http import Answer, hostile_server, sending
from influence_operator.cluster import api as api_module
from influence_operator.cluster.api import Api
from influence_operator.cluster.errors import ApiError, LeaseLostError, UnreachableError
from influence_operator.cluster.kinds import CONFIG_MAP, JOB, SECRET
from influence_operator.metrics import Metrics

T = TypeVar("T")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "READ_DELAYS", (0.01, 0.01, 0.01))


def status(code: int, reason: str = "", message: str = "scripted") -> Answer:
    body = {"kind": "Status", "code": code, "reason": reason, "message": message}
    return sending(json.dumps(body).encode(), f"{code} {reason}", "Content-Type: application/json")


def in_turn(*answers: Answer) -> Answer:
    """One after the other; the last one for ever."""
    left = list(answers)

    def answer(connection: socket.socket) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(connection)

    return answer


def resetting(connection: socket.socket) -> None:
    connection.close()


def asked(answer: Answer, call: Callable[[Api], Awaitable[T]]) -> tuple[list[str], bytes, T | Exception]:
    """What was requested, the metrics, and what came back."""

    async def run(port: int) -> tuple[bytes, T | Exception]:
        metrics = Metrics()
        api = Api(Configuration(host=f"http://127.0.0.1:{port}"), metrics)
        try:
            result: T | Exception = await call(api)
        except Exception as error:
            result = error
        finally:
            await api.close()
        return metrics.text({}), result

    with hostile_server(answer) as server:
        text, result = asyncio.run(run(server.port))
        return server.requests, text, result


JOB_BODY = json.dumps({"kind": "Job", "metadata": {"name": "p"}}).encode()


@pytest.mark.parametrize("fault", [status(429), status(500), status(503), resetting])
def test_reading_is_tried_again(fault):
    requests, _, got = asked(in_turn(fault, fault, sending(JOB_BODY)), lambda api: api.get(JOB, "ns", "p"))

    assert got == json.loads(JOB_BODY)
    assert requests == ["GET /apis/batch/v1/namespaces/ns/jobs/p HTTP/1.1"] * 3


def test_reading_is_given_up_after_a_few_tries():
    requests, metrics, got = asked(status(503), lambda api: api.get(JOB, "ns", "p"))

    assert isinstance(got, ApiError)
    assert len(requests) == 4
    assert b'api_requests_total{code="503",resource="jobs",verb="get"} 4.0' in metrics


@pytest.mark.parametrize("fault", [status(429), status(500), status(409, "AlreadyExists"), resetting])
def test_writing_is_never_repeated_by_itself(fault):
    requests, _, got = asked(fault, lambda api: api.create(CONFIG_MAP, "ns", {"metadata": {"name": "c"}}))

    assert isinstance(got, ApiError | UnreachableError)
    assert len(requests) == 1


def test_a_refusal_comes_with_the_servers_own_words():
    refused = status(403, "Forbidden", 'exceeded quota: pods, requested: pods=1, used: pods=5"')
    _, _, got = asked(refused, lambda api: api.create(CONFIG_MAP, "ns", {"metadata": {"name": "c"}}))

    assert isinstance(got, ApiError)
    assert got.refused
    assert "exceeded quota" in got.message


def test_without_time_left_on_the_lease_nothing_is_written():
    async def fenced(api: Api) -> Any:
        api.fenced(lambda: 0.0)
        assert (await api.get(JOB, "ns", "p"))["kind"] == "Job"
        return await api.create(CONFIG_MAP, "ns", {"metadata": {"name": "c"}})

    requests, _, got = asked(sending(JOB_BODY), fenced)

    assert isinstance(got, LeaseLostError)
    assert [request.split()[0] for request in requests] == ["GET"]


def test_a_write_takes_no_longer_than_the_lease_lasts():
    def late(connection: socket.socket) -> None:
        connection.recv(1)

    async def fenced(api: Api) -> Any:
        api.fenced(lambda: 0.2)
        return await api.create(CONFIG_MAP, "ns", {"metadata": {"name": "c"}})

    _, _, got = asked(late, fenced)

    assert isinstance(got, UnreachableError)


def test_what_the_table_of_rights_does_not_list_is_not_asked_for():
    requests, _, got = asked(sending(JOB_BODY), lambda api: api.get(SECRET, "ns", "s"))

    assert isinstance(got, AssertionError)
    assert "secrets" in str(got)
    assert requests == []


def test_a_list_is_read_page_by_page():
    first = {"metadata": {"continue": "more"}, "items": [{"n": 1}]}
    last = {"metadata": {}, "items": [{"n": 2}]}
    pages = in_turn(sending(json.dumps(first).encode()), sending(json.dumps(last).encode()))

    async def everything(api: Api) -> list[Any]:
        return [item async for item in api.list(JOB, "ns")]

    requests, _, got = asked(pages, everything)

    assert got == [{"n": 1}, {"n": 2}]
    assert "continue=more" in requests[1]
