"""Solving by passes on a worker: what the first pass follows, and what the last one left.

The passes themselves are `fitting`'s, over the ranges of a fit.
"""

from __future__ import annotations

from influence_job.worker.factors import differentiated
from influence_job.worker.fit_state import solving_step, unit_kind, unit_path
from influence_job.worker.fitting import keep_unit
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import WorkerContext, session


def begin(context: WorkerContext, chunk: int, units: tuple[int, ...]) -> Outcome:
    """Stores what the passes of a chunk start from, for some units: from its examples' gradients."""
    outcome = Outcome()
    step = solving_step(chunk, 0)

    def work() -> None:
        own = session(context)
        gradients, inputs = differentiated(own, chunk)
        begun = own.solver.begun(gradients)
        for unit in units:
            keep_unit(own, outcome, step, unit, unit_path(step, unit), begun[own.layout.blocks[unit]], inputs)

    outcome.attempt(unit_kind(step), units[0], f"the beginning of solving chunk {chunk}", work)
    return outcome
