"""A store in a bucket: Google Cloud Storage, S3, or fsspec's memory for unit tests.

fsspec's filesystems answer from listing caches that never expire and retry inside, out of our sight;
both are turned off here, and connections end with `close`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol

from influence_job.errors import PermanentError, Reason
from influence_job.storage.backend import Backend, Page
from influence_job.storage.credentials import google_key

REQUEST_SECONDS = 600.0
CONNECT_SECONDS = 30.0
ANSWER_SECONDS = 120.0
"""A request that takes longer, or waits so long for a connection or an answer, counts as broken."""
ONE_REQUEST_BYTES = 512 << 20
"""Up to here an object is uploaded in one request, and so in one step; regions aim at 8 to 64 MB."""
PAGE_OBJECTS = 1000
"""What a listing asks for at a time; Google's and Amazon's own limit."""


class Filesystem(Protocol):
    """What is used of fsspec's filesystems; paths start with the bucket. Two methods are ours."""

    def cat_file(self, path: str) -> bytes: ...

    def pipe_file(self, path: str, value: bytes, **options: Any) -> Any: ...

    def rm_file(self, path: str) -> None: ...

    def page(self, bucket: str, prefix: str, token: str | None, at_most: int | None) -> Page:
        """Keys in the bucket that start with `prefix`, from one request that no cache answers."""

    def end(self) -> None:
        """Closes connections."""


class Objects(Backend):
    """Objects below `root` (bucket and key prefix) of one filesystem."""

    def __init__(self, protocol: str, root: str, storage_options: Mapping[str, Any]) -> None:
        self._filesystem: Filesystem = _FILESYSTEMS[protocol](dict(storage_options))
        self._bucket, _, folder = root.strip("/").partition("/")
        self._folder = f"{folder}/" if folder else ""

    def read(self, path: str) -> bytes | None:
        try:
            return bytes(self._filesystem.cat_file(self._full(path)))
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        self._filesystem.pipe_file(self._full(path), data, chunksize=ONE_REQUEST_BYTES)

    def create(self, path: str, data: bytes) -> None:
        self._filesystem.pipe_file(self._full(path), data, mode="create")

    def page(self, prefix: str, token: str | None, at_most: int | None) -> Page:
        keys, following = self._filesystem.page(self._bucket, self._folder + prefix, token, at_most)
        return [key.removeprefix(self._folder) for key in keys], following

    def remove(self, path: str) -> None:
        try:
            self._filesystem.rm_file(self._full(path))
        except FileNotFoundError:
            return

    def close(self) -> None:
        self._filesystem.end()

    def _full(self, path: str) -> str:
        return f"{self._bucket}/{self._folder}{path}"


def _google(options: dict[str, Any]) -> Filesystem:
    from aiohttp import ClientTimeout
    from fsspec.asyn import sync
    from gcsfs.core import GCSFileSystem

    class OneTry(GCSFileSystem):
        """gcsfs that asks once: `Retry` decides on the next try, and sees every answer."""

        _request = GCSFileSystem._request.__wrapped__

        def page(self, bucket: str, prefix: str, token: str | None, at_most: int | None) -> Page:
            query = {"prefix": prefix, "pageToken": token, "maxResults": at_most or PAGE_OBJECTS}
            asked = {name: value for name, value in query.items() if value}
            found = self.call("GET", "b/{}/o", bucket, json_out=True, **asked)
            return [item["name"] for item in found.get("items", [])], found.get("nextPageToken")

        def end(self) -> None:
            session = self._session
            self._session: Any = None
            if session is not None:
                sync(self.loop, session.close, timeout=5)

    if "token" not in options and (key := google_key()) is not None:
        options["token"] = key
    options.setdefault("consistency", "md5")  # of uploads; gcsfs's crc32c needs one package more
    timeout = ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS)
    options.setdefault("requests_timeout", timeout)
    return OneTry(skip_instance_cache=True, use_listings_cache=False, **options)


def _s3(options: dict[str, Any]) -> Filesystem:
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

        def page(self, bucket: str, prefix: str, token: str | None, at_most: int | None) -> Page:
            query = {"Prefix": prefix, "ContinuationToken": token, "MaxKeys": at_most}
            asked = {name: value for name, value in query.items() if value}
            found = self.call_s3("list_objects_v2", Bucket=bucket, **asked)
            return [item["Key"] for item in found.get("Contents", [])], found.get("NextContinuationToken")

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


def _memory(options: dict[str, Any]) -> Filesystem:
    from fsspec.implementations.memory import MemoryFileSystem

    class Memory(MemoryFileSystem):
        """fsspec's memory, whose create-only write is made atomic."""

        _one_at_a_time = threading.Lock()

        def page(
            self,
            bucket: str,
            prefix: str,
            token: str | None,  # noqa: ARG002  one page holds all
            at_most: int | None,
        ) -> Page:
            start = f"/{bucket}/"
            keys = [name.removeprefix(start) for name in sorted(self.store) if name.startswith(start)]
            return [key for key in keys if key.startswith(prefix)][:at_most], None

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
            with self._one_at_a_time:
                super().pipe_file(path, value, mode=mode, **kwargs)

        def end(self) -> None:
            """Nothing is held open."""

    return Memory(skip_instance_cache=True, **options)


_FILESYSTEMS = {"gs": _google, "gcs": _google, "s3": _s3, "s3a": _s3, "memory": _memory}
PROTOCOLS = tuple(_FILESYSTEMS)
