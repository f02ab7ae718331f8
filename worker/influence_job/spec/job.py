"""The InfluenceJob document: what is computed, with what, and where the result goes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from influence_job.spec.fields import (
    Flag,
    Integer,
    ObjectName,
    OpenObject,
    OpenValue,
    Quantity,
    ShortString,
    SpecModel,
    WithoutNull,
    refuse,
)
from influence_job.spec.methods import MethodSpec
from influence_job.spec.operations import OPERATION_RULES, Mode, Operation, check_operation
from influence_job.spec.pods import PodSettings, WorkersSpec
from influence_job.spec.rules import rule, rules

API_VERSION: Literal["influence-operator.dev/v1alpha1"] = "influence-operator.dev/v1alpha1"
KIND: Literal["InfluenceJob"] = "InfluenceJob"
BUCKETS = ("gs", "s3")
URL_SCHEMES = ("file", *BUCKETS, "memory")


class Device(StrEnum):
    """Where workers compute."""

    CUDA = "cuda"
    CPU = "cpu"


class Precision(StrEnum):
    """Of forward and backward passes."""

    FLOAT32 = "Float32"
    """The model's own dtype, float64 too, without shortcuts in products."""
    TF32 = "TF32"
    """Products on tensor cores; the same as Float32 on a device without them."""
    BFLOAT16 = "BFloat16"
    """Captured in bfloat16, accumulated in float32."""


class FactorDtype(StrEnum):
    """Of influence factors while they wait to be scored."""

    FLOAT32 = "Float32"
    BFLOAT16 = "BFloat16"


class OnExisting(StrEnum):
    """What a new job does with a store that is there."""

    RESUME = "Resume"
    """Go on where it stopped, if it was made from the same inputs."""
    OVERWRITE = "Overwrite"
    """Delete it once the task has loaded."""
    FAIL = "Fail"


class Verify(StrEnum):
    """Which stored regions are read back at the end."""

    ALL = "All"
    SAMPLE = "Sample"
    NONE = "None"


class CleanupPolicy(StrEnum):
    """What is deleted when a job has ended."""

    WORKERS = "Workers"
    """Cluster, Secret and policies; the driver's Job stays for its logs."""
    ALL = "All"
    NONE = "None"


class ObjectReference(SpecModel):
    """An object in the job's namespace."""

    name: ObjectName = Field(description="Its name.")


class SourceSpec(SpecModel):
    """Code that is not in the image."""

    config_map: ObjectReference = Field(
        description="ConfigMap whose keys are Python files; they are copied when an attempt starts."
    )


class TaskSpec(SpecModel):
    """The user's code: a function that returns a trained model and its data."""

    entrypoint: Annotated[
        str,
        Field(
            max_length=512,
            pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
        ),
    ] = Field(description='"module:function"; the function returns an InfluenceTask.')
    arguments: Annotated[
        dict[Annotated[str, Field(max_length=128)], OpenValue], Field(max_length=64), WithoutNull
    ] = Field(default_factory=dict, description="Keyword arguments of the function; no nulls. Default none.")
    source: SourceSpec | None = Field(None, description="Where the module comes from. Default: the image.")


ChunkLength = Annotated[Integer, Field(ge=1, le=2**31 - 1)]


class ChunksSpec(SpecModel):
    """The grid of the result, in examples."""

    test: ChunkLength | None = Field(None, description="Test examples per chunk, at least 1.")
    train: ChunkLength | None = Field(None, description="Training examples per chunk, at least 1.")


def _check_scheme(url: str) -> str:
    scheme, colon, rest = url.partition(":")
    if "://" not in url and not (colon and scheme in URL_SCHEMES):
        return url
    if scheme not in ("file", *BUCKETS) or not rest.startswith("//"):
        expected = "expected a path or a url that starts with gs://, s3:// or file://"
        why = ", which each process has for itself" if scheme == "memory" else ""
        raise refuse("", f"{expected}, got {url!r}{why}")
    if scheme in BUCKETS and rest[2:3] in ("", "/"):
        raise refuse("", f"expected a bucket after {scheme}://, got {url!r}")
    return url


