"""What a storage system must be able to do for a store: five primitive operations.

Called by `Store` only, which adds retries and the errors of a job. Paths are relative to the store's
root, with `/`. Errors are the system's own; `retry.judge` knows them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

Page = tuple[list[str], str | None]

OWN_PREFIX = ".influence-"
"""Names of our own passing objects (probes, unfinished files): the store never lists them."""


def is_passing(path: str) -> bool:
    """Whether the last part of a path names a passing object of ours."""
    return path.rpartition("/")[2].startswith(OWN_PREFIX)


class Backend(ABC):
    """One root in one storage system. Thread-safe."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """The object's content, None if there is none."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Replaces the object as a whole: no reader ever sees a part of it."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> None:
        """Writes the object if there is none, in one atomic step.

        Raises:
            FileExistsError: there is one.
        """

    @abstractmethod
    def page(self, prefix: str, token: str | None, at_most: int | None) -> Page:
        """Some paths that start with `prefix`, as the system knows them now, and the token of the next page.

        One request, so that a retry repeats one and not a listing of hundreds.
        """

    @abstractmethod
    def remove(self, path: str) -> None:
        """Removes the object if there is one."""

    @abstractmethod
    def close(self) -> None:
        """Ends connections."""
