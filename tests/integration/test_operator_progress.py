"""What a driver's pod may answer to the operator: its image is the tenant's."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from typing import Any

import pytest

from hostile_http import Answer, dripping, hostile_server, pouring, sending, silent
from influence_job.progress import Progress, Stage
from influence_operator.cluster.driver import AT_ONCE, MOST_BYTES, DriverClient
from influence_operator.decisions.snapshot import DriverReport

UID, ATTEMPT = "0b6e2f2c-5d8e-4a57-9a3c-0d4f2ac7a5b1", 2


def document(**changes: Any) -> bytes:
    progress = Progress(job_uid=UID, attempt=ATTEMPT, stage=Stage.SCORES, workers_needed=True)
    return json.dumps(progress.model_dump(mode="json", by_alias=True) | changes).encode()


def report(port: int) -> DriverReport:
    async def ask() -> DriverReport:
        client = DriverClient(port)
        try:
            return await client.report("127.0.0.1", UID, ATTEMPT)
        finally:
            await client.close()

    return asyncio.run(ask())


def answer_to(answer: Answer) -> DriverReport:
    with hostile_server(answer) as server:
        return report(server.port)


def test_the_progress_of_the_asked_attempt_is_taken_as_it_is():
    assert answer_to(sending(document())) == DriverReport(ATTEMPT, Progress.model_validate_json(document()))


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (pouring, f"at most {MOST_BYTES} bytes"),
        (sending(b"{" + b" " * MOST_BYTES), f"at most {MOST_BYTES} bytes"),
        (dripping, "within 2 s"),
        (silent, "within 2 s"),
        (sending(b"", "302 Found", "Location: http://169.254.169.254/"), "expected status 200, got 302"),
        (sending(b"", "404 Not Found"), "expected status 200, got 404"),
        (sending(b"", "204 No Content"), "expected status 200, got 204"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "ClientResponseError"),
        (
            lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000),
            "ClientResponseError",
        ),
        (lambda connection: connection.close(), "ServerDisconnectedError"),
        (sending(gzip.compress(b" " * 10_000_000), "200 OK", "Content-Encoding: gzip"), "JSON"),
        (sending(b""), "JSON"),
        (sending(b"\xff\xfe\x00"), "JSON"),
        (sending(b"[" * 60_000), "JSON"),
        (sending(b"null"), "document"),
        (sending(document(jobUid="another")), "expected attempt 2 of job"),
        (sending(document(jobUid="x" * 5_000)), "jobUid"),
        (sending(document(jobUid=7)), "jobUid"),
        (sending(document(attempt=3)), "expected attempt 2 of job"),
        (sending(document(attempt="2; drop")), "attempt"),
        (sending(document(stage="Dancing")), "stage"),
        (sending(document(regions={"done": -1})), "regions.done"),
        (sending(document(regions={"done": 1e400})), "regions.done"),
        (sending(document(warnings=["w"] * 1000)), "warnings"),
        (sending(document(stages=[{"name": "Loading", "start": "yesterday"}])), "stages.0.start"),
        (sending(document(lastError={"reason": "r" * 65, "message": "m"})), "lastError.reason"),
        (sending(document(result=[1, 2])), "result"),
    ],
)
def test_a_hostile_answer_becomes_a_short_problem_and_nothing_else(answer, problem):
    began = time.monotonic()
    said = answer_to(answer)

    assert said.progress is None
    assert said.attempt == ATTEMPT
    assert problem in (said.problem or "")
    assert len(said.problem or "") < 600
    assert time.monotonic() - began < 10


def test_redirects_are_not_followed():
    with hostile_server(sending(document())) as target:
        location = f"Location: http://127.0.0.1:{target.port}/progress"
        for status in ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"):
            assert answer_to(sending(b"", status, location)).progress is None

        assert target.requests == []


def test_a_port_on_which_nobody_listens_is_a_problem_too():
    with hostile_server(silent) as server:
        port = server.port

    problem = report(port).problem or ""
    assert problem.startswith(f"http://127.0.0.1:{port}/progress: ")
    assert problem.endswith(f"; let the operator's pods reach TCP port {port} of the driver's pod")


def test_of_a_document_of_another_contract_the_version_is_what_counts():
    said = answer_to(sending(document(contractVersion=9, stage="Dancing", regions="many")))

    assert said == DriverReport(ATTEMPT, Progress(contract_version=9, job_uid=UID, attempt=ATTEMPT))


def test_no_more_than_sixteen_are_asked_at_a_time():
    def late(connection: Any) -> None:
        time.sleep(0.1)
        sending(document())(connection)

    async def ask_many(port: int) -> list[DriverReport]:
        client = DriverClient(port)
        try:
            asked = [client.report("127.0.0.1", UID, ATTEMPT) for _ in range(3 * AT_ONCE)]
            return await asyncio.gather(*asked)
        finally:
            await client.close()

    with hostile_server(late) as server:
        reports = asyncio.run(ask_many(server.port))

        assert all(said.progress for said in reports)
        assert server.most_at_once <= AT_ONCE
