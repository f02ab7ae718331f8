"""What the operator counts. Every number is served at `/metrics`; the names are part of the interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The operator's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time and open files
        prefix = "influence_operator"
        self._reconciles = Counter(
            f"{prefix}_reconciles", "Passes over one job, by result", ["result"], registry=self.registry
        )
        self._seconds = Histogram(
            f"{prefix}_reconcile_seconds",
            "Duration of a pass",
            registry=self.registry,
            buckets=(0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self._requests = Counter(
            f"{prefix}_api_requests",
            "Requests to the API server; code 0 means that none answered",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self._events = Counter(
            f"{prefix}_watch_events", "Events of the watches", ["kind"], registry=self.registry
        )
        self._depth = Gauge(f"{prefix}_queue_depth", "Jobs that are due for a pass", registry=self.registry)
        self._age = Gauge(
            f"{prefix}_queue_oldest_seconds", "How long the oldest of them waits", registry=self.registry
        )
        self._jobs = Gauge(f"{prefix}_jobs", "InfluenceJobs by phase", ["phase"], registry=self.registry)
        self._leader = Gauge(f"{prefix}_leader", "1 while this replica leads", registry=self.registry)
        self._silence = Gauge(
            f"{prefix}_watch_silence_seconds",
            "Time since the quietest watch last heard of the API server",
            registry=self.registry,
        )
        self._leader.set(0)

    def reconciled(self, result: str, seconds: float) -> None:
        """A pass ended: `done`, `failed` or `gone`."""
        self._reconciles.labels(result).inc()
        self._seconds.observe(seconds)

    def api_request(self, verb: str, resource: str, code: int) -> None:
        """A request to the API server was answered, or not (code 0)."""
        self._requests.labels(verb, resource, str(code)).inc()

    def watch_event(self, kind: str) -> None:
        """A watch told of an object."""
        self._events.labels(kind).inc()

    def observe_queue(self, depth: Callable[[], float], oldest: Callable[[], float]) -> None:
        """Has the queue's numbers read at every scrape."""
        self._depth.set_function(depth)
        self._age.set_function(oldest)

    def observe_watches(self, silence: Callable[[], float]) -> None:
        """Has the age of the quietest watch read at every scrape."""
        self._silence.set_function(silence)

    def leads(self) -> None:
        """The replica has the lease from now on."""
        self._leader.set(1)

    def text(self, jobs_by_phase: Mapping[str, int]) -> bytes:
        """The answer to a scrape."""
        self._jobs.clear()
        for phase, number in jobs_by_phase.items():
            self._jobs.labels(phase).set(number)
        return generate_latest(self.registry)