StoreUrl = Annotated[
    str,
    Field(
        min_length=1,
        max_length=2048,
        pattern=r"^[^\x00-\x1f\x7f]+$",
        json_schema_extra=rules(
            rule(
                f"self.matches('^(file://|({'|'.join(BUCKETS)})://[^/])') || "
                f"!(self.contains('://') || self.matches('^({'|'.join(URL_SCHEMES)}):'))",
                "expected a path or a url that starts with gs://, s3:// (and a bucket) or file://",
            )
        ),
    ),
    AfterValidator(_check_scheme),
]


class OutputSpec(SpecModel):
    """Where the result goes: one Zarr group."""

    url: StoreUrl = Field(description="A path, gs://bucket/name.zarr or s3://bucket/name.zarr.")
    on_existing: OnExisting = Field(
        OnExisting.RESUME, description="Resume | Overwrite | Fail: what to do with a store that is there."
    )
    dense: Flag = Field(
        True, description="Store every score. Default true; false keeps only the top k and the statistics."
    )
    top_k: Annotated[Integer, Field(ge=1, le=10_000)] = Field(
        100, description="Most helpful and most harmful training examples kept per test example. Default 100."
    )
    verify: Verify = Field(
        Verify.SAMPLE, description="All | Sample | None: stored regions read back at the end. Default Sample."
    )
    max_bytes: Quantity = Field(
        Quantity("1Ti"), description="The plan refuses a larger result. Bytes; default 1Ti."
    )
    allow_mixed_hardware: Flag = Field(
        False, description="Compute on several CPU or GPU models: results then agree, but not bit for bit."
    )
    storage_options: Annotated[OpenObject, WithoutNull] = Field(
        default_factory=dict, description="Keyword arguments of the fsspec filesystem. No secrets here."
    )
    credentials_secret_ref: ObjectReference | None = Field(
        None, description="Secret with the storage's credentials. Default none: workload identity."
    )


class FactorsSpec(SpecModel):
    """Factors of an earlier job."""

    url: StoreUrl = Field(description="Store of an InfluenceFactors job.")


class GradientsSpec(SpecModel):
    """Training gradients of an earlier job."""

    url: StoreUrl = Field(description="Store of a TrainingGradients job.")


Seconds = Annotated[Integer, Field(ge=1, le=2**31 - 1)]


_NEXT_ATTEMPT = "Changes take effect with the next attempt; changing a Failed job starts one."


