"""Who is computing: the identity of one attempt of one job, as its claim on the store records it."""

from __future__ import annotations

import socket
import uuid
from dataclasses import dataclass


@dataclass(frozen=True)
class JobIdentity:
    """A job's UID, the attempt number and the pod (or host) it runs in."""

    uid: str
    attempt: int = 0
    pod: str = ""

    @classmethod
    def local(cls) -> JobIdentity:
        """A new job on this machine: every `influence run` is one."""
        return cls(uid=str(uuid.uuid4()), attempt=0, pod=socket.gethostname())
