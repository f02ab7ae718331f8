"""An API server's lists and watches, following a script: what kopf meets when watches break.

For what a real API server cannot be made to do at a given moment: to lose a watch's history, to answer
404 or 403 and then recover. Whatever can be shown on a real cluster is shown there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from influence_operator.cluster.kinds import INFLUENCE_JOB, POD, Kind

Event = dict[str, Any]


def resource(kind: Kind) -> dict[str, Any]:
    """A kind as discovery tells of it."""
    verbs = ["get", "list", "watch"]
    return {"name": kind.plural, "singularName": "", "namespaced": True, "kind": kind.kind, "verbs": verbs}


class ScriptedApi:
    """Serves InfluenceJobs and Pods."""

    def __init__(self) -> None:
        self.lists: dict[str, list[dict[str, Any]] | int] = {INFLUENCE_JOB.plural: [], POD.plural: []}
        """What a list answers: objects, or a status code."""
        self.streams: dict[str, asyncio.Queue[Event | None]] = {
            INFLUENCE_JOB.plural: asyncio.Queue(),
            POD.plural: asyncio.Queue(),
        }
        """What watches tell; None ends the present one."""
        self.queries: list[tuple[str, dict[str, str]]] = []
        self.writes: list[str] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers a request."""
        path = request.path
        if request.method != "GET":
            self.writes.append(f"{request.method} {path}")
        if path in _DISCOVERY:
            return web.json_response(_DISCOVERY[path])
        plural = path.rpartition("/")[2]
        self.queries.append((plural, dict(request.query)))
        if request.query.get("watch"):
            return await self._watch(request, plural)
        answer = self.lists[plural]
        if isinstance(answer, int):
            return web.json_response({"kind": "Status", "code": answer, "message": "scripted"}, status=answer)
        return web.json_response({"kind": "List", "metadata": {"resourceVersion": "100"}, "items": answer})

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while (event := await self.streams[plural].get()) is not None:
            await response.write(json.dumps(event).encode() + b"\n")
        return response


@asynccontextmanager
async def scripted_api() -> AsyncIterator[ScriptedApi]:
    """A running server."""
    api = ScriptedApi()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield api
    finally:
        await runner.cleanup()


_NAMESPACES = {
    "name": "namespaces",
    "singularName": "",
    "namespaced": False,
    "kind": "Namespace",
    "verbs": ["get", "list", "watch"],
}
_VERSION = {"groupVersion": INFLUENCE_JOB.api_version, "version": INFLUENCE_JOB.version}
_DISCOVERY: dict[str, Any] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {
        "kind": "APIGroupList",
        "groups": [{"name": INFLUENCE_JOB.group, "versions": [_VERSION], "preferredVersion": _VERSION}],
    },
    "/api/v1": {"kind": "APIResourceList", "resources": [resource(POD), _NAMESPACES]},
    f"/apis/{INFLUENCE_JOB.api_version}": {"kind": "APIResourceList", "resources": [resource(INFLUENCE_JOB)]},
}
