"""One stage of one method in a process of its own: prints its predicted and its measured bytes.

`python measured_memory.py METHOD SECOND_ORDER HIDDEN EXAMPLES MICRO_BATCH ROWS STAGE`
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from influence_calculator.maths import region
from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.capture import measure
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.inverse_harmonic_mean import InverseHarmonicMean
from influence_calculator.maths.layout import Left
from influence_calculator.maths.lissa import Lissa
from influence_calculator.maths.logra import Logra
from influence_calculator.maths.method import Fitted, Method, PassesFitted, fit
from influence_calculator.maths.nystroem_sketch import NystroemSketch
from influence_calculator.maths.objective import Objective, xy_objective
from influence_calculator.maths.trak import Trak
from training_sets import TrainingSet


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _objective(inputs: int, hidden: int) -> Objective:
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return xy_objective(model, F.cross_entropy)


def _run(method: Method, objective: Objective, data: TrainingSet, rows: int, stage: str) -> None:
    x, y = data.whole
    state = fit(method, objective, data)
    if stage == "fit":
        return
    fitted = method.fitted(objective, state, data)
    pieces = TrainingSet((x[:rows], y[:rows]), data.size)
    found = [fitted.gradients(objective, piece.batch) for piece in pieces.batches()]
    left = {block: torch.cat([piece.pop(block) for piece in found]) for block in fitted.layout.blocks}
    del found
    if stage == "capture":
        region.influences(fitted, left, data.whole, data.size)
    elif method.solves_by_passes:
        _solve_by_passes(fitted, left, objective, data)
    else:
        fitted.solve(left)


def _solve_by_passes(fitted: Fitted, left: Left, objective: Objective, data: TrainingSet) -> None:
    """As a worker does it, which finds in the store what the pass before left."""
    assert isinstance(fitted, PassesFitted)
    state = fitted.begun(left)
    for _ in range(3):
        step = fitted.solving_pass("next", "before")
        sums = step.accumulate(objective, data.batches(), {"before": state})
        partial = {name: value.clone() for name, value in sums[""].items()}
        for name, value in partial.items():
            sums[""][name].add_(value)
        state = {"": step.finish("", sums[""], data.length, {"before": state})}
    fitted.solved(state)


def main() -> None:
    torch.set_num_threads(1)
    name, mode, *sizes, stage = sys.argv[1:]
    hidden, examples, micro_batch, rows = map(int, sizes)
    second_order = SecondOrderMode(mode)
    methods: dict[str, Method] = {
        "direct": Direct(0.1, second_order=second_order),
        "cg": Cg(0.1, maxiter=2, second_order=second_order),
        "cg by passes": Cg(0.1, maxiter=2, second_order=second_order, solves_by_passes=True),
        "arnoldi": Arnoldi(0.1, 30, max_iter=1, second_order=second_order),
        "nystroem": NystroemSketch(0.1, 30, second_order=second_order),
        "lissa": Lissa(0.1, maxiter=2, second_order=second_order),
        "lissa in parts": Lissa(0.1, maxiter=2, second_order=second_order, batch_size=micro_batch),
        "inverse harmonic mean": InverseHarmonicMean(0.1),
        "grad-dot": GradDot(),
        "trak": Trak(0.1, 64),
        "logra": Logra(0.1, 16).narrow(),
        "logra of high rank": Logra(0.1, 80).narrow(),
        "logra by parameter": Logra(0.1, 16),
    }
    method = methods[name]
    # What torch loads and allocates once for all, whatever the model's size.
    tiny = TrainingSet((torch.randn(4, 3), torch.zeros(4, dtype=torch.long)), 2)
    for each in ("factors", "capture"):
        _run(method, _objective(3, 4), tiny, 2, each)
    objective = _objective(hidden, hidden)
    whole = (torch.randn(examples, hidden), torch.randint(0, 10, (examples,)))
    footprint = method.footprint(measure(objective, whole), micro_batch, rows)
    # The plan counts the largest training set that iterating methods keep in memory; this one is smaller.
    kept = whole[0].nbytes
    if name == "inverse harmonic mean":
        kept += examples * footprint.factor_row
    unused = max(0, footprint.resident - kept) if method.needs_data else 0
    before = _resident()
    _run(method, objective, TrainingSet(whole, micro_batch), rows, stage)
    seen = max(0, _peak() - before)
    print(
        json.dumps(
            {
                "fit": footprint.fit,
                "factors": footprint.factors - unused,
                "capture": footprint.capture,
                "factor_row": footprint.factor_row,
                "seen": seen,
            }
        )
    )


if __name__ == "__main__":
    main()
