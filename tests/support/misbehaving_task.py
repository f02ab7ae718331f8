"""A task whose module misbehaves when the driver imports it: what hostile tests bring in a ConfigMap.

The pod's environment says how. EXIT_CODE: the driver's process ends at once. LAST_WORDS: it leaves one of the
termination messages of `_WORDS` before. ANSWERS: `/progress` answers honestly while the driver starts, then
as the named functions say, in turn, and never goes on. In other processes than a driver nothing happens.
"""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

JOB = Path("/etc/influence/job/job.json")
TERMINATION_LOG = Path("/dev/termination-log")
HONEST_ANSWERS = 2
RESULT = {"url": "gs://elsewhere/lie.zarr", "shape": [1, 1], "dtype": "float64", "bytes": 8}
Answer = Callable[[BaseHTTPRequestHandler], None]


def task() -> None:
    """Never called: the driver does not get so far."""


def lie(**changes: Any) -> bytes:
    """A document that says that all is done, of this job unless `changes` say otherwise."""
    job = json.loads(JOB.read_bytes())
    document = {
        "contractVersion": job["contractVersion"],
        "jobUid": job["uid"],
        "attempt": job["attempt"],
        "stage": "Verifying",
        "regions": {"done": 5, "total": 5},
        "workersNeeded": True,
        "finished": True,
        "result": RESULT,
        "warnings": ["this is a lie"],
    }
    return json.dumps(document | changes).encode()


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    """An answer with this body."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def huge(handler: BaseHTTPRequestHandler) -> None:
    send(handler, lie(padding="x" * 10_000_000))


def bomb(handler: BaseHTTPRequestHandler) -> None:
    send(handler, gzip.compress(lie(padding="x" * 50_000_000)), Content_Encoding="gzip")


def slow(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for byte in lie():
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(30)


def elsewhere(handler: BaseHTTPRequestHandler) -> None:
    """Where a redirect leads, a document stands that would be believed."""
    send(handler, b"", 302, Location="/lie")


def broken(handler: BaseHTTPRequestHandler) -> None:
    send(handler, lie(), 500)


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\xff\r\n" * 1000)


def other_job(handler: BaseHTTPRequestHandler) -> None:
    send(handler, lie(jobUid="00000000-0000-0000-0000-000000000000"))


def other_attempt(handler: BaseHTTPRequestHandler) -> None:
    send(handler, lie(attempt=7))


def other_contract(handler: BaseHTTPRequestHandler) -> None:
    """Honest, for an operator of another release."""
    send(handler, lie(contractVersion=9))


def wrong_types(handler: BaseHTTPRequestHandler) -> None:
    send(handler, lie(stage=["Scores"], regions="all", workersNeeded={}, warnings=7, finished="perhaps"))


def wrong_envelope(handler: BaseHTTPRequestHandler) -> None:
    send(handler, lie(contractVersion="one", jobUid=[], attempt=-1))


def deep(handler: BaseHTTPRequestHandler) -> None:
    send(handler, b"[" * 60_000)


def endless_number(handler: BaseHTTPRequestHandler) -> None:
    send(handler, lie(regions=None).replace(b"null", b'{"done": ' + b"9" * 50_000 + b"}"))


def no_json(handler: BaseHTTPRequestHandler) -> None:
    send(handler, b"\xff\xfe{]" * 100)


def _words(name: str) -> bytes:
    hostile = "\x1b[2J\x00\u202e<script>alert(1)</script>\n" + "long " * 350
    kinds = {
        "huge": lambda: b"x" * 1_000_000,
        "binary": lambda: bytes(range(256)) * 8,
        "types": lambda: lie(lastError=[7], finished="perhaps"),
        "foreign": lambda: lie(jobUid="another", lastError={"reason": "Lie", "message": "a lie"}),
        "finished": lambda: lie(),
        "hostile": lambda: lie(lastError={"reason": "<b>Lie</b>\n", "message": hostile}),
    }
    return kinds[name]()


def _answer_with(answers: list[Answer]) -> None:
    """From the next request on the driver's own server answers so."""
    [server] = [thing for thing in gc.get_objects() if type(thing).__module__ == "influence_job.server"
                and hasattr(thing, "RequestHandlerClass")]  # fmt: skip
    handler = server.RequestHandlerClass
    honest, turns, asked = handler.do_GET, itertools.cycle(answers), itertools.count()

    def do_get(self: BaseHTTPRequestHandler) -> None:
        if self.path == "/lie":
            print("the redirect was followed", flush=True)
            send(self, lie())
        elif self.path != "/progress" or next(asked) < HONEST_ANSWERS:
            honest(self)
        else:
            answer = next(turns)
            print(f"answers {answer.__name__}", flush=True)
            answer(self)

    handler.do_GET = do_get


def _misbehave() -> None:
    if words := os.environ.get("LAST_WORDS"):
        TERMINATION_LOG.write_bytes(_words(words))
    if code := os.environ.get("EXIT_CODE"):
        os._exit(int(code))
    if names := os.environ.get("ANSWERS"):
        _answer_with([globals()[name] for name in names.split(",")])
    time.sleep(3600)


if Path(sys.argv[0]).name == "influence":
    _misbehave()
