"""Which errors are tried again, which end a job, and with what words."""

from __future__ import annotations

import errno
import os

import aiohttp
import botocore.exceptions
import google.auth.exceptions
import pytest
import requests.exceptions
from gcsfs.retry import ChecksumError, HttpError

from influence_job.errors import InfrastructureError, PermanentError, Reason
from influence_job.storage import retry
from influence_job.storage.retry import Retry


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def botocore_error(status: int) -> botocore.exceptions.ClientError:
    answer = {"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "PutObject")


TRANSIENT = [
    *[HttpError({"code": code, "message": "m"}) for code in (408, 429, 500, 502, 503, 504, "503")],
    *[os_error(number) for number in (errno.EIO, errno.ESTALE, errno.ECONNRESET, errno.ETIMEDOUT)],
    OSError("Forbidden: b/x\nrateLimitExceeded: rate limit"),
    ChecksumError(),
    TimeoutError(),
    ConnectionResetError(),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError(),
    aiohttp.ServerTimeoutError(),
    requests.exceptions.ProxyError(),
    google.auth.exceptions.TransportError(),
    google.auth.exceptions.RefreshError(),
    botocore.exceptions.EndpointConnectionError(endpoint_url="u"),
    botocore_error(409),
    botocore_error(503),
    caused(OSError(errno.EINVAL, "translated"), botocore_error(500)),
]
PERMANENT = [
    (HttpError({"code": 403, "message": "m"}), "grant this identity"),
    (OSError("Forbidden: b/x\nno storage.objects.create access"), "grant this identity"),
    (os_error(errno.EACCES), "grant this identity"),
    (caused(PermissionError("denied"), botocore_error(403)), "grant this identity"),
    (FileNotFoundError("b/x"), "create the bucket"),
    (os_error(errno.ENOSPC), "free space"),
    (os_error(errno.EDQUOT), "free space"),
    (os_error(errno.EROFS), "mount the file system for writing"),
    (ValueError("Bad Request: b/x\ninvalid bucket name"), "correct output.url"),
    (HttpError({"code": 400, "message": "m"}), "correct output.url"),
    (google.auth.exceptions.DefaultCredentialsError(), "log in"),
    (botocore.exceptions.NoCredentialsError(), "log in"),
    (botocore.exceptions.ParamValidationError(report="Invalid bucket name"), "correct output.url"),
]


class Failing:
    """Raises the error the first `times` times it is called."""

    def __init__(self, error: Exception, times: int = 10**9) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "done"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(retry, "LONGEST_WAIT_SECONDS", 0.02)


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    failing = Failing(error, times=3)
    assert Retry("gs://b/x", 5).call("writing o", failing) == "done"
    assert failing.calls == 4


def test_what_does_not_pass_within_the_limit_asks_for_another_run() -> None:
    failing = Failing(HttpError({"code": 503, "message": "busy"}))
    with pytest.raises(InfrastructureError, match=r"gs://b/x: writing o failed for 0.1 s: .*503") as raised:
        Retry("gs://b/x", 0.1).call("writing o", failing)
    assert raised.value.reason is Reason.STORE_UNREACHABLE
    assert failing.calls > 1


@pytest.mark.parametrize(("error", "cure"), PERMANENT, ids=lambda value: repr(value))
def test_what_no_retry_cures_ends_the_job_at_once_with_url_and_cure(error: Exception, cure: str) -> None:
    failing = Failing(error)
    with pytest.raises(PermanentError, match=f"gs://b/x: writing o: .*{cure}") as raised:
        Retry("gs://b/x", 5).call("writing o", failing)
    assert raised.value.reason is Reason.STORE_UNREACHABLE
    assert failing.calls == 1


def test_unauthorized_is_believed_the_third_time_for_a_token_may_have_expired() -> None:
    expired = HttpError({"code": 401, "message": "Invalid Credentials"})
    assert Retry("u", 5).call("reading", Failing(expired, times=2)) == "done"
    refused = Failing(expired)
    with pytest.raises(PermanentError, match="log in"):
        Retry("u", 5).call("reading", refused)
    assert refused.calls == 3


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), KeyError("k"), PermanentError(Reason.INTERNAL, "m")]
)
def test_what_is_no_storage_error_passes_through(error: Exception) -> None:
    failing = Failing(error)
    with pytest.raises(type(error)) as raised:
        Retry("u", 5).call("reading", failing)
    assert raised.value is error
    assert failing.calls == 1


def test_the_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFLUENCE_STORAGE_RETRY_SECONDS", "0.05")
    with pytest.raises(InfrastructureError, match=r"failed for 0.05 s"):
        Retry("u").call("reading", Failing(TimeoutError()))


def test_nobody_waits_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(retry, "LONGEST_WAIT_SECONDS", 0.3)
    failing = Failing(TimeoutError())
    with pytest.raises(InfrastructureError):
        Retry("u", 0.1).call("reading", failing)
    assert failing.calls == 1, "the second try would have come after the limit"
