"""The place where one job's results lie: whole objects under paths, on files or in a bucket.

Used by the driver and by every worker; each process opens its own from URL and options. A `Store`
knows nothing of arrays or ledgers: it gives atomic whole-object operations, with retries, and with
errors that say what to do.
"""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from influence_job.errors import PermanentError, Reason
from influence_job.storage.backend import OWN_PREFIX, Backend, Page, is_passing
from influence_job.storage.local_files import LocalFiles
from influence_job.storage.objects import PROTOCOLS, Objects
from influence_job.storage.retry import Retry

THREADS = 16
"""Requests in flight when many objects are read or deleted: their latency is what costs."""

HELD = 2 * THREADS
"""Results of such requests that are held at a time, unless their reader says less."""

A_FEW = 100
"""More than there can be passing objects of killed processes where nothing else is."""

S = TypeVar("S")
T = TypeVar("T")


class Store:
    """Objects under one URL. Thread-safe; pickles as its URL and options."""

    def __init__(self, url: str, storage_options: Mapping[str, Any], backend: Backend) -> None:
        self.url = url
        self.storage_options = dict(storage_options)
        self._backend = backend
        self._retry = Retry(url)

    @classmethod
    def open(cls, url: str, storage_options: Mapping[str, Any] | None = None) -> Store:
        """The store at a path, `file://`, `gs://`, `s3://` (or `memory://`) URL. Writes nothing.

        Raises:
            PermanentError: a scheme that is not supported, or whose library is not installed.
        """
        options = dict(storage_options or {})
        try:
            url = absolute(url)
        except ValueError as error:
            raise PermanentError(Reason.INVALID_SPEC, f"output.url: {error}") from error
        protocol, separator, rest = url.partition("://")
        if not separator:
            return cls(url, options, LocalFiles(Path(url)))
        if protocol not in PROTOCOLS:
            raise PermanentError(
                Reason.INVALID_SPEC,
                f"output.url: expected a path or one of file, gs, s3, got {url!r}; other storage can be "
                f"mounted as a file system",
            )
        url = url.rstrip("/")
        backend: Backend = Retry(url).call("opening", lambda: Objects(protocol, rest, options))
        return cls(url, options, backend)

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[str, dict[str, Any]]]:
        return Store.open, (self.url, self.storage_options)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str) -> bytes | None:
        """The object's content, None if there is none."""
        return self._retry.call(f"reading {path}", lambda: self._backend.read(path))

    def put(self, path: str, data: bytes) -> None:
        """Writes or replaces the object, as a whole."""
        self._retry.call(f"writing {path}", lambda: self._backend.write(path, data))

    def create(self, path: str, data: bytes) -> bool:
        """Writes the object unless there is one; whether it is now this one.

        A try that ended in an error may have written it nevertheless. When a later try then finds an
        object, the contents are compared: they must be unique to the caller.
        """
        tries = 0

        def attempt() -> bool:
            nonlocal tries
            tries += 1
            try:
                self._backend.create(path, data)
            except FileExistsError:
                return False
            return True

        return self._retry.call(f"creating {path}", attempt) or (tries > 1 and self.get(path) == data)

    def list(self, prefix: str = "") -> list[str]:
        """Sorted paths that start with `prefix`, as the storage knows them now."""
        names, token = self._page(prefix, None, None)
        while token is not None:
            more, token = self._page(prefix, token, None)
            names += more
        return sorted(names)

    def first_path(self) -> str | None:
        """Any one object there, None when there is nothing; never reads all names of a large place."""
        names, _ = self._page("", None, A_FEW)
        return next(iter(names), None)

    def _page(self, prefix: str, token: str | None, at_most: int | None) -> Page:
        names, following = self._retry.call(
            f"listing {prefix or 'it'}", lambda: self._backend.page(prefix, token, at_most)
        )
        return [name for name in names if not is_passing(name)], following

    def delete(self, path: str) -> None:
        """Removes the object if there is one."""
        self._retry.call(f"deleting {path}", lambda: self._backend.remove(path))

    def delete_prefix(
        self, prefix: str, guard: Callable[[], None], keep: Callable[[str], bool] = lambda _: False
    ) -> None:
        """Removes all objects whose paths start with `prefix`, but those that `keep` names.

        `guard` is called before each, and there may be millions: it ends the rest by raising.
        """
        self.delete_many((path for path in self.list(prefix) if not keep(path)), guard)

    def delete_many(self, paths: Iterable[str], guard: Callable[[], None]) -> None:
        """Removes objects, many requests at once; `guard` as `delete_prefix` has it."""

        def guarded() -> Iterator[str]:
            for path in paths:
                guard()
                yield path

        for _ in _in_order(self.delete, guarded()):
            pass

    def get_many(self, paths: Iterable[str], held: int = HELD) -> Iterator[tuple[str, bytes | None]]:
        """Paths with their contents, in the order given; many requests at once, `held` contents at most.

        The one that was given last is among them: drop it before asking for the next.
        """
        return _in_order(lambda path: (path, self.get(path)), paths, held)

    def put_many(self, objects: Iterable[tuple[str, bytes]]) -> None:
        """Writes or replaces objects, paths with their contents; many requests at once, few contents held."""
        for _ in _in_order(lambda named: self.put(*named), objects):
            pass

    def get_json(self, path: str) -> Any:
        """The parsed object, None if there is none.

        Raises:
            PermanentError: it is no JSON.
        """
        data = self.get(path)
        if data is None:
            return None
        try:
            return json.loads(data)
        except ValueError as error:
            raise PermanentError(
                Reason.STORE_CORRUPT,
                f"{self.url}/{path}: expected JSON, got {data[:40]!r}; restore the object, or choose another "
                f"output.url",
            ) from error

    def put_json(self, path: str, document: Any) -> None:
        """Writes or replaces a JSON document."""
        self.put(path, to_json(document))

    def create_json(self, path: str, document: Any) -> bool:
        """`create` of a JSON document."""
        return self.create(path, to_json(document))

    def probe(self) -> None:
        """Proves that objects can be written, read and deleted.

        Raises:
            PermanentError: they cannot, and no retry would help.
            InfrastructureError: the storage does not answer.
        """
        path, data = f"{OWN_PREFIX}probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
        self.put(path, data)
        found = self.get(path)
        self.delete(path)
        if found != data:
            raise PermanentError(
                Reason.STORE_UNREACHABLE,
                f"{self.url}: an object that was just written reads differently; storage without "
                f"read-after-write consistency cannot hold a store",
            )

    def close(self) -> None:
        """Ends connections. The store must not be used afterwards."""
        self._backend.close()


def absolute(url: str) -> str:
    """The url of a store so that it means the same in every folder: of files their path.

    Raises:
        ValueError: the home of a user whom this machine does not know.
    """
    protocol, separator, rest = url.partition("://")
    if separator and protocol != "file":
        return url
    try:
        return str(Path(unquote(rest) if separator else url).expanduser().absolute())
    except RuntimeError as error:
        raise ValueError(
            f"expected a path below a home that is there, got {url!r}: {error}; write the folder in full"
        ) from error


def to_json(document: Any) -> bytes:
    """JSON as we store it: readable, keys in the order given, NaN as zarr writes it."""
    return json.dumps(document, indent=1).encode()


def _in_order(function: Callable[[S], T], items: Iterable[S], held: int = HELD) -> Iterator[T]:
    """Results in order; at most `held` at any time. What has not begun when one fails is left."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        window: deque[Future[T]] = deque()
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) >= held:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
