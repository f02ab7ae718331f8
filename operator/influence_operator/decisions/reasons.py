"""Why a job is as it is: the reasons of its conditions and Events that the operator itself gives.

A driver's own reasons (`influence_job.errors.Reason`, such as GpuNotVisible) are repeated as they come.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """One constant per situation."""

    # -- Ready, Reconciling, Suspended -----------------------------------------------------------
    STARTING = "Starting"
    """A generation is being carried out; the driver has not passed its preflight."""
    RUNNING = "Running"
    SUSPENDING = "Suspending"
    """`suspend` is set, and pods of the job are left."""
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    """`suspend` was set and is not any more."""
    COMPLETE = "Complete"

    # -- Stalled ---------------------------------------------------------------------------------
    INVALID_SPEC = "InvalidSpec"
    """The API server let a spec through that the schema's rules refuse."""
    NAME_CONFLICT = "NameConflict"
    """An object that is not ours has the name of a child."""
    IMAGE_INCOMPATIBLE = "ImageIncompatible"
    """The driver speaks another contract version than this operator."""

    # -- Failed ----------------------------------------------------------------------------------
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """`activeDeadlineSeconds`."""
    STARTUP_DEADLINE_EXCEEDED = "StartupDeadlineExceeded"
    PERMANENT_ERROR = "PermanentError"
    """Exit code 64 from a driver that left no reason."""

    # -- how an attempt ended ----------------------------------------------------------------------
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
    DRIVER_FAILED = "DriverFailed"
    """An exit code that says nothing, from a driver that left no reason."""
    DRIVER_LOST = "DriverLost"
    """The driver's exit code cannot be read any more: its pod or its Job is gone, or its node. Or there never
    was one, because the kubelet did not take the pod."""
    OUT_OF_MEMORY = "OOMKilled"
    """The kernel killed the driver at its memory limit."""
    SPEC_CHANGED = "SpecChanged"
    """Ended in order to start with the changed spec."""

    # -- ClusterReady: what is awaited -------------------------------------------------------------
    CLUSTER_READY = "ClusterReady"
    """Driver, scheduler and every worker run."""
    SOME_WORKERS_READY = "SomeWorkersReady"
    SCALE_DOWN_BLOCKED = "ScaleDownBlocked"
    """More workers run than are wanted, and the scheduler does not say whom to retire."""
    NOT_STARTED = "NotStarted"
    FINISHED = "Finished"
    RETRYING = "Retrying"
    """An attempt ended; the next one waits for its delay, or for pods of the last one."""
    DRIVER_STARTING = "DriverStarting"
    PREFLIGHT = "Preflight"
    """The driver runs and has not asked for workers."""
    SCHEDULER_STARTING = "SchedulerStarting"
    WORKERS_STARTING = "WorkersStarting"

    # -- ClusterReady: what is wrong ---------------------------------------------------------------
    DRIVER_UNREACHABLE = "DriverUnreachable"
    """The driver is ready, and the operator cannot read its `/progress`."""
    IMAGE_PULL_FAILED = "ImagePullFailed"
    UNSCHEDULABLE = "Unschedulable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    POD_SECURITY_REFUSED = "PodSecurityRefused"
    REFUSED = "Refused"
    """The API server refused a child or a pod: a webhook, a limit range, a validation."""
    MISSING_REFERENCE = "MissingReference"
    """Something that the spec names does not exist: a Secret, ConfigMap, ServiceAccount, volume claim."""
    VOLUME_FAILED = "VolumeFailed"
    CONTAINER_FAILED = "ContainerFailed"
    """A container of scheduler or worker cannot be started, or ends again and again."""
    DASK_OPERATOR_MISSING = "DaskOperatorMissing"
    """The API server knows no DaskCluster, or nobody takes up ours."""

    # -- Events alone ------------------------------------------------------------------------------
    ATTEMPT_STARTED = "AttemptStarted"
    ATTEMPT_ENDED = "AttemptEnded"
    SCALED = "Scaled"
