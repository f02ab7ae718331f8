"""The watches: kopf lists and watches, `handlers` take what it tells, and this module adds what it lacks.

kopf runs in a thread with an event loop of its own, because at its end it cancels every task of its loop and
waits 5 s. A tap on its stream of events (`_tap`) adds three things: objects that vanished while no watch ran
are told as deleted after the next list, an API server's refusal (a CRD that was removed, a right not yet
granted) is waited out instead of ending the process, and every list, event and bookmark is a sign of life.

Where single namespaces are watched, one of them may be gone, and with it the Role that let the operator list
it. `complete` waits for no namespace that was refused, as long as another has been told; `told` says of each
whether its jobs' children are known.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import kopf
from kopf._cogs.clients import errors as kopf_errors
from kopf._cogs.clients import watching as kopf_watching
from kubernetes.aio.client import Configuration

from influence_operator.cluster.kinds import INFLUENCE_JOB, WATCHED_KINDS, Kind
from influence_operator.manifests.names import JOB_UID

Object = Mapping[str, Any]

_kopf_stream = kopf_watching.infinite_watch
REFUSED_DELAY = 5.0
"""Seconds until a list that the API server refused is tried again."""
CONNECT_DELAYS = (0.2, 1.0, 2.0, 4.0)
"""Seconds before a request that failed is tried again by kopf; after the last it lists anew."""

log = logging.getLogger(__name__)


Seen = Callable[[Kind, str | None, Object], None]
"""Is told of an object that was listed (None), ADDED, MODIFIED or DELETED."""
Listed = Callable[[], None]
"""Is told that everything that exists of one more kind has been told, or that a list was refused."""


class _Stream:
    """One kind in one namespace (None: all), as far as kopf has told of it."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, Any]] = {}
        self.listing: set[str] | None = None
        """UIDs of the list that is arriving; None between lists."""
        self.untold: set[str] = set()
        """UIDs of the first list whose handlers have not run yet."""
        self.listed = False
        self.told = False
        self.served = True
        self.trouble: type[Exception] | None = None
        """What the last try ended with, so that it is logged once; None while the watch runs."""
        self.last_sign = time.monotonic()


