"""An HTTP proxy before the storage emulator that fails as real storage does, and remembers requests.

Runs in threads of the test's process, or in a pod (`storage_pod`). Faults may be set and taken back at any
time, for all buckets or for one; tests count what reached the storage by the log, not by the word of what
they test.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_OBJECT = re.compile(r"/b/([^/]+)/o/(.+)")
_BUCKET = re.compile(r"/b/([^/]+)")
_MULTIPART_NAME = re.compile(rb'"name":\s*("(?:[^"\\]|\\.)*")')
_NOT_FORWARDED = {"host", "connection", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Request:
    """One request of a storage client, and how it was answered."""

    action: str
    """`PUT`, `GET`, `LIST`, `DELETE` or `OTHER`: what it does to the object."""
    bucket: str
    object_name: str
    """Empty for listings; they have `prefix`."""
    prefix: str
    status: int
    """What the client was told; 0 for a connection that was reset."""
    reached: bool
    """Whether the storage saw it."""
    client: str = ""
    """The address that asked."""


@dataclass
class _Faults:
    every: int = 0
    every_statuses: tuple[int, ...] = ()
    status: int = 0
    pattern: re.Pattern[str] = re.compile("")
    lost_answers: int = 0
    lost_pattern: re.Pattern[str] = re.compile("")
    down: bool = False
    requests: int = 0
    """How many these faults have met."""


class FaultyProxy:
    """A running proxy; `url` is what clients take for the storage's endpoint.

    Each method that makes a fault takes the `bucket` that is to have it; without one, all have it that have
    none of their own.
    """

    def __init__(self, target: str, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.target = urlsplit(target).netloc
        self.log: list[Request] = []
        self._logs: defaultdict[str, list[Request]] = defaultdict(list)
        """The same by bucket."""
        self._faults: dict[str, _Faults] = {}
        self._lock = threading.Lock()
        self._server = _Server(address, _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def fail_every(self, n: int, *statuses: int, bucket: str = "") -> None:
        """Answers each n-th request with the next of `statuses`; it does not reach the storage."""
        with self._lock:
            faults = self._faults.setdefault(bucket, _Faults())
            faults.every, faults.every_statuses = n, statuses

    def fail_all(self, status: int, matching: str = "", bucket: str = "") -> None:
        """Answers every request whose object (or listed prefix) matches the pattern with `status`."""
        with self._lock:
            faults = self._faults.setdefault(bucket, _Faults())
            faults.status, faults.pattern = status, re.compile(matching)

    def lose_answers(self, count: int, matching: str = "", bucket: str = "") -> None:
        """Lets the next `count` uploads of matching objects through, and answers them with 503."""
        with self._lock:
            faults = self._faults.setdefault(bucket, _Faults())
            faults.lost_answers, faults.lost_pattern = count, re.compile(matching)

    def go_down(self, bucket: str = "") -> None:
        """Resets every connection until `heal`."""
        with self._lock:
            self._faults.setdefault(bucket, _Faults()).down = True

    def heal(self, bucket: str = "") -> None:
        """Takes the faults back."""
        with self._lock:
            self._faults.pop(bucket, None)

    def clear_log(self) -> None:
        """Forgets the requests so far."""
        with self._lock:
            self.log.clear()
            self._logs.clear()

    def log_of(self, bucket: str) -> list[Request]:
        """The requests about one bucket so far."""
        with self._lock:
            return list(self._logs[bucket])

    def puts(self, matching: str = "") -> Counter[str]:
        """How often each object whose name matches was written to the storage."""
        with self._lock:
            done = [r.object_name for r in self.log if r.action == "PUT" and r.reached]
        return Counter(name for name in done if re.search(matching, name))

    def decide(self, request: Request) -> Request:
        """What is to happen: `status` 0 with `reached` False resets; `reached` True forwards."""
        with self._lock:
            faults = self._faults.get(request.bucket) or self._faults.get("") or _Faults()
            faults.requests += 1
            if faults.down:
                return _with(request, 0, reached=False)
            if faults.status and faults.pattern.search(request.object_name or request.prefix):
                return _with(request, faults.status, reached=False)
            if faults.every and faults.requests % faults.every == 0:
                turn = faults.requests // faults.every
                return _with(request, faults.every_statuses[turn % len(faults.every_statuses)], reached=False)
            is_upload = request.action == "PUT" and faults.lost_pattern.search(request.object_name)
            if faults.lost_answers and is_upload:
                faults.lost_answers -= 1
                return _with(request, 503, reached=True)
            return _with(request, 200, reached=True)

    def record(self, request: Request) -> None:
        """Adds to the log."""
        with self._lock:
            self.log.append(request)
            self._logs[request.bucket].append(request)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


@contextmanager
def running_proxy(target: str) -> Iterator[FaultyProxy]:
    """A proxy before the server at the URL `target`."""
    proxy = FaultyProxy(target)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = replace(_understand(self.command, self.path, body), client=self.client_address[0])
        decided = self.server.proxy.decide(asked)
        if not decided.reached and decided.status == 0:
            self.server.proxy.record(decided)
            self._reset()
            return
        if not decided.reached:
            self.server.proxy.record(decided)
            self._answer(decided.status, {}, _error_body(decided.status))
            return
        status, headers, content = self._forward(body)
        if decided.status != 200 and status < 400:
            status, headers, content = decided.status, {}, _error_body(decided.status)
        else:
            decided = _with(decided, status, reached=status < 400)
        self.server.proxy.record(decided)
        self._answer(status, headers, content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_any  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        target = self.server.proxy.target
        connection = http.client.HTTPConnection(target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _NOT_FORWARDED}
        try:
            connection.request(self.command, self.path, body=body or None, headers=headers)
            response = connection.getresponse()
            content = response.read()
            kept = {n: v for n, v in response.getheaders() if n.lower() not in _NOT_FORWARDED}
        finally:
            connection.close()
        own = self.headers["Host"]  # the rest of a resumable upload comes here too
        return response.status, {name: value.replace(target, own) for name, value in kept.items()}, content

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _understand(method: str, path: str, body: bytes) -> Request:
    parts = urlsplit(path)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    place = _OBJECT.search(parts.path)
    bucket = _BUCKET.search(parts.path)
    name = unquote(place[2]) if place else ""
    action = {"GET": "GET" if name else "LIST", "DELETE": "DELETE"}.get(method, "OTHER")
    if "/upload/" in parts.path:
        action = "PUT"
        found = _MULTIPART_NAME.search(body[:4096])
        name = query.get("name") or (json.loads(found[1]) if found else "")
    return Request(action, bucket[1] if bucket else "", name, query.get("prefix", ""), 200, reached=True)


def _with(request: Request, status: int, *, reached: bool) -> Request:
    return replace(request, status=status, reached=reached)


def _error_body(status: int) -> bytes:
    message = http.client.responses.get(status, "error")
    return json.dumps({"error": {"code": status, "message": f"{message} (by the test's proxy)"}}).encode()
