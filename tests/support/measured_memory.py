"""One stage of one method in a process of its own: prints its predicted and its measured bytes.

`python measured_memory.py METHOD SECOND_ORDER HIDDEN EXAMPLES MICRO_BATCH ROWS STAGE DEVICE`: on a GPU what
torch allocates there, on a processor what the process has resident. `METHOD of tokens`: of a small model with
many outputs, HIDDEN of them for each token.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from influence_calculator.maths import region
from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.capture import measure
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.checkpoints import Checkpoint, load_checkpoints
from influence_calculator.maths.curvature import SecondOrderMode
from influence_calculator.maths.direct import Direct
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.grad_dot import GradDot
from influence_calculator.maths.inverse_harmonic_mean import InverseHarmonicMean
from influence_calculator.maths.layout import Left
from influence_calculator.maths.lissa import Lissa
from influence_calculator.maths.logra import Logra
from influence_calculator.maths.method import Fitted, Method, PassesFitted, fit
from influence_calculator.maths.nystroem_sketch import NystroemSketch
from influence_calculator.maths.objective import Batch, Objective, batch_size, xy_objective
from influence_calculator.maths.preconditioners import JacobiPreconditioner, NystroemPreconditioner
from influence_calculator.maths.tracin import TracIn
from influence_calculator.maths.training_batches import KEPT_BYTES
from influence_calculator.maths.trak import Trak
from peak_memory import mark, since
from training_sets import TrainingSet

TOKENS, FEATURES = 128, 16
OF_TOKENS = " of tokens"


def _objective(inputs: int, hidden: int, device: torch.device) -> Objective:
    """With two checkpoints, which TracIn alone looks at."""
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10)).to(device)
    states = [Checkpoint(model.state_dict(), rate) for rate in (0.5, 2.0)]
    objective = xy_objective(model, F.cross_entropy)
    return replace(objective, checkpoints=load_checkpoints(model, states))


def _data(count: int, inputs: int, device: torch.device) -> Batch:
    return torch.randn(count, inputs, device=device), torch.randint(0, 10, (count,), device=device)


def _of_tokens(outputs: int, device: torch.device) -> Objective:
    """What every token is followed by."""
    model = nn.Linear(FEATURES, outputs).to(device)
    return xy_objective(model, lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten()))


def _tokens(count: int, outputs: int, device: torch.device) -> Batch:
    x = torch.randn(count, TOKENS, FEATURES, device=device)
    return x, torch.randint(0, outputs, (count, TOKENS), device=device)


def _run(method: Method, objective: Objective, data: TrainingSet, tests: Batch, stage: str) -> None:
    """The stage; what was used before it and is free again is forgotten."""
    state = fit(method, objective, data)
    if stage == "fit":
        return
    mark(objective.device)
    fitted = method.fitted(objective, state, data)
    if stage == "capture":
        rows, widths = batch_size(tests), fitted.layout.factor_widths
        left = {block: torch.ones(rows, width, device=objective.device) for block, width in widths.items()}
        region.influences(fitted, left, data.whole, data.size)
        return
    pieces = (indexed.batch for indexed in TrainingSet(tests, data.size).batches())
    found = [fitted.gradients(objective, batch) for batch in pieces]
    if len(found) == 1:
        left = found.pop()
    else:
        left = {block: torch.cat([piece.pop(block) for piece in found]) for block in fitted.layout.blocks}
    del found
    if method.solves_by_passes:
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
    name, mode, *sizes, stage, where = sys.argv[1:]
    device = torch.device(where)
    hidden, examples, micro_batch, rows = map(int, sizes)
    second_order = SecondOrderMode(mode)
    # What a fit is about costs the other stages time alone.
    rank = 30 if stage == "fit" else 4
    methods: dict[str, Method] = {
        "direct": Direct(0.1, second_order=second_order),
        "cg": Cg(0.1, maxiter=2, second_order=second_order),
        "cg by passes": Cg(0.1, maxiter=2, second_order=second_order, solves_by_passes=True),
        "cg with jacobi": Cg(
            0.1, maxiter=2, second_order=second_order, preconditioner=JacobiPreconditioner(8)
        ),
        "cg with nystroem": Cg(
            0.1, maxiter=2, second_order=second_order, preconditioner=NystroemPreconditioner(30)
        ),
        "arnoldi": Arnoldi(0.1, rank, max_iter=1, second_order=second_order),
        "nystroem": NystroemSketch(0.1, rank, second_order=second_order),
        "lissa": Lissa(0.1, maxiter=2, second_order=second_order),
        "lissa in parts": Lissa(0.1, maxiter=2, second_order=second_order, batch_size=micro_batch),
        "inverse harmonic mean": InverseHarmonicMean(0.1),
        "grad-dot": GradDot(),
        "tracin": TracIn(),
        "ekfac": Ekfac(0.1),
        "trak": Trak(0.1, 64),
        "logra": Logra(0.1, 16).narrow(),
        "logra of high rank": Logra(0.1, 80).narrow(),
        "logra by parameter": Logra(0.1, 16),
    }
    method = methods[name.removesuffix(OF_TOKENS)]
    # What torch loads and allocates once for all, whatever the model's size.
    tiny = _data(4, 3, device)
    for each in ("factors", "capture"):
        _run(method, _objective(3, 4, device), TrainingSet(tiny, 2), tiny, each)
    if name.endswith(OF_TOKENS):
        objective = _of_tokens(hidden, device)
        whole, tests = _tokens(examples, hidden, device), _tokens(rows, hidden, device)
    else:
        objective = _objective(hidden, hidden, device)
        whole, tests = _data(examples, hidden, device), _data(rows, hidden, device)
    footprint = method.footprint(measure(objective, whole), micro_batch, rows)
    # The plan counts the largest training set that iterating methods keep in memory; this one is smaller.
    kept = whole[0].nbytes
    if name == "inverse harmonic mean":
        kept += examples * footprint.factor_row
    unused = max(0, KEPT_BYTES - kept) if method.needs_data else 0
    before = mark(device)
    _run(method, objective, TrainingSet(whole, micro_batch), tests, stage)
    seen = max(0, since(before, device))
    planned = {"fit": footprint.fit, "factors": footprint.factors - unused}
    planned["capture"] = footprint.capture + rows * footprint.factor_row
    print(json.dumps({"planned": planned[stage], "seen": seen}))


if __name__ == "__main__":
    main()
