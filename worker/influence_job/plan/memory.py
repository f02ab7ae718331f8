"""How much memory a job may use, and how much each stage will: pure functions of spec and sizes.

The budget comes from the spec, never from the machine found at run time, so that one spec means one
plan everywhere. Figures are bytes above an idle worker, which has torch imported and nothing loaded.
"""

from __future__ import annotations

from pydantic import Field

from influence_calculator.maths.method import Footprint, Method
from influence_calculator.maths.shapes import ModelShapes
from influence_job.errors import PermanentError, Reason
from influence_job.spec import Device, EkfacSpec, FactorDtype, InfluenceJobSpec, SpecModel
from influence_job.units import in_words

MIB = 2**20
CUDA_BUDGET = 12 * 2**30
"""Without `workers.deviceMemory`: fits every GPU sold with 16 GB."""
CPU_BUDGET = 2 * 2**30
"""Without a memory limit; half of the 4 GiB that a worker gets by default in a cluster."""
LARGEST_MICRO_BATCH = {Device.CUDA: 1024, Device.CPU: 256}
"""More gains nothing: a GPU is busy, and a core's cache is exceeded."""
TOP_LISTS_BUDGET = 64 * MIB
"""At least, for a merge of top lists reads as much at once."""


class StageMemory(SpecModel):
    """Bytes that one worker needs in one stage."""

    device: int = Field(description="On the device; on cpu a part of host.")
    host: int = Field(description="In the worker's process, above an idle one.")
    scratch: int = Field(description="In the store beside the result, over the whole job.")


def on_host(spec: InfluenceJobSpec) -> bool:
    """Whether what is on the device is in the worker's own memory."""
    return spec.resolved_device is Device.CPU


def device_budget(spec: InfluenceJobSpec) -> int:
    """Bytes that the plan may use on a worker's device."""
    if spec.resolved_device is Device.CUDA:
        memory = spec.workers.device_memory
        return CUDA_BUDGET if memory is None else memory.bytes
    limit = spec.worker_limits.get("memory")
    return CPU_BUDGET if limit is None else limit.bytes // 2


def host_budget(spec: InfluenceJobSpec) -> int:
    """Bytes of a worker's memory that the device's budget leaves, an idle worker's part among them."""
    limit = spec.worker_limits.get("memory")
    memory = 2 * CPU_BUDGET if limit is None else limit.bytes
    return memory - (device_budget(spec) if on_host(spec) else 0)


def top_lists_budget(spec: InfluenceJobSpec) -> int:
    """Bytes that top lists may take of a worker's memory."""
    return max(TOP_LISTS_BUDGET, host_budget(spec) // 2)


def budget_field(spec: InfluenceJobSpec) -> str:
    """The field that raises the budget."""
    if spec.resolved_device is Device.CUDA:
        return "workers.deviceMemory"
    return "workers.resources.limits.memory (half of it is the budget)"


def factor_copies(spec: InfluenceJobSpec) -> int:
    """Copies of a group's factors while it is loaded: what was read, and what the device holds."""
    return 2 if on_host(spec) else 1


def factor_row_bytes(spec: InfluenceJobSpec, footprint: Footprint, shapes: ModelShapes, itemsize: int) -> int:
    """One test example's factors on the device: `itemsize` bytes a number, unless `factorDtype` says less."""
    wanted = 2 if spec.factor_dtype is FactorDtype.BFLOAT16 else itemsize
    # Methods keep half precision as float32.
    return -(-footprint.factor_row * wanted // max(4, shapes.itemsize))


def choose_micro_batch(spec: InfluenceJobSpec, method: Method, shapes: ModelShapes, *, fits: bool) -> int:
    """Examples per forward pass: the largest power of two whose capture takes a quarter of the budget.

    `fits`: whether the job runs the fit, whose passes must stay within the budget too.

    Raises:
        PermanentError: not even one example fits.
    """
    budget = device_budget(spec) - shapes.model_bytes
    size = LARGEST_MICRO_BATCH[spec.resolved_device]
    while True:
        footprint = method.footprint(shapes, size, 1)
        fit = footprint.fit if fits else 0
        if footprint.capture <= budget // 4 and fit <= budget:
            return size
        if size == 1 and footprint.capture <= budget and fit <= budget:
            return size
        if size == 1:
            need = shapes.model_bytes + max(footprint.capture, fit)
            what = "fitting" if fit > footprint.capture else "differentiating one example"
            raise impossible(
                spec,
                f"{what} with method {spec.method.name} needs {in_words(need)} for {shapes.width} parameters",
            )
        size //= 2


def impossible(spec: InfluenceJobSpec, need: str, cure: str = "") -> PermanentError:
    """The error for work that does not fit, with the numbers and the cure."""
    budget = in_words(device_budget(spec))
    return PermanentError(
        Reason.PLAN_IMPOSSIBLE,
        f"spec.workers: {need}, but the budget on {spec.resolved_device} is {budget}; raise "
        f"{budget_field(spec)}{cure or _smaller(spec)}",
    )


def _smaller(spec: InfluenceJobSpec) -> str:
    other = "Logra, whose gradients are short" if isinstance(spec.method, EkfacSpec) else "Ekfac"
    return f", track fewer parameters (InfluenceTask.parameters) or use {other}"