class InfluenceJobSpec(SpecModel):
    """The spec. What determines the numbers is immutable once the job exists."""

    model_config = ConfigDict(json_schema_extra=rules(*OPERATION_RULES))

    task: TaskSpec = Field(description="The user's model and data.")
    operation: Operation = Field(
        Operation.INFLUENCES,
        description=f"{' | '.join(Operation)}. Default Influences.",
    )
    mode: Mode = Field(Mode.UP, description="Up | Perturbation. Default Up.")
    method: MethodSpec = Field(description="How (H + λI)^-1 is applied: name and parameters.")
    device: Device | None = Field(
        None, description="cuda | cpu. Default: cuda when workers ask for a GPU resource, else cpu."
    )
    precision: Precision = Field(Precision.FLOAT32, description="Float32 | TF32 | BFloat16. Default Float32.")
    factor_dtype: FactorDtype | None = Field(
        None, description="Float32 | BFloat16. Default: the parameters' dtype, float32 for half precision."
    )
    chunks: ChunksSpec | None = Field(None, description="The result's grid. Default: chosen by the plan.")
    output: OutputSpec = Field(description="Where the result goes.")
    factors: FactorsSpec | None = Field(None, description="For InfluencesFromFactors, and only for it.")
    gradients: GradientsSpec | None = Field(None, description="For InfluencesFromGradients, and only for it.")
    image: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[!-~]+$")] | None = Field(
        None,
        description="Container image of driver, scheduler and workers. Default: the chart's. "
        f"{_NEXT_ATTEMPT}",
    )
    workers: WorkersSpec = Field(
        default_factory=WorkersSpec,
        description="The Dask workers. replicas may change at any time. "
        f"{_NEXT_ATTEMPT.replace('Changes', 'Other changes')}",
    )
    driver: PodSettings = Field(default_factory=PodSettings, description=f"The driver's pod. {_NEXT_ATTEMPT}")
    scheduler: PodSettings = Field(
        default_factory=PodSettings, description=f"The Dask scheduler's pod. {_NEXT_ATTEMPT}"
    )
    pod_defaults: PodSettings = Field(
        default_factory=PodSettings,
        description=f"Defaults of all three; driver and scheduler never inherit GPU limits. {_NEXT_ATTEMPT}",
    )
    suspend: Flag = Field(False, description="Stop and keep what is done. Default false.")
    backoff_limit: Annotated[Integer, Field(ge=0, le=1000)] = Field(
        3, description="Counted failures before the job is Failed. Default 3."
    )
    active_deadline_seconds: Seconds | None = Field(
        None, description="Running time summed over attempts and resumes, in seconds. Default none."
    )
    startup_deadline_seconds: Seconds = Field(
        3600, description="Seconds until driver and workers must have come; suspended time excluded."
    )
    progress_deadline_seconds: Seconds = Field(
        3600, description="Seconds without a finished region while a worker is ready: a counted failure."
    )
    cleanup_policy: CleanupPolicy = Field(
        CleanupPolicy.WORKERS,
        description="Workers | All | None: what is deleted at the end. Default Workers.",
    )
    ttl_seconds_after_finished: Annotated[Integer, Field(ge=0, le=2**31 - 1)] | None = Field(
        None,
        description="Seconds after which the finished InfluenceJob is deleted. Default never. GitOps tools "
        "create it again.",
    )
    managed_by: ShortString | None = Field(
        None, description="Name of another controller that runs this job; ours then does nothing."
    )

    @model_validator(mode="after")
    def _operation_fits(self) -> InfluenceJobSpec:
        check_operation(self)
        return self

    @property
    def earlier_store(self) -> str | None:
        """URL of the store that fit and factors or gradients are taken from; None: the job makes them."""
        given = self.factors or self.gradients
        return None if given is None else given.url

    @property
    def earlier_field(self) -> str:
        """The field that names it."""
        return f"spec.{'gradients' if self.factors is None else 'factors'}.url"

    @property
    def earlier_maker(self) -> str:
        """The job whose store it is."""
        return "a TrainingGradients job" if self.factors is None else "an InfluenceFactors job"

    @property
    def worker_limits(self) -> dict[str, Quantity]:
        """Resource limits of a worker: its own before those of `podDefaults`."""
        return {**self.pod_defaults.resources.limits, **self.workers.resources.limits}

    @property
    def resolved_device(self) -> Device:
        """`device`, else cuda when workers ask for a GPU resource, else cpu."""
        if self.device is not None:
            return self.device
        gpus = [q for name, q in self.worker_limits.items() if name.endswith("/gpu")]
        return Device.CUDA if any(quantity.value > 0 for quantity in gpus) else Device.CPU


class Metadata(SpecModel):
    """The part of Kubernetes' metadata that a job reads; the rest is left alone."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")] = Field(
        description="At most 40 lower-case letters, digits and dashes, no dots: children's names extend it."
    )
    namespace: ShortString | None = Field(None, description="Namespace; ignored on this machine.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations.")


class InfluenceJob(SpecModel):
    """A whole manifest."""

    api_version: Literal["influence-operator.dev/v1alpha1"] = Field(
        description="influence-operator.dev/v1alpha1"
    )
    kind: Literal["InfluenceJob"] = Field(description="InfluenceJob")
    metadata: Metadata = Field(description="Name and namespace.")
    spec: InfluenceJobSpec = Field(description="What to compute.")
