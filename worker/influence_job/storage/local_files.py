"""A store in a folder of this machine's file systems.

Every object is written under a passing name in its own folder and then renamed, so that a process
killed at any moment leaves the old content or the new. File and folder are on the disk before a write
returns: what the ledger calls done is there when a machine comes back that lost its power. `create` does
not go through fsspec, which checks and then writes.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from influence_job.storage.backend import OWN_PREFIX, Backend, Page

_WITHOUT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""File systems that know no such request, for a folder or at all: they do what they can."""
_WITHOUT_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalFiles(Backend):
    """Objects are files below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def write(self, path: str, data: bytes) -> None:
        target = self._root / path
        passing = _write_passing(target, data)
        try:
            passing.replace(target)
            _sync_folder(target.parent)
        except OSError:
            passing.unlink(missing_ok=True)
            raise

    def create(self, path: str, data: bytes) -> None:
        target = self._root / path
        passing = _write_passing(target, data)
        try:
            os.link(passing, target)
        except OSError as error:
            if error.errno not in _WITHOUT_HARD_LINKS:
                raise
            _write_new(target, data)
        finally:
            passing.unlink(missing_ok=True)
        _sync_folder(target.parent)

    def page(
        self,
        prefix: str,
        token: str | None,  # noqa: ARG002  one page holds all
        at_most: int | None,
    ) -> Page:
        folder = prefix.rpartition("/")[0]
        found = (path.relative_to(self._root).as_posix() for path in _files(self._root / folder))
        return list(islice((name for name in found if name.startswith(prefix)), at_most)), None

    def remove(self, path: str) -> None:
        target = self._root / path
        target.unlink(missing_ok=True)
        for folder in target.parents:  # empty folders would look like broken arrays to zarr
            if folder == self._root:
                return
            try:
                folder.rmdir()
            except OSError:
                return

    def close(self) -> None:
        """Nothing is held open."""


def _write_passing(target: Path, data: bytes) -> Path:
    passing = target.with_name(f"{OWN_PREFIX}{uuid.uuid4().hex}")
    try:
        _write_new(passing, data)
    except FileNotFoundError:
        _make_folder(target.parent)
        _write_new(passing, data)
    except OSError:
        passing.unlink(missing_ok=True)
        raise
    return passing


def _write_new(path: Path, data: bytes) -> None:
    """Writes a file that must not exist. The mode leaves the permissions to the umask."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        _sync(descriptor)


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it, each on the disk before anything is in it."""
    if not folder.parent.is_dir():
        _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Has the names in a folder on the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return  # deleted meanwhile, with all that was in it
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _WITHOUT_SYNC:
            raise


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder; a folder that vanishes meanwhile, or never was, holds none."""
    try:
        with os.scandir(folder) as listing:
            entries = list(listing)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        else:
            yield Path(entry.path)
