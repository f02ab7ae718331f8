"""Whether a storage error is worth another try: decided here, once, for every storage system.

`Retry.call` runs one operation of a store. What may pass (408, 429, 5xx, broken connections, time-outs)
is tried again for ten minutes and then is an `InfrastructureError`; what no retry can cure (no
permission, no such bucket, a full disk) is a `PermanentError` at once. Anything else is a defect of
ours and passes through as it is.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential, wait_random

from influence_job.errors import InfrastructureError, PermanentError, Reason

LIMIT_VARIABLE = "INFLUENCE_STORAGE_RETRY_SECONDS"
DEFAULT_LIMIT_SECONDS = 600.0
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 20.0
UNAUTHORIZED_ATTEMPTS = 3
"""A token may expire between its last check and its use: 401 is believed the third time."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class Verdict(Enum):
    """What an error of a storage system means; the value of a permanent one says what to do."""

    TRANSIENT = "try again"
    UNAUTHORIZED = (
        "log in: these credentials are not valid (output.credentialsSecretRef, or the environment's)"
    )
    NO_CREDENTIALS = "log in: give credentials (output.credentialsSecretRef, or the environment's)"
    DENIED = "grant this identity read, write and delete there, or choose another output.url"
    MISSING = "create the bucket (or mount the volume), or correct output.url"
    FULL = "free space or raise the quota there; what is stored so far is kept"
    READ_ONLY = "mount the file system for writing, or choose another output.url"
    NOT_A_FOLDER = "a file stands where the store needs a folder: choose another output.url"
    INVALID = "correct output.url or output.storageOptions"


# 409: S3 answers it when two conditional writes meet; the second try finds who won.
_TRANSIENT_STATUS = {408, 409, 429}
_VERDICT_OF_STATUS = {401: Verdict.UNAUTHORIZED, 403: Verdict.DENIED, 404: Verdict.MISSING}
_VERDICT_OF_ERRNO = {
    errno.EACCES: Verdict.DENIED,
    errno.EPERM: Verdict.DENIED,
    errno.EROFS: Verdict.READ_ONLY,
    errno.ENOSPC: Verdict.FULL,
    errno.EDQUOT: Verdict.FULL,
    errno.ENOTDIR: Verdict.NOT_A_FOLDER,
    errno.EISDIR: Verdict.NOT_A_FOLDER,
    errno.ENOENT: Verdict.MISSING,
    errno.ENAMETOOLONG: Verdict.INVALID,
    errno.EINVAL: Verdict.INVALID,
} | dict.fromkeys(
    (
        *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR),
        *(errno.EMFILE, errno.ENFILE, errno.EPIPE, errno.ETIMEDOUT),
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH),
    ),
    Verdict.TRANSIENT,
)
# By name, so that libraries which are not installed, or not needed, are not imported. Order matters:
# the first class in an error's ancestry that stands here decides.
_VERDICT_OF_TYPE = {
    "google.auth.exceptions.DefaultCredentialsError": Verdict.NO_CREDENTIALS,
    "google.auth.exceptions.GoogleAuthError": Verdict.TRANSIENT,
    "botocore.exceptions.NoCredentialsError": Verdict.NO_CREDENTIALS,
    "botocore.exceptions.PartialCredentialsError": Verdict.NO_CREDENTIALS,
    "botocore.exceptions.ParamValidationError": Verdict.INVALID,
    "botocore.exceptions.ConnectionError": Verdict.TRANSIENT,
    "botocore.exceptions.HTTPClientError": Verdict.TRANSIENT,
    "aiohttp.client_exceptions.ClientError": Verdict.TRANSIENT,
    "requests.exceptions.RequestException": Verdict.TRANSIENT,
    "gcsfs.retry.ChecksumError": Verdict.TRANSIENT,
    "builtins.PermissionError": Verdict.DENIED,
    "builtins.FileNotFoundError": Verdict.MISSING,
    "builtins.ConnectionError": Verdict.TRANSIENT,
    "builtins.TimeoutError": Verdict.TRANSIENT,
}


def judge(error: BaseException) -> Verdict | None:
    """What an error means, or None if it is no storage error."""
    status = _http_status(error)
    if status is not None:
        if status in _TRANSIENT_STATUS or status >= 500:
            return Verdict.TRANSIENT
        return _VERDICT_OF_STATUS.get(status, Verdict.INVALID)
    if isinstance(error, OSError) and error.errno in _VERDICT_OF_ERRNO:
        return _VERDICT_OF_ERRNO[error.errno]
    if type(error) is OSError and str(error).startswith("Forbidden"):  # gcsfs's word for 403
        return Verdict.TRANSIENT if "rate limit" in str(error).lower() else Verdict.DENIED
    if type(error) is ValueError and str(error).startswith("Bad Request"):  # gcsfs's word for 400
        return Verdict.INVALID
    for ancestor in type(error).__mro__:
        verdict = _VERDICT_OF_TYPE.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if verdict is not None:
            return verdict
    return None


def _http_status(error: BaseException) -> int | None:
    """The HTTP status an error carries, in the ways of gcsfs, aiohttp and botocore."""
    seen: BaseException | None = error
    while seen is not None:
        response: Any = getattr(seen, "response", None)
        botocore = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for status in (
            getattr(seen, "code", None),
            getattr(seen, "status", None),
            botocore.get("HTTPStatusCode"),
        ):
            if str(status).isdigit() and int(str(status)) >= 400:
                return int(str(status))
        seen = seen.__cause__
    return None


class Retry:
    """Runs the operations of the store at `url`. Thread-safe."""

    def __init__(self, url: str, limit_seconds: float | None = None) -> None:
        self._url = url
        if limit_seconds is None:
            limit_seconds = float(os.environ.get(LIMIT_VARIABLE, DEFAULT_LIMIT_SECONDS))
        self._limit = limit_seconds

    def call(self, action: str, operation: Callable[[], T]) -> T:
        """The result of `operation`, tried again while that can help.

        Raises:
            InfrastructureError: it kept failing for longer than the limit.
            PermanentError: no retry can cure it.
        """
        try:
            return self._retrying(action)(operation)
        except Exception as error:
            self._give_up(action, error)

    def _retrying(self, action: str) -> Retrying:
        def warn(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            log.warning("%s: %s: %s; attempt %d", self._url, action, _words(error), state.attempt_number + 1)

        return Retrying(
            retry=retry_if_exception(lambda error: judge(error) in (Verdict.TRANSIENT, Verdict.UNAUTHORIZED)),
            wait=wait_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS)
            + wait_random(0, FIRST_WAIT_SECONDS),
            stop=self._is_enough,
            before_sleep=warn,
            reraise=True,
        )

    def _is_enough(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if error is not None and judge(error) is Verdict.UNAUTHORIZED:
            return state.attempt_number >= UNAUTHORIZED_ATTEMPTS
        return (state.seconds_since_start or 0.0) + state.upcoming_sleep >= self._limit

    def _give_up(self, action: str, error: Exception) -> NoReturn:
        verdict = judge(error)
        if verdict is None:
            raise error
        if verdict is Verdict.TRANSIENT:
            raise InfrastructureError(
                Reason.STORE_UNREACHABLE,
                f"{self._url}: {action} failed for {self._limit:g} s: {_words(error)}; run the job again "
                f"when the storage answers, it resumes",
            ) from error
        reason = Reason.STORE_EXISTS if verdict is Verdict.NOT_A_FOLDER else Reason.STORE_UNREACHABLE
        raise PermanentError(reason, f"{self._url}: {action}: {_words(error)}; {verdict.value}") from error


def _words(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:500]
