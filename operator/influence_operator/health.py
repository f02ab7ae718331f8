"""`/healthz` and `/readyz` on one port, `/metrics` on another. Served by the loop that does the work, so that
a loop that hangs answers no probe.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from influence_operator.metrics import CONTENT_TYPE

Check = Callable[[], str | None]
"""Why something is not as it should be; None while it is."""


@asynccontextmanager
async def serving(
    health_port: int, metrics_port: int, healthy: Check, ready: Check, metrics: Callable[[], bytes]
) -> AsyncIterator[None]:
    """Serves while the context lasts. A port of 0 takes any that is free."""

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": CONTENT_TYPE})

    probes = web.Application()
    probes.router.add_get("/healthz", _answering(healthy))
    probes.router.add_get("/readyz", _answering(ready))
    numbers = web.Application()
    numbers.router.add_get("/metrics", scrape)
    runners = [web.AppRunner(app, access_log=None, shutdown_timeout=0.5) for app in (probes, numbers)]
    try:
        for runner, port in zip(runners, (health_port, metrics_port), strict=True):
            await runner.setup()
            await web.TCPSite(runner, port=port).start()
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


def _answering(check: Check) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_: web.Request) -> web.StreamResponse:
        problem = check()
        return web.Response(status=503 if problem else 200, text=(problem or "ok") + "\n")

    return answer
