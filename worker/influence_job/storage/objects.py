"""A store in a bucket: Google Cloud Storage, S3, or fsspec's memory for unit tests.

fsspec's filesystems answer from listing caches that never expire and retry inside, out of our sight;
both are turned off here, and connections end with `close`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from influence_job.errors import PermanentError, Reason
from influence_job.storage.backend import Backend, is_passing

REQUEST_SECONDS = 600.0
CONNECT_SECONDS = 30.0
ANSWER_SECONDS = 120.0
"""A request that takes longer, or waits so long for a connection or an answer, counts as broken."""
ONE_REQUEST_BYTES = 512 << 20
"""Up to here an object is uploaded in one request, and so in one step; regions aim at 8 to 64 MB."""


class Objects(Backend):
    """Objects below `root` (bucket and key prefix) of one fsspec filesystem."""

    def __init__(self, protocol: str, root: str, storage_options: Mapping[str, Any]) -> None:
        self._filesystem = _FILESYSTEMS[protocol](dict(storage_options))
        self._root = root.strip("/")

    def read(self, path: str) -> bytes | None:
        try:
            return bytes(self._filesystem.cat_file(self._full(path)))
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        self._filesystem.pipe_file(self._full(path), data, chunksize=ONE_REQUEST_BYTES)

    def create(self, path: str, data: bytes) -> None:
        self._filesystem.pipe_file(self._full(path), data, mode="create")

    def names(self, prefix: str) -> list[str]:
        folder, _, start = prefix.rpartition("/")
        self._filesystem.invalidate_cache()
        found = self._filesystem.find(self._full(folder), **({"prefix": start} if start else {}))
        names = (self._relative(name) for name in found)
        return sorted(name for name in names if name.startswith(prefix) and not is_passing(name))

    def first_name(self) -> str | None:
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.ls(self._root, detail=False)
        except FileNotFoundError:
            return None
        names = (self._relative(name) for name in found)
        return next((name for name in names if name and not is_passing(name)), None)

    def remove(self, path: str) -> None:
        try:
            self._filesystem.rm_file(self._full(path))
        except FileNotFoundError:
            return

    def close(self) -> None:
        self._filesystem.end()

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _relative(self, name: str) -> str:
        return name.strip("/").removeprefix(self._root).strip("/")


def _google(options: dict[str, Any]) -> Any:
    from aiohttp import ClientTimeout
    from fsspec.asyn import sync
    from gcsfs.core import GCSFileSystem

    class OneTry(GCSFileSystem):
        """gcsfs that asks once: `Retry` decides on the next try, and sees every answer."""

        _request = GCSFileSystem._request.__wrapped__

        def end(self) -> None:
            session = self._session
            self._session: Any = None
            if session is not None:
                sync(self.loop, session.close, timeout=5)

    options.setdefault("consistency", "md5")  # of uploads; gcsfs's crc32c needs one package more
    timeout = ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS)
    options.setdefault("requests_timeout", timeout)
    return OneTry(skip_instance_cache=True, use_listings_cache=False, **options)


def _s3(options: dict[str, Any]) -> Any:
    try:
        from s3fs import S3FileSystem
    except ImportError as error:
        raise PermanentError(
            Reason.INVALID_SPEC,
            "output.url: s3:// needs s3fs, which is not installed; install influence-operator[s3]",
        ) from error

    class OneTry(S3FileSystem):
        """s3fs that asks once, for the same reason."""

        retries = 1

        def end(self) -> None:
            if self._s3 is not None:
                self.close_session(self.loop, self._s3)

    config: dict[str, Any] = {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": ANSWER_SECONDS,
    }
    options["config_kwargs"] = config | options.get("config_kwargs", {})
    return OneTry(skip_instance_cache=True, use_listings_cache=False, **options)


def _memory(options: dict[str, Any]) -> Any:
    from fsspec.implementations.memory import MemoryFileSystem

    class Memory(MemoryFileSystem):
        """fsspec's memory, whose create-only write is made atomic."""

        _one_at_a_time = threading.Lock()

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
            with self._one_at_a_time:
                super().pipe_file(path, value, mode=mode, **kwargs)

        def end(self) -> None:
            """Nothing is held open."""

    return Memory(skip_instance_cache=True, **options)


_FILESYSTEMS = {"gs": _google, "gcs": _google, "s3": _s3, "s3a": _s3, "memory": _memory}
PROTOCOLS = tuple(_FILESYSTEMS)
