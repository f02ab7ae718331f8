"""The status of an InfluenceJob: what the operator writes and everybody else reads.

The CRD's status schema is made from it. `phase` is for people and never read back; `attempts` and the times
are what the operator remembers from one pass to the next. The conditions follow kstatus, and `Complete` and
`Failed` alone tell whether there is a result. Pydantic and the standard library only.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from influence_job.progress import Stage


class Phase(StrEnum):
    """One word for a table's column, derived from the conditions."""

    PENDING = "Pending"
    """Seen, nothing started."""
    STARTING = "Starting"
    """The driver's pod or the first worker is on its way."""
    RUNNING = "Running"
    RETRYING = "Retrying"
    """An attempt ended and the next one waits for its delay."""
    SUSPENDING = "Suspending"
    """Pods of a suspended job are still ending."""
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class ConditionType(StrEnum):
    """What a condition states; true means it holds."""

    RECONCILING = "Reconciling"
    """A generation is being carried out, until preflight passed or the job is suspended; else absent."""
    STALLED = "Stalled"
    """Nothing will move before somebody changes something; else absent."""
    READY = "Ready"
    """The spec is carried out: the job runs, is suspended as asked, or is complete."""
    SUSPENDED = "Suspended"
    """`suspend` is set and no pod of the job is left."""
    CLUSTER_READY = "ClusterReady"
    """Driver, scheduler and at least one worker run. False names in its reason what is missing."""
    COMPLETE = "Complete"
    """The result is stored and verified."""
    FAILED = "Failed"
    """The job ended without a result."""


class Condition(BaseModel):
    """Kubernetes' condition."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    type: Annotated[str, Field(max_length=64)] = Field(description="What is stated.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    observed_generation: int | None = Field(None, ge=0, description="The generation it was found for.")
    last_transition_time: datetime = Field(description="When `status` last changed.")
    reason: Annotated[str, Field(max_length=64)] = Field(description="One CamelCase word per situation.")
    message: Annotated[str, Field(max_length=4096)] = Field(description="One sentence.")


class _StatusModel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class StageStatus(_StatusModel):
    """When a stage of the present attempt ran."""

    name: Stage = Field(description="Stage.")
    start: datetime = Field(description="When it began.")
    end: datetime | None = Field(None, description="When it ended.")


class ProgressStatus(_StatusModel):
    """Regions of the present stage, at most as old as thirty seconds."""

    done: int = Field(0, ge=0, description="Ledger rows that are recorded.")
    total: int = Field(0, ge=0, description="Ledger rows of the stage.")
    failed: int = Field(0, ge=0, description="Computations that raised.")
    percent: int = Field(0, ge=0, le=100, description="done / total, whole percent.")
    display: Annotated[str, Field(max_length=32)] = Field("", description='"37/112", for the table.')
    rate: float | None = Field(None, description="Regions per second over the last minute.")
    eta_seconds: int | None = Field(None, ge=0, description="Seconds to the end of the stage.")
    eta: Annotated[str, Field(max_length=16)] | None = Field(None, description='"39s", for the table.')
    updated: datetime | None = Field(None, description="When the driver said so.")


class AttemptsStatus(_StatusModel):
    """How often the job was started."""

    current: int = Field(0, ge=0, description="Number of the last attempt; names its children. 0: none yet.")
    counted_failures: int = Field(0, ge=0, description="Failures that count against backoffLimit.")
    started: datetime | None = Field(None, description="When the present attempt's driver was created.")
    driver: Annotated[str, Field(max_length=63)] | None = Field(
        None, description="Name of the present attempt's driver Job, once it was seen."
    )
    recorded: int = Field(
        0, ge=0, description="Ledger rows that the present attempt is known to have written; may lag behind."
    )
    ended: datetime | None = Field(
        None, description="When the present attempt ended; absent while it goes on."
    )
    next_start: datetime | None = Field(None, description="When the next attempt may start.")
    counted: bool | None = Field(None, description="Whether the last ended attempt counted.")
    last_exit_code: int | None = Field(None, description="Of the last ended attempt's driver.")
    last_reason: Annotated[str, Field(max_length=64)] | None = Field(None, description="Why it ended.")
    last_message: Annotated[str, Field(max_length=2048)] | None = Field(None, description="In its words.")


class WorkersStatus(_StatusModel):
    """The Dask workers."""

    desired: int = Field(0, ge=0, description="Workers asked for.")
    ready: int = Field(0, ge=0, description="Workers whose pods are ready.")
    display: Annotated[str, Field(max_length=16)] = Field("", description='"4/4", for the table.')
    selector: Annotated[str, Field(max_length=512)] = Field(
        "", description="Label selector of the worker pods, for the scale subresource."
    )


class ResultStatus(_StatusModel):
    """What was stored."""

    url: Annotated[str, Field(max_length=2048)] = Field(description="The Zarr group.")
    shape: Annotated[list[int], Field(max_length=16)] | None = Field(None, description="Of the main array.")
    dtype: Annotated[str, Field(max_length=32)] | None = Field(None, description="Of the main array.")
    bytes: int | None = Field(None, ge=0, description="Size of the main array.")
    digest: Annotated[str, Field(max_length=128)] | None = Field(None, description="Of all its regions.")


class InfluenceJobStatus(_StatusModel):
    """The status subresource."""

    observed_generation: int = Field(-1, ge=-1, description="Generation that the rest was found for.")
    phase: Phase | None = Field(None, description="One word for display; never decide by it.")
    stage: Stage | None = Field(None, description="What the driver does.")
    stages: Annotated[list[StageStatus], Field(max_length=16)] = Field(
        default_factory=list, description="Stages of the present attempt, with times."
    )
    progress: ProgressStatus | None = Field(None, description="Regions of the present stage.")
    workers: WorkersStatus | None = Field(None, description="The Dask workers.")
    attempts: AttemptsStatus | None = Field(None, description="Starts and failures.")
    result: ResultStatus | None = Field(None, description="What was stored, once Complete.")
    warnings: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=20)] = Field(
        default_factory=list, description="What the driver warned of."
    )
    start_time: datetime | None = Field(None, description="When the first attempt began.")
    completion_time: datetime | None = Field(None, description="When the job became Complete or Failed.")
    active_seconds: int = Field(0, ge=0, description="Running time of all ended attempts, in seconds.")
    waiting_since: datetime | None = Field(
        None, description="Since when driver or workers are awaited; absent while suspended or running."
    )
    progressed: datetime | None = Field(
        None, description="Last stage change, region or fit step seen, or the first ready worker."
    )
    cluster_incomplete_since: datetime | None = Field(
        None, description="Since when dask-kubernetes has left a part of the cluster unmade; else absent."
    )
    conditions: Annotated[list[Condition], Field(max_length=16)] = Field(
        default_factory=list,
        description="Ready, Reconciling, Stalled (kstatus); Complete, Failed, Suspended, ClusterReady.",
    )
