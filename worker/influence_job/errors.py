"""The errors of a job. Every one says which field, what was expected, what came and what to do.

JobError
├── PermanentError        exit 64: no retry can cure it
└── InfrastructureError   exit 75: run it again

Both carry a `reason`, a constant of `Reason` that conditions and the progress document repeat.
"""

from __future__ import annotations

from enum import StrEnum

from influence_job.exit_codes import ExitCode


class Reason(StrEnum):
    """Why a job stopped: one CamelCase word per situation."""

    INVALID_SPEC = "InvalidSpec"
    """The job file does not follow the schema, or names what the model does not have."""
    IMAGE_INCOMPATIBLE = "ImageIncompatible"
    """The operator's job document is of another contract version than this image reads."""
    INVALID_TASK = "InvalidTask"
    """The entry point cannot be imported, raises, or returns something that is no InfluenceTask, or one whose
    functions fail."""
    INVALID_DATA = "InvalidData"
    """An example cannot be read, has the wrong shape, or differs when read again."""
    UNSUPPORTED_MODEL = "UnsupportedModel"
    """The method cannot treat the model: dropout in training mode, a layer it has no formula for."""
    NOT_FINITE = "NotFinite"
    """NaN or infinity in a gradient or in the result."""
    PLAN_IMPOSSIBLE = "PlanImpossible"
    """The work does not fit the memory or `output.maxBytes` that the spec grants."""
    GPU_NOT_VISIBLE = "GpuNotVisible"
    """`device: cuda` where torch sees no GPU."""
    STORE_CLAIMED = "StoreClaimed"
    """Another job writes to the same store."""
    STORE_MISMATCH = "StoreMismatch"
    """The store was made with other inputs, on other hardware or from other data; the difference is shown."""
    STORE_EXISTS = "StoreExists"
    """`onExisting: Fail`, or something at the URL that is not a store of ours."""
    STORE_UNREACHABLE = "StoreUnreachable"
    """No permission, no such bucket, or outage longer than the retries."""
    STORE_CORRUPT = "StoreCorrupt"
    """A checksum does not match."""
    REGION_FAILED = "RegionFailed"
    """One region failed three times, or its workers died 20 times."""
    WORKERS_LOST = "WorkersLost"
    """No worker or no scheduler for longer than the driver waits."""
    TERMINATED = "Terminated"
    """SIGTERM: stopped on purpose."""
    SUPERSEDED = "Superseded"
    """A later attempt of the same job writes to the store."""
    INTERNAL = "Internal"
    """A defect of ours."""


class JobError(Exception):
    """Ends a job with an exit code and a reason."""

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[JobError], tuple[Reason, str]]:
        # Travels from a Dask worker to the driver.
        return type(self), (self.reason, self.message)


class PermanentError(JobError):
    """No retry can cure it."""

    exit_code = ExitCode.PERMANENT


class InfrastructureError(JobError):
    """A retry resumes."""

    exit_code = ExitCode.RETRY


OF_THE_TASK = (Exception, SystemExit)
"""What the task's code may raise that is told as its error: it may call `sys.exit`. Ctrl-C is none of it."""


def ended_with(error: BaseException) -> JobError:
    """Any exception as the JobError that the exit code and the progress document tell."""
    if isinstance(error, JobError):
        return error
    return JobError(Reason.INTERNAL, f"{type(error).__name__}: {error}")
