"""The driver's HTTP: `/progress` and `/healthz` on one port, `/metrics` on another.

Read by the operator, by probes and by Prometheus. The documents come from the progress tracker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from influence_job.document import PROGRESS_BYTES
from influence_job.progress import Progress
from influence_job.termination import shortened

Snapshot = Callable[[], Progress]
SECONDS = 10.0
"""For a client that asks slowly, or takes its answer slowly: each holds a thread."""


@contextmanager
def serving(
    snapshot: Snapshot, host: str, progress_port: int | None, metrics_port: int | None
) -> Iterator[None]:
    """Serves while the context lasts; a port of None serves nothing, 0 any free one."""
    closers: list[Callable[[], None]] = []
    try:
        if progress_port is not None:
            closers.append(_serve_progress(snapshot, host, progress_port))
        if metrics_port is not None:
            closers.append(_serve_metrics(snapshot, host, metrics_port))
        yield
    finally:
        for close in closers:
            close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: a client that went away before its answer is no news either."""


def _serve_progress(snapshot: Snapshot, host: str, port: int) -> Callable[[], None]:
    class Handler(BaseHTTPRequestHandler):
        timeout = SECONDS

        def do_GET(self) -> None:
            if self.path == "/progress":
                self._answer(200, "application/json", shortened(snapshot(), PROGRESS_BYTES))
            elif self.path == "/healthz":
                self._answer(200, "text/plain", b"ok\n")
            else:
                self._answer(404, "text/plain", b"not found; there are /progress and /healthz\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing: a probe every second is no news."""

    server = _Server((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="progress-http", daemon=True).start()

    def close() -> None:
        server.shutdown()
        server.server_close()

    return close


class _Metrics(Collector):
    """The progress document as Prometheus metrics, made anew at every scrape."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[InfoMetricFamily | GaugeMetricFamily]:
        progress = self._snapshot()
        yield InfoMetricFamily(
            "influence_job",
            "The job this driver runs",
            {"uid": progress.job_uid, "stage": str(progress.stage)},
        )
        regions = GaugeMetricFamily("influence_regions", "Ledger rows of the present stage", labels=["state"])
        for state in ("done", "total", "failed"):
            regions.add_metric([state], getattr(progress.regions, state))
        yield regions
        yield GaugeMetricFamily("influence_workers", "Workers connected", value=progress.workers)
        yield GaugeMetricFamily(
            "influence_regions_per_second", "Rate of the last minute", value=progress.rate or 0.0
        )
        yield GaugeMetricFamily("influence_finished", "1 when complete", value=float(progress.finished))


def _serve_metrics(snapshot: Snapshot, host: str, port: int) -> Callable[[], None]:
    registry = CollectorRegistry()
    registry.register(_Metrics(snapshot))
    server, thread = start_http_server(port, addr=host, registry=registry)

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close
