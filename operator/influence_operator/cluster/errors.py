"""What can go wrong between the operator and the rest of a cluster.

ClusterError
├── ApiError            the API server answered with an error
├── UnreachableError    no answer, or none in time
└── BadAnswerError      a job's process answered something else than its API promises

LeaseLostError          another replica may be leading: the process ends, so that it is no ClusterError
"""

from __future__ import annotations


class ClusterError(Exception):
    """A request failed; the pass is repeated later."""


class ApiError(ClusterError):
    """The API server refused a request."""

    def __init__(self, request: str, code: int, reason: str, message: str) -> None:
        super().__init__(f"{request}: {code} {reason}: {message}")
        self.code = code
        self.reason = reason
        """Constant of Kubernetes, such as AlreadyExists; empty if the answer had none."""
        self.message = message

    @property
    def not_found(self) -> bool:
        """The object or its kind does not exist."""
        return self.code == 404

    @property
    def already_exists(self) -> bool:
        """The name is taken."""
        return self.code == 409 and self.reason == "AlreadyExists"

    @property
    def conflict(self) -> bool:
        """A precondition (UID, resource version) does not hold any more."""
        return self.code == 409 and not self.already_exists

    @property
    def refused(self) -> bool:
        """Quota, Pod Security, a webhook or validation refused the object: repeating it alone is no cure."""
        return self.code in (400, 403, 405, 413, 422)


class UnreachableError(ClusterError):
    """No answer, or none in time."""


class BadAnswerError(ClusterError):
    """An answer that cannot be used: too large, a redirect, not JSON, of another shape."""


class LeaseLostError(Exception):
    """The replica does not lead any more."""
