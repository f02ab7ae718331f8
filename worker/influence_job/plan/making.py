"""From spec and sizes to a plan: chunks, groups, ranges and micro-batches. Pure.

Explicit chunks win; the rest follows from the device budget and from how large a stored object should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from influence_calculator.maths.by_token import product_bytes
from influence_calculator.maths.footprints import joined_bytes
from influence_calculator.maths.method import Method
from influence_calculator.maths.probe import probe_footprint
from influence_job.errors import PermanentError, Reason
from influence_job.plan import memory, top_lists
from influence_job.plan.basis import Basis, stored_basis
from influence_job.plan.document import Plan, Sizes
from influence_job.plan.memory import MIB, StageMemory
from influence_job.spec import InfluenceJobSpec, Mode, Operation
from influence_job.units import in_words

REGION_BYTES = 32 * MIB
"""Aimed at when chunks are absent: few enough objects, and little lost with a worker."""
LEAST_REGIONS = 32
"""Or as many as there are training examples: progress that can be seen, work for every worker."""
COLUMN_BYTES = {Mode.UP: 1 * MIB, Mode.PERTURBATION: 8 * MIB}
"""Of one training example in a region: bounds the rows of a group, so that a chunk holds several columns."""
READ_BYTES = 64 * MIB
"""Of the training examples of one chunk; two chunks are in memory at once."""
LARGEST_TEST_CHUNK = 256
IDLE_WORKER_BYTES = 256 * MIB
"""Where the memory limit is less, no cluster runs the job: it makes small plans, to be run without one."""
FACTOR_TASKS = 16
"""Chunks that the test examples are divided into when there are enough of them."""
RANGE_EXAMPLES, MOST_RANGES = 128, 32
"""A fit range holds at least so many training examples, and there are at most so many ranges: each leaves
its partial sums in the store."""


def make_plan(spec: InfluenceJobSpec, method: Method, sizes: Sizes) -> Plan:
    """The plan of a job.

    Raises:
        PermanentError: PlanImpossible, for a result above `output.maxBytes` or work that does not fit.
    """
    fits = spec.operation.fits
    micro_batch = memory.choose_micro_batch(spec, method, sizes.shapes, fits=fits)
    region_bytes = _region_bytes(spec, method, sizes, micro_batch)
    most_rows = _most_rows(spec, method, sizes, micro_batch, region_bytes)
    test_chunk = _test_chunk(spec, method, sizes, micro_batch, most_rows)
    test_chunks = -(-sizes.test // test_chunk)
    groups = -(-test_chunks // max(1, min(most_rows, _column_rows(spec, sizes)) // test_chunk))
    group_chunks = -(-test_chunks // groups)
    group_rows = min(group_chunks * test_chunk, sizes.test)
    train_chunk = test_chunk
    if not spec.operation.is_of_training:
        train_chunk = _train_chunk(spec, sizes, group_rows, micro_batch, region_bytes)
    passes = len(method.passes()) if fits else 0
    plan = Plan(
        operation=spec.operation,
        mode=spec.mode,
        test=sizes.test,
        train=sizes.train,
        test_chunk=test_chunk,
        train_chunk=train_chunk,
        group_chunks=group_chunks,
        fit_ranges=min(MOST_RANGES, -(-sizes.train // RANGE_EXAMPLES), -(-sizes.train // train_chunk)),
        micro_batch=micro_batch,
        dtype=sizes.dtype,
        feature_shape=sizes.feature_shape,
        blocks=sizes.blocks,
        dense=spec.output.dense,
        top_k=spec.output.top_k,
        fit_passes=passes,
        solves_with_data=method.needs_data and fits,
        solves_by_passes=method.solves_by_passes and fits,
        memory={},
    )
    _refuse_large_result(spec, plan)
    if plan.has_scores:
        top_lists.refuse_long(spec, sizes, plan)
    plan = plan.model_copy(update={"memory": _stages(spec, method, sizes, plan)})
    _refuse_large_stage(spec, plan)
    return plan


def _resident(method: Method, sizes: Sizes) -> int:
    """Model and fit, which stay on the device while test and training examples come and go."""
    return sizes.shapes.model_bytes + method.footprint(sizes.shapes, 1, 1).resident


def _factor_row(spec: InfluenceJobSpec, method: Method, sizes: Sizes) -> int:
    footprint = method.footprint(sizes.shapes, 1, 1)
    return max(1, memory.factor_row_bytes(spec, footprint, sizes.shapes, sizes.itemsize))


def _column_rows(spec: InfluenceJobSpec, sizes: Sizes) -> int:
    """Rows of a group at most, whatever the device holds."""
    rows = max(1, COLUMN_BYTES[spec.mode] // _pair_bytes(spec, sizes))
    return min(rows, top_lists.most_rows(spec, sizes)) if spec.operation.has_scores else rows


def _pair_bytes(spec: InfluenceJobSpec, sizes: Sizes) -> int:
    """Of what is stored for one test and one training example."""
    by_block = spec.operation is Operation.INFLUENCES_BY_BLOCK
    parts = len(sizes.blocks) if by_block else 1
    return parts * math.prod(sizes.feature_shape) * sizes.itemsize


def _used(spec: InfluenceJobSpec, method: Method, sizes: Sizes, micro_batch: int) -> int:
    """What scoring holds besides factors and region."""
    return _resident(method, sizes) + _capture(spec, method, sizes, micro_batch)


def _capture(spec: InfluenceJobSpec, method: Method, sizes: Sizes, micro_batch: int) -> int:
    """Differentiating one micro-batch of training examples in the score stage.

    In place of it a chunk of stored gradients, which on cpu is where it was read to.
    """
    if not spec.operation.reads_training:
        return 0 if memory.on_host(spec) else max(READ_BYTES, _training_bytes(spec, sizes))
    by_token = spec.operation is Operation.INFLUENCES_BY_TOKEN
    products = product_bytes(sizes.shapes, micro_batch) if by_token else 0
    return method.footprint(sizes.shapes, micro_batch, 1).capture + products


def _training_bytes(spec: InfluenceJobSpec, sizes: Sizes) -> int:
    """What scoring reads of one training example."""
    if spec.operation.reads_training:
        return sizes.shapes.example_bytes
    return sum(sizes.blocks.values()) * sizes.itemsize


def _differentiated(spec: InfluenceJobSpec, method: Method, sizes: Sizes, micro_batch: int, rows: int) -> int:
    """Solving `rows` examples at once, or for TrainingGradients differentiating them, above the model."""
    if spec.operation is Operation.TRAINING_GRADIENTS:
        footprint = method.footprint(sizes.shapes, min(micro_batch, rows), rows)
        gradients = joined_bytes(rows * footprint.factor_row, footprint.capture, rows > micro_batch)
        return footprint.resident + gradients
    footprint = method.footprint(sizes.shapes, micro_batch, rows)
    if spec.operation is Operation.SELF_INFLUENCE or stored_basis(spec) is Basis.METHOD:
        return footprint.factors
    return max(footprint.factors, footprint.by_parameter)


def _read_bytes(spec: InfluenceJobSpec) -> int:
    """The training examples of a chunk to aim at: fewer where the host's memory is small."""
    return min(READ_BYTES, memory.host_budget(spec) // 4)


def _region_bytes(spec: InfluenceJobSpec, method: Method, sizes: Sizes, micro_batch: int) -> int:
    """The size of region to aim at: smaller where the budget is small."""
    free = memory.device_budget(spec) - _used(spec, method, sizes, micro_batch)
    return min(REGION_BYTES, max(1, free // 8))


def _most_rows(
    spec: InfluenceJobSpec, method: Method, sizes: Sizes, micro_batch: int, region_bytes: int
) -> int:
    """Test rows whose factors fit: (budget − model, fit, capture and region) / bytes of a row."""
    used = _used(spec, method, sizes, micro_batch)
    row = _factor_row(spec, method, sizes) * memory.factor_copies(spec)
    free = memory.device_budget(spec) - used - region_bytes
    if free < row:
        raise memory.impossible(
            spec,
            f"model, fit and one micro-batch need {in_words(used)} and the factors of one test "
            f"example {in_words(row)}",
        )
    return free // row


def _test_chunk(
    spec: InfluenceJobSpec, method: Method, sizes: Sizes, micro_batch: int, most_rows: int
) -> int:
    """As given, or what leaves `FACTOR_TASKS` chunks, fits, and divides a group evenly.

    For SelfInfluence and TrainingGradients of the training examples, which are solved or differentiated
    chunk by chunk. Where workers share the passes that solve a chunk, chunks need not be many.
    """
    side = "train" if spec.operation.is_of_training else "test"
    given = None if spec.chunks is None else getattr(spec.chunks, side)
    budget = memory.device_budget(spec) - sizes.shapes.model_bytes

    def fits(rows: int) -> bool:
        return rows <= most_rows and _differentiated(spec, method, sizes, micro_batch, rows) <= budget

    def fits_host_too(rows: int) -> bool:
        # What is brought to the host, or read there, at once; where it is the device, that counts it.
        brought = 0 if memory.on_host(spec) else rows * max(sizes.blocks.values()) * sizes.itemsize
        return fits(rows) and brought <= memory.host_budget(spec) // 2

    if given is not None:
        rows = min(given, sizes.test)
        if not fits(rows):
            limit = _largest_power(1, most_rows, fits)
            what = "differentiating" if spec.operation is Operation.TRAINING_GRADIENTS else "solving"
            raise memory.impossible(
                spec,
                f"chunks.{side}: {what} {rows} {side} examples at once does not fit",
                f", or set {limit} or less",
            )
        return int(given)
    pieces = 1 if method.solves_by_passes else FACTOR_TASKS
    wanted = min(LARGEST_TEST_CHUNK, max(8, sizes.test // pieces), sizes.test, _column_rows(spec, sizes))
    if spec.operation is Operation.TRAINING_GRADIENTS:
        # A job that scores them reads whole chunks.
        wanted = min(wanted, max(1, _read_bytes(spec) // (sum(sizes.blocks.values()) * sizes.itemsize)))
        return _largest_power(1, min(wanted, most_rows), fits_host_too)
    if method.solves_by_passes and fits_host_too(wanted):
        return wanted
    if most_rows >= sizes.test:
        return _largest_power(1, wanted, fits_host_too)
    # Several groups: chunks that fill a group leave no memory unused.
    pieces = -(-most_rows // wanted)
    while most_rows // pieces > 1 and not fits_host_too(most_rows // pieces):
        pieces += 1
    return most_rows // pieces


def _largest_power(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest power of two up to `most` that fits; `least` if none does."""
    size = 2 ** int(math.log2(max(least, most)))
    while size > least and not fits(size):
        size //= 2
    return size


def _train_chunk(
    spec: InfluenceJobSpec, sizes: Sizes, group_rows: int, micro_batch: int, region_bytes: int
) -> int:
    """As given, or what makes regions of `region_bytes`, at least `LEAST_REGIONS`, of whole micro-batches."""
    if spec.chunks is not None and spec.chunks.train is not None:
        return spec.chunks.train
    column = group_rows * _pair_bytes(spec, sizes)
    groups = -(-sizes.test // group_rows)
    by_size = region_bytes // column
    by_reading = _read_bytes(spec) // max(1, _training_bytes(spec, sizes))
    by_count = sizes.train // -(-LEAST_REGIONS // groups)
    if sizes.stored_chunk is not None:
        return _of_stored_chunks(max(1, min(by_size, by_reading, sizes.train)), by_count, sizes.stored_chunk)
    chunk = max(1, min(by_size, by_reading, by_count, sizes.train))
    return chunk - chunk % micro_batch if chunk > micro_batch else chunk


def _of_stored_chunks(most: int, wanted: int, stored: int) -> int:
    """Whole chunks of stored gradients, so that each is read once per group; even parts of one, where that is
    more than `most`.
    """
    if most < stored:
        return -(-stored // -(-stored // most))
    chunk = max(stored, min(most, wanted))
    return chunk - chunk % stored


def _stages(spec: InfluenceJobSpec, method: Method, sizes: Sizes, plan: Plan) -> dict[str, StageMemory]:
    """Bytes per worker of each stage that computes."""
    shapes = sizes.shapes
    footprint = method.footprint(shapes, plan.micro_batch, plan.test_chunk_length)
    on_host = memory.on_host(spec)
    rows = plan.test_chunk_length
    reads = 2 * plan.train_chunk_length * _training_bytes(spec, sizes)
    tests = rows * sizes.test_example_bytes
    solved = shapes.model_bytes + _differentiated(spec, method, sizes, plan.micro_batch, rows)
    # One block at a time is brought to the host and written, a piece of it laid out and given its checksum.
    columns = max(map(plan.factor_columns, range(len(plan.blocks))))
    pieces = 2 * rows * columns * plan.itemsize
    if on_host:
        held = shapes.model_bytes + footprint.resident + rows * footprint.factor_row
        written = max(0, held + pieces - solved)
    else:
        written = rows * max(plan.blocks.values()) * plan.itemsize + pieces
    scratch = 0

    def stage(device: int, host: int) -> StageMemory:
        return StageMemory(device=device, host=host + (device if on_host else 0), scratch=scratch)

    tried = max(probe_footprint(shapes), method.tried_rows * shapes.width * shapes.itemsize)
    stages = {"Loading": stage(shapes.model_bytes + tried, shapes.model_bytes)}
    if plan.fit_passes:
        scratch += (plan.fit_ranges + plan.fit_passes) * footprint.stored
        stages["Fitting"] = stage(shapes.model_bytes + footprint.fit, reads)
    # Of one chunk at a time, and of a pass what the one before it left.
    scratch += plan.fit_ranges * footprint.solving_sums + 2 * footprint.solving_state
    if plan.on_itself:
        stages["Scores"] = stage(solved, reads)
    elif plan.gradients_only:
        stages["Gradients"] = stage(solved, tests + written)
    elif spec.operation.solves_tests:
        scratch += plan.factor_bytes if plan.has_scores else 0
        stages["Factors"] = stage(solved, tests + written)
    if plan.has_scores:
        region = math.prod(plan.result_chunks) * plan.itemsize
        group = plan.group_rows * _factor_row(spec, method, sizes)
        used = _used(spec, method, sizes, plan.micro_batch)
        if not on_host and not spec.operation.reads_training:
            used = max(used, _resident(method, sizes) + reads // 2)
        device = used + group + region
        scratch += top_lists.stored(plan) + (plan.ranked_bytes if plan.dense else 0)
        # An earlier job's factors may be in longer chunks.
        loaded = group if spec.factors else min(rows, plan.group_rows) * _factor_row(spec, method, sizes)
        scoring = reads + 2 * region + max(loaded, top_lists.making(plan))
        # Merging begins when all regions are done: on a processor less of the device's part is left.
        gone = device - _resident(method, sizes) - group if on_host else 0
        stages["Scores"] = stage(device, max(scoring, top_lists.merging(plan) - gone))
    return stages


def _refuse_large_result(spec: InfluenceJobSpec, plan: Plan) -> None:
    limit = spec.output.max_bytes.bytes
    if plan.result_bytes <= limit:
        return
    shape = " × ".join(str(extent) for extent in plan.result_shape)
    if plan.by_block:
        cure = "take fewer test examples or blocks, operation: Influences, or raise output.maxBytes"
    elif plan.by_token:
        cure = "take fewer test examples, shorter texts, operation: Influences, or raise output.maxBytes"
    elif plan.has_scores and spec.mode is Mode.UP:
        cure = "set output.dense: false, which keeps the top k and the statistics, or raise output.maxBytes"
    elif plan.gradients_only:
        cure = (
            "take method Trak or Logra with a smaller rank, track fewer parameters, or raise output.maxBytes"
        )
    else:
        cure = "take fewer test examples, track fewer parameters, or raise output.maxBytes"
    raise PermanentError(
        Reason.PLAN_IMPOSSIBLE,
        f"spec.output.maxBytes: expected a result of at most {spec.output.max_bytes} ({limit} bytes), got "
        f"{shape} of {plan.dtype} = {in_words(plan.result_bytes)} ({plan.result_bytes} bytes); {cure}",
    )


def _refuse_large_stage(spec: InfluenceJobSpec, plan: Plan) -> None:
    budget, limit = memory.device_budget(spec), spec.worker_limits.get("memory")
    most = None if limit is None else max(limit.bytes, IDLE_WORKER_BYTES)
    for name, stage in plan.memory.items():
        if stage.device <= budget:
            continue
        need = f"stage {name} needs {in_words(stage.device)}"
        if name == "Scores" and plan.has_scores:
            region = f"{plan.group_rows} × {plan.train_chunk_length}"
            raise memory.impossible(
                spec, f"{need} for regions of {region} examples", ", or set smaller chunks"
            )
        raise memory.impossible(spec, need)
    for name, stage in plan.memory.items():
        if most is not None and stage.host > most:
            raise PermanentError(
                Reason.PLAN_IMPOSSIBLE,
                f"spec.workers.resources.limits.memory: expected more than {in_words(stage.host)}, which "
                f"stage {name} needs beside what an idle worker takes, got {limit}; raise it, or set smaller "
                f"chunks (of {plan.test_chunk_length} test and {plan.train_chunk_length} training examples)",
            )