class Watches:
    """All watches, and what is known of their health. `start` once; they end with the process."""

    def __init__(
        self, seen: Seen, listed: Listed, configuration: Configuration, namespaces: tuple[str, ...]
    ) -> None:
        """`seen` and `listed` are called in the event loop that runs now."""
        self._seen, self._listed = seen, listed
        self._configuration = configuration
        self._namespaces: tuple[str | None, ...] = namespaces or (None,)
        self._home = asyncio.get_running_loop()
        self._streams: dict[tuple[Kind, str | None], _Stream] = {}
        self._refused: set[str | None] = set()
        """Namespaces of which a list was forbidden before it was told; for good, so that none makes the
        others wait while it comes back."""
        self.failed: asyncio.Future[None] = self._home.create_future()
        """Ends with the error that ended kopf."""
        self._stopping = threading.Event()
        kopf_watching.infinite_watch = self._tap

    def start(self, kinds: tuple[Kind, ...], registry: kopf.OperatorRegistry) -> None:
        """Watches these kinds from now on. The API server must serve them."""
        for kind in kinds:
            for namespace in self._namespaces:
                self._streams[kind, namespace] = _Stream()
        name = f"watch {kinds[0].kind}"
        threading.Thread(target=self._run, args=(registry,), name=name, daemon=True).start()

    def stop(self) -> None:
        """Ends the watches, for whoever outlives them; the operator's process does not."""
        self._stopping.set()

    def tell(self, kind: Kind, event_type: str | None, obj: Object) -> None:
        """Takes an event from a handler, in kopf's thread."""
        self._home.call_soon_threadsafe(self._seen, kind, event_type, obj)
        stream = self._stream(kind, obj["metadata"].get("namespace"))
        stream.untold.discard(obj["metadata"]["uid"])
        self._announce(stream)

    def serves(self, kind: Kind) -> bool:
        """Whether a watch of the kind is running."""
        streams = [stream for (k, _), stream in self._streams.items() if k == kind]
        return bool(streams) and all(stream.served for stream in streams)

    def complete(self) -> bool:
        """Whether everything that existed at the start has been told, but for namespaces that were refused.

        If all were, nothing is known and nothing complete. Absent kinds have nothing to tell.
        """
        untold = self._untold()
        return untold <= self._refused and untold != set(self._namespaces)

    def told(self, namespace: str) -> bool:
        """Whether everything that existed in the namespace at the start has been told."""
        return self._untold().isdisjoint((namespace, None))

    def silence(self) -> float:
        """Seconds since the quietest watch gave a sign of life."""
        signs = [stream.last_sign for stream in self._streams.values() if stream.served]
        return time.monotonic() - min(signs) if signs else 0.0

    async def _tap(self, *, resource: Any, namespace: Any, **rest: Any) -> AsyncIterator[Any]:
        """Kopf's endless stream of one resource, with what it lacks."""
        kind = next(k for k in WATCHED_KINDS if (k.group, k.plural) == (resource.group, resource.plural))
        stream = self._streams[kind, namespace]
        while True:
            try:
                async for event in _kopf_stream(resource=resource, namespace=namespace, **rest):
                    stream.last_sign = time.monotonic()
                    stream.served = True
                    if stream.trouble:
                        log.info("watching %s%s again", kind.plural, _where(namespace))
                        stream.trouble = None
                    for vanished in self._follow(kind, stream, event):
                        yield vanished
                    yield event
            except (kopf_errors.APIError, kopf_watching.WatchingError) as error:
                stream.served = not isinstance(error, kopf_errors.APINotFoundError)
                stream.last_sign = time.monotonic()
                if stream.trouble is not type(error):
                    what = kind.plural + _where(namespace)
                    log.warning("watching %s: %s; tried again every %.0f s", what, error, REFUSED_DELAY)
                    stream.trouble = type(error)
                    self._home.call_soon_threadsafe(self._refuse, namespace, stream, error)
                await asyncio.sleep(REFUSED_DELAY)

    def _follow(self, kind: Kind, stream: _Stream, event: Any) -> list[dict[str, Any]]:
        """Notes the event; returns deletions that no watch has seen, once a list is complete."""
        if event is kopf_watching.Bookmark.LISTED:
            present, stream.listing = stream.listing or set(), None
            gone = [stream.known.pop(uid) for uid in list(stream.known) if uid not in present]
            if not stream.listed:
                stream.listed = True
                self._announce(stream)
            return [{"type": "DELETED", "object": obj} for obj in gone]
        event_type, obj = event["type"], event["object"]
        if event_type == "BOOKMARK":
            return []
        uid = obj["metadata"]["uid"]
        if event_type is None:
            stream.listing = stream.listing or set()
            stream.listing.add(uid)
            if not stream.listed:
                stream.untold.add(uid)
        if event_type == "DELETED":
            stream.known.pop(uid, None)
        else:
            stream.known[uid] = _identity(kind, obj)
        return []

    def _announce(self, stream: _Stream) -> None:
        if stream.listed and not stream.told and not stream.untold:
            self._home.call_soon_threadsafe(self._settle, stream)

    def _settle(self, stream: _Stream) -> None:
        """In the event loop, behind all that `seen` was called for: no pass may count on it before."""
        if not stream.told:
            stream.told = True
            self._listed()

    def _refuse(self, namespace: str | None, stream: _Stream, error: Exception) -> None:
        """In the event loop, too: this stream may be the last that was waited for."""
        if stream.told:
            return
        if isinstance(error, kopf_errors.APIForbiddenError):
            self._refused.add(namespace)
        self._listed()

    def _untold(self) -> set[str | None]:
        """The namespaces of which something is still to be told."""
        return {name for (_, name), stream in self._streams.items() if stream.served and not stream.told}

    def _stream(self, kind: Kind, namespace: str | None) -> _Stream:
        return self._streams.get((kind, namespace)) or self._streams[kind, None]

    def _run(self, registry: kopf.OperatorRegistry) -> None:
        try:
            asyncio.run(self._operate(registry))
            error: BaseException = RuntimeError("the watches ended")
        except BaseException as raised:
            error = raised
        if not self._stopping.is_set():
            self._home.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    async def _operate(self, registry: kopf.OperatorRegistry) -> None:
        configuration = self._configuration

        @kopf.on.login(registry=registry)
        async def login(**_: object) -> kopf.ConnectionInfo:
            return await _connection(configuration)

        namespaces = [namespace for namespace in self._namespaces if namespace]
        await kopf.operator(
            registry=registry,
            settings=_settings(),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
            stop_flag=self._stopping,
        )


def _where(namespace: str | None) -> str:
    return f" in {namespace}" if namespace else ""


def _identity(kind: Kind, obj: Object) -> dict[str, Any]:
    """What a handler needs to know of an object that is gone."""
    kept = ("name", "namespace", "uid", "labels", "resourceVersion")
    metadata = {key: obj["metadata"][key] for key in kept if key in obj["metadata"]}
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata}


async def _connection(configuration: Configuration) -> kopf.ConnectionInfo:
    """The same credentials as `cluster.api` uses, for kopf."""
    scheme, _, token = (await configuration.get_api_key_with_prefix("BearerToken") or "").rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        scheme=scheme or None,
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        proxy_url=configuration.proxy,
    )


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    # Only what belongs to a job crosses the wire: thousands of foreign pods cost nothing.
    settings.watching.label_selectors[lambda resource: resource.plural != INFLUENCE_JOB.plural] = JOB_UID
    settings.scanning.disabled = True  # needs no rights on namespaces and CRDs; `process` looks for CRDs
    settings.posting.enabled = False
    # kopf takes its finalizer from every object for which it has no handler of deletions. By default it is
    # the one that dask-kubernetes, which is built on kopf as well, puts back at once, thirty times a second.
    settings.persistence.finalizer = "influence-operator.dev/never-set"
    settings.queueing.idle_timeout = 1.0
    settings.networking.error_backoffs = CONNECT_DELAYS
    settings.process.ultimate_exiting_timeout = None
    return settings
