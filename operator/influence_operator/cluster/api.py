"""The one place where requests to the API server are made.

Called by everything in this package except the watches, which are kopf's. Objects are the plain mappings
that the API server sends. Reading is tried again on 429, 5xx and broken connections; writing is not: the
pass that wanted it comes again. Bodies are never logged, for some are Secrets.

Rights: `cluster.kinds.RIGHTS` lists every (group, resource, verb); a request that it does not list is a
defect and raises at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

from influence_operator.cluster.errors import ApiError, LeaseLostError, UnreachableError
from influence_operator.cluster.kinds import Kind, allowed
from influence_operator.metrics import Metrics

FIELD_MANAGER = "influence-operator"
READ_DELAYS = (0.2, 0.5, 1.0)
"""Seconds before a reading request is tried again."""
TIMEOUT = 10.0
"""Seconds a request may take."""
PAGE = 500
"""Objects per page of a list."""
JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"

Object = Mapping[str, Any]
Fence = Callable[[], float]
"""Seconds for which this replica may still write."""

log = logging.getLogger(__name__)


async def credentials() -> Configuration:
    """Where the API server is and how to speak to it: the pod's service account, else $KUBECONFIG.

    Raises:
        kubernetes.aio.config.ConfigException: neither is there.
    """
    configuration = Configuration()
    try:
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    except kubernetes_config.ConfigException:
        await kubernetes_config.load_kube_config(client_configuration=configuration)
    return configuration


class Api:
    """A client of the API server."""

    def __init__(self, configuration: Configuration, metrics: Metrics) -> None:
        self._configuration = configuration
        self._client = RESTClientObject(configuration)
        self._metrics = metrics
        self._fence: Fence = lambda: TIMEOUT

    async def close(self) -> None:
        """Ends all connections."""
        await self._client.close()

    def fenced(self, fence: Fence) -> None:
        """From now on writes need time left on `fence`."""
        self._fence = fence

    async def get(self, kind: Kind, namespace: str, name: str, timeout: float = TIMEOUT) -> Object:
        """One object."""
        return await self._read("get", kind, kind.path(namespace, name), timeout)

    async def list(self, kind: Kind, namespace: str | None, **parameters: str) -> AsyncIterator[Object]:
        """Objects of a namespace, or of all; a page at a time."""
        following = ""
        while True:
            query = urlencode({"limit": PAGE, **parameters} | ({"continue": following} if following else {}))
            page = await self._read("list", kind, f"{kind.path(namespace)}?{query}", TIMEOUT)
            for item in page.get("items") or ():
                yield item
            following = (page.get("metadata") or {}).get("continue") or ""
            if not following:
                return

    async def serves(self, kind: Kind) -> bool:
        """Whether the API server knows the kind now."""
        path = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
        try:
            resources = await self._request("get", "discovery", "GET", path, None, JSON, TIMEOUT)
        except ApiError as error:
            if error.not_found:
                return False
            raise
        return any(resource.get("name") == kind.plural for resource in resources.get("resources") or ())

    async def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        """Creates an object and returns it as stored."""
        query = f"?fieldManager={FIELD_MANAGER}"
        return await self._write("create", kind, "POST", kind.path(namespace) + query, body)

    async def update(self, kind: Kind, namespace: str, name: str, body: Object, timeout: float) -> Object:
        """Replaces an object; its resource version is the precondition. Not fenced: this is the Lease."""
        path = kind.path(namespace, name) + f"?fieldManager={FIELD_MANAGER}"
        return await self._checked("update", kind, "", "PUT", path, body, JSON, timeout)

    async def merge(
        self, kind: Kind, namespace: str, name: str, patch: Object, subresource: str = ""
    ) -> Object:
        """Applies a JSON merge patch."""
        path = kind.path(namespace, name, subresource) + f"?fieldManager={FIELD_MANAGER}"
        return await self._write("patch", kind, "PATCH", path, patch, MERGE_PATCH, subresource)

    async def json_patch(self, kind: Kind, namespace: str, name: str, patch: Sequence[Object]) -> Object:
        """Applies a JSON patch, whose `test` operations are its preconditions."""
        path = kind.path(namespace, name) + f"?fieldManager={FIELD_MANAGER}"
        return await self._write("patch", kind, "PATCH", path, patch, JSON_PATCH)

    async def apply_status(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        """Applies a status server-side: what we set before and leave out now disappears."""
        query = f"?fieldManager={FIELD_MANAGER}&force=true"
        path = kind.path(namespace, name, "status") + query
        return await self._write("patch", kind, "PATCH", path, body, APPLY_PATCH, "status")

    async def delete(
        self, kind: Kind, namespace: str, name: str, uid: str | None, resource_version: str | None = None
    ) -> Object:
        """Deletes an object if it still is the one meant; returns it while it is going, else a Status."""
        preconditions = {"uid": uid, "resourceVersion": resource_version}
        options = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Background",
            "preconditions": {key: value for key, value in preconditions.items() if value},
        }
        return await self._write("delete", kind, "DELETE", kind.path(namespace, name), options)

    async def _read(self, verb: str, kind: Kind, path: str, timeout: float) -> Object:
        for delay in (*READ_DELAYS, None):
            try:
                return await self._checked(verb, kind, "", "GET", path, None, JSON, timeout)
            except (ApiError, UnreachableError) as error:
                again = isinstance(error, UnreachableError) or error.code == 429 or error.code >= 500
                if delay is None or not again:
                    raise
                await asyncio.sleep(delay)
        raise AssertionError("the last try returns or raises")

    async def _write(
        self,
        verb: str,
        kind: Kind,
        method: str,
        path: str,
        body: object,
        content_type: str = JSON,
        subresource: str = "",
    ) -> Object:
        left = self._fence()
        if left <= 0:
            raise LeaseLostError(f"{verb} {kind.plural}: the lease ran out before this write")
        timeout = min(TIMEOUT, left)
        return await self._checked(verb, kind, subresource, method, path, body, content_type, timeout)

    async def _checked(
        self,
        verb: str,
        kind: Kind,
        subresource: str,
        method: str,
        path: str,
        body: object,
        content_type: str,
        timeout: float,
    ) -> Object:
        assert allowed(kind, verb, subresource), f"{verb} {kind.plural}/{subresource} is not in RIGHTS"
        resource = f"{kind.plural}/{subresource}" if subresource else kind.plural
        return await self._request(verb, resource, method, path, body, content_type, timeout)

    async def _request(
        self,
        verb: str,
        resource: str,
        method: str,
        path: str,
        body: object,
        content_type: str,
        timeout: float,
    ) -> Object:
        what = f"{verb} {path.partition('?')[0]}"
        headers = {"Content-Type": content_type, "Accept": JSON, "User-Agent": FIELD_MANAGER}
        token = await self._configuration.get_api_key_with_prefix("BearerToken")
        if token:
            headers["Authorization"] = token
        url = self._configuration.host + path
        try:
            response = await self._client.request(
                method, url, headers=headers, body=body, _request_timeout=aiohttp.ClientTimeout(total=timeout)
            )
            data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._metrics.api_request(verb, resource, 0)
            raise UnreachableError(f"{what}: {type(error).__name__}: {error}") from error
        self._metrics.api_request(verb, resource, response.status)
        return _object(what, response.status, data)


def _object(what: str, code: int, data: bytes) -> Object:
    try:
        answer = json.loads(data) if data else {}
    except ValueError:
        answer = {"message": data[:200].decode(errors="replace")}
    if not isinstance(answer, dict):
        answer = {"message": "expected an object"}
        code = code if code >= 400 else 502
    if code >= 400:
        raise ApiError(what, code, str(answer.get("reason") or ""), str(answer.get("message") or ""))
    return answer
