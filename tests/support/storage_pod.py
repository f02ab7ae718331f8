"""The faulty proxy as a pod's process: what stands before the storage emulator in the test cluster.

Started with `python storage_pod.py TARGET PORT CONTROL_PORT`; standard library only, so any image with
Python serves. On the control port `POST /call` takes `{"method", "arguments"}` of `FaultyProxy`, and
`GET /log?bucket=NAME&since=N` tells the requests of a bucket from the N-th on. `cluster_storage` is the other
end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from faulty_proxy import FaultyProxy

CALLABLE = ("fail_every", "fail_all", "lose_answers", "go_down", "heal")


class _Control(ThreadingHTTPServer):
    daemon_threads = True
    proxy: FaultyProxy


class _Handler(BaseHTTPRequestHandler):
    server: _Control

    def do_GET(self) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        seen = self.server.proxy.log_of(asked["bucket"][0])[int(asked["since"][0]) :]
        self._answer(200, [dataclasses.asdict(request) for request in seen])

    def do_POST(self) -> None:
        call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if call["method"] not in CALLABLE:
            self._answer(400, f"expected one of {CALLABLE}, got {call['method']}")
            return
        getattr(self.server.proxy, call["method"])(*call["arguments"], bucket=call["bucket"])
        self._answer(200, "done")

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def main() -> None:
    """Serves until the pod ends."""
    target, port, control_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    proxy = FaultyProxy(target, ("0.0.0.0", port))
    proxy.start()
    control = _Control(("0.0.0.0", control_port), _Handler)
    control.proxy = proxy
    control.serve_forever()


if __name__ == "__main__":
    main()
