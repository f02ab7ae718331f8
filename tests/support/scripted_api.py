"""An API server's discovery, lists and watches, following a script: what kopf meets when watches break.

For what a real API server cannot be made to do at a given moment: to lose a watch's history, to answer
404 or 403 and then recover, to learn of a kind. Whatever can be shown on a real cluster is shown there.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from influence_operator.cluster.kinds import LEASE, WATCHED_KINDS, Kind

Event = dict[str, Any]


class ScriptedApi:
    """Serves the kinds that the operator watches, and its Lease."""

    def __init__(self) -> None:
        self.kinds: set[Kind] = set(WATCHED_KINDS)
        """Those that it knows; others are 404."""
        self.lists: dict[str, list[dict[str, Any]] | int] = defaultdict(list)
        """What a list answers, by plural: objects, or a status code."""
        self.streams: dict[str, asyncio.Queue[Event | None]] = defaultdict(asyncio.Queue)
        """What watches tell, by plural; None ends the present one."""
        self.queries: list[tuple[str, dict[str, str]]] = []
        self.writes: list[str] = []
        """Other requests than those for the Lease."""
        self.lease: dict[str, Any] | None = None
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers a request."""
        path = request.path
        if LEASE.plural in path:
            return await self._lease(request)
        if request.method != "GET":
            self.writes.append(f"{request.method} {path}")
        discovery = self._discovery()
        if path in discovery:
            return web.json_response(discovery[path])
        kind = next((kind for kind in self.kinds if kind.path(None) == path), None)
        if kind is None:
            return _status(404)
        self.queries.append((kind.plural, dict(request.query)))
        if request.query.get("watch"):
            return await self._watch(request, kind.plural)
        answer = self.lists[kind.plural]
        if isinstance(answer, int):
            return _status(answer)
        return web.json_response({"kind": "List", "metadata": {"resourceVersion": "100"}, "items": answer})

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while (event := await self.streams[plural].get()) is not None:
            await response.write(json.dumps(event).encode() + b"\n")
        return response

    async def _lease(self, request: web.Request) -> web.Response:
        if request.method != "GET":
            body = await request.json()
            version = str(int(self.lease["metadata"]["resourceVersion"]) + 1 if self.lease else 1)
            self.lease = body | {"metadata": body["metadata"] | {"resourceVersion": version}}
        return web.json_response(self.lease) if self.lease else _status(404)

    def _discovery(self) -> dict[str, Any]:
        by_version: dict[str, list[dict[str, Any]]] = {"v1": [_resource("Namespace", "namespaces")]}
        for kind in self.kinds:
            by_version.setdefault(kind.api_version, []).append(_resource(kind.kind, kind.plural))
        groups = []
        for api_version in by_version.keys() - {"v1"}:
            group, version = api_version.split("/")
            named = {"groupVersion": api_version, "version": version}
            groups.append({"name": group, "versions": [named], "preferredVersion": named})
        found: dict[str, Any] = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "groups": groups},
        }
        for api_version, resources in by_version.items():
            root = "/apis" if "/" in api_version else "/api"
            found[f"{root}/{api_version}"] = {"kind": "APIResourceList", "resources": resources}
        return found


@asynccontextmanager
async def scripted_api() -> AsyncIterator[ScriptedApi]:
    """A running server."""
    api = ScriptedApi()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield api
    finally:
        await runner.cleanup()


def _resource(kind: str, plural: str) -> dict[str, Any]:
    verbs = ["get", "list", "watch"]
    return {"name": plural, "singularName": "", "namespaced": True, "kind": kind, "verbs": verbs}


def _status(code: int) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": "scripted"}, status=code)
