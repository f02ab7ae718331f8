"""Top lists and statistics while they are made of regions: what they take of a worker and of the store. Pure.

They are in the worker's memory, never on the device: what bounds them is the memory that the device's budget
leaves.
"""

from __future__ import annotations

from influence_job.errors import PermanentError, Reason
from influence_job.plan.document import Plan, Sizes
from influence_job.plan.memory import top_lists_budget
from influence_job.spec import InfluenceJobSpec
from influence_job.storage.sink_arrays import merging_bytes
from influence_job.storage.sinks import making_bytes, partial_bytes, row_bytes
from influence_job.units import in_words

COPIES = 3
"""Of the top lists of a group: two while they are merged, and a part that may be as large; fewer before."""


def most_rows(spec: InfluenceJobSpec, sizes: Sizes) -> int:
    """Test rows of a group whose top lists fit; at least one."""
    return max(1, top_lists_budget(spec) // _row(spec, sizes))


def making(plan: Plan) -> int:
    """Bytes that a worker takes to make one region's."""
    return making_bytes(plan.group_rows, plan.train_chunk_length, plan.top_k, plan.itemsize)


def merging(plan: Plan) -> int:
    """Bytes that a worker takes to merge a group's."""
    return merging_bytes(plan.group_rows, plan.train_chunk_length, plan.train, plan.top_k, plan.itemsize)


def stored(plan: Plan) -> int:
    """Bytes of those of all regions in the store."""
    whole, rest = divmod(plan.train, plan.train_chunk_length)
    columns = [(whole, plan.train_chunk_length), (1 if rest else 0, rest)]
    rows = [plan.group_range(group) for group in (0, plan.groups - 1)]
    first, last = (stop - start for start, stop in rows)
    return sum(
        chunks * groups * partial_bytes(extent, min(plan.top_k, length), plan.itemsize)
        for chunks, length in columns
        for groups, extent in ((plan.groups - 1, first), (1, last))
    )


def refuse_long(spec: InfluenceJobSpec, sizes: Sizes, plan: Plan) -> None:
    """Refuses top lists that are too long for the rows of a group, which explicit chunks can make many.

    Raises:
        PermanentError: PlanImpossible, with the numbers that would fit.
    """
    budget, need = top_lists_budget(spec), plan.group_rows * _row(spec, sizes)
    if need <= budget:
        return
    statistics = row_bytes(0, plan.itemsize)
    rank = row_bytes(1, plan.itemsize) - statistics
    ranks = max(1, (budget // (COPIES * plan.group_rows) - statistics) // rank)
    raise PermanentError(
        Reason.PLAN_IMPOSSIBLE,
        f"spec.output.topK: expected at most {ranks} for {plan.group_rows} test examples (chunks.test), got "
        f"{plan.top_k}: to make and merge top lists takes {in_words(need)} of a worker's memory, but "
        f"{in_words(budget)} are for it; lower it, set chunks.test to {most_rows(spec, sizes)} or less, or "
        f"raise workers.resources.limits.memory",
    )


def _row(spec: InfluenceJobSpec, sizes: Sizes) -> int:
    return COPIES * row_bytes(min(spec.output.top_k, sizes.train), sizes.itemsize)
