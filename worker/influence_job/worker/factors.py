"""The Factors stage on a worker: the left representation of one chunk of test examples, into the store."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from influence_calculator.maths.finite import finite_rows
from influence_calculator.maths.layout import Left
from influence_calculator.maths.method import Solved, SolverReport, SolverStatus
from influence_calculator.maths.objective import IndexedBatch, Objective, micro_batches
from influence_job.errors import PermanentError, Reason
from influence_job.plan.basis import Basis, stored_basis
from influence_job.spec import InfluenceJobSpec, Mode
from influence_job.storage import arrays
from influence_job.storage.arrays import ArrayInfo
from influence_job.storage.ledger import Row
from influence_job.storage.store import Store
from influence_job.worker.annotations import write_annotations
from influence_job.worker.blame import blame, blaming, not_finite
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import Session, WorkerContext, session

KIND = "factors"

_REPORT = {
    "solver_status": "status",
    "solver_iterations": "iterations",
    "solver_residual": "residual",
}
"""Array -> what it holds of a solver's report."""
TURNED_ELEMENTS = 1 << 24
"""Of a group's rows, turned at once: 64 MiB in float32."""


def factor_path(block: int) -> str:
    """The array of one block's factors, dimensions test and column."""
    return f"factors/{block}"


def compute_factors(context: WorkerContext, ended: str | None, index: int) -> Outcome:
    """Solves one chunk of test examples and stores factors, coordinates and how each solve ended.

    `ended` is the last of the passes that solved it, if passes did.
    """
    outcome = Outcome()

    def work() -> None:
        own = session(context)
        gradients, inputs = differentiated(own, index, annotated=True)
        solved = solve(own, gradients, ended)
        del gradients
        digest = _store(own, index, solved)
        outcome.value = (*own.fitted.notes, *solved.report.notes)
        outcome.report(Row(KIND, index, digest, inputs, own.environment))

    outcome.attempt(KIND, index, f"factors of test chunk {index}", work)
    return outcome


def differentiated(own: Session, index: int, *, annotated: bool = False) -> tuple[Left, str]:
    """Gradients of the examples of a chunk (of training examples where the operation is of them alone), in
    the coordinates in which the method solves, and the digest of what was read.

    `annotated`: stores the examples' coordinates too.

    Raises:
        PermanentError: names the first example without a finite gradient.
    """
    side, start, stop = own.plan.differentiated_range(index)
    objective = own.side_of(own.objective, side)
    batch, inputs = own.read(side, start, stop)
    with blaming(own, objective, side, start, stop):
        if annotated:
            write_annotations(own, side, index, batch)
        gradients = _gradients(own, objective, IndexedBatch(start, batch))
    _require_finite(gradients, side, start)
    return gradients, inputs


def solve(own: Session, gradients: Left, ended: str | None) -> Solved:
    """Solves, or takes what the passes left of which the last is called `ended`; a training example that
    makes the solve raise or end in NaN is named.
    """
    if ended is not None:
        return own.solver.solved(own.fit_reader.left_by(ended, own.layout.blocks, own.device))
    if not own.method.needs_data:
        return own.fitted.solve(gradients)
    with blaming(own, own.objective, "train", 0, own.length):
        solved = own.fitted.solve(gradients)
    if bool((solved.report.status == SolverStatus.NOT_FINITE).any()):
        error = blame(own, own.objective, "train", 0, own.length)
        if error is not None:
            raise error
    return solved


def load_group(own: Session, group: int) -> Left:
    """One group of test chunks from the store onto the device: its left representation as it is scored, or,
    where gradients are stored, as those are; in mode Perturbation and for InfluencesByToken its factors by
    parameter.
    """
    start, stop = own.plan.group_range(group)
    return {
        block: _resident(own, number, block, start, stop) for number, block in enumerate(own.layout.blocks)
    }


def _resident(own: Session, number: int, block: str, start: int, stop: int) -> Tensor:
    """A block's rows `start` to `stop` on the device, in the basis that the mode takes; read one stored
    chunk of examples at a time, moved and turned a few at a time.
    """
    path, width = factor_path(number), own.layout.factor_widths[block]
    stored = arrays.array_info(own.factor_store, path)
    turns = _turns(own, Basis(stored.attributes["basis"]))
    resident = torch.empty(stop - start, width, device=own.device, dtype=own.resident_dtype)
    at_once = max(1, TURNED_ELEMENTS // max(1, width))
    height = stored.chunks[0]
    for chunk in range(start // height, -(-stop // height)):
        first, last = max(start, chunk * height), min(stop, (chunk + 1) * height)
        rows = read_rows(own, own.factor_store, path, block, first, last)
        for piece, target in zip(rows.split(at_once), resident[first - start : last - start].split(at_once)):
            turned = {block: piece.to(own.device)}
            for turn in turns:
                turned = turn(turned)
            target.copy_(turned[block])
    return resident


def _turns(own: Session, basis: Basis) -> list[Callable[[Left], Left]]:
    """From the basis of the store to how the mode takes factors."""
    by_parameter = own.spec.mode is Mode.PERTURBATION or own.plan.by_token
    wanted = Basis.PARAMETERS if by_parameter else Basis.METHOD
    turns: list[Callable[[Left], Left]] = []
    if basis is not wanted:
        turns.append(own.fitted.left if wanted is Basis.METHOD else own.fitted.factors)
    if not by_parameter and own.spec.operation.reads_training:
        turns.append(own.fitted.scored)
    return turns


def read_rows(own: Session, store: Store, path: str, block: str, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of a block's array, which may be another job's, on the host.

    Raises:
        PermanentError: STORE_MISMATCH where it is of another block, or of other columns.
    """
    width = own.layout.factor_widths[block]
    info = rows_info(own.spec, store, path, block, width)
    # Memory that torch allocated: the alignment of foreign memory changes bits.
    into = torch.empty(stop - start, width, dtype=own.result_dtype)
    height, across = info.chunks
    for i in range(start // height, -(-stop // height)):
        for j in range(info.grid[1]):
            chunk = torch.from_numpy(arrays.read_chunk(store, path, (i, j)))
            first = max(start, i * height)
            rows = chunk[first - i * height : stop - i * height]
            into[first - start : first - start + len(rows), j * across : j * across + chunk.shape[1]] = rows
    return into


def rows_info(spec: InfluenceJobSpec, store: Store, path: str, block: str, width: int) -> ArrayInfo:
    """The array of a block's rows, of `width` columns.

    Raises:
        PermanentError: STORE_MISMATCH where it is of another block, or of other columns.
    """
    info = arrays.array_info(store, path)
    kept = (info.attributes.get("block", block), info.shape[1])
    if kept == (block, width):
        return info
    field = arrays.earlier_field(store)
    if field is None:
        field, cure = "spec.output.url", "start anew with output.onExisting: Overwrite"
    else:
        cure = f"take the store of {spec.earlier_maker} with the same task and method"
    raise PermanentError(
        Reason.STORE_MISMATCH,
        f"{field}: {store.url}/{path} holds {kept[1]} columns of block {kept[0]!r}, this job has {width} of "
        f"block {block!r}; {cure}",
    )


def _gradients(own: Session, objective: Objective, indexed: IndexedBatch) -> Left:
    pieces = [
        own.fitted.gradients(objective, piece.batch) for piece in micro_batches(indexed, own.plan.micro_batch)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return {block: torch.cat([piece.pop(block) for piece in pieces]) for block in own.layout.blocks}


def _require_finite(gradients: Left, side: str, start: int) -> None:
    for gradient in gradients.values():
        bad = ~finite_rows(gradient)
        if bad.any():
            index = start + int(bad.nonzero()[0])
            raise not_finite(side, index)


def stored_digest(own: Session, index: int) -> str:
    """What the ledger's digest of a chunk would be, as the chunk reads now."""
    report = (_stored(own, name, (index,)) for name in _REPORT)
    return arrays.joined_digest((*stored_rows(own, factor_path, index), *report))


def _store(own: Session, index: int, solved: Solved) -> str:
    """Writes the factor chunks and the solver's report; the digest covers all of them."""
    digests = []
    for number, block in enumerate(own.layout.blocks):
        rows = _as_stored(own, block, solved.left[block])
        digests += write_rows(own, factor_path(number), number, index, rows)
    return arrays.joined_digest((*digests, *store_report(own, index, solved.report)))


def write_rows(own: Session, path: str, number: int, index: int, rows: Tensor) -> list[str]:
    """Writes chunk `index` of one array of factors or gradients, that of block `number`; the digests of its
    pieces.
    """
    values, width = as_array(rows), own.plan.factor_columns(number)
    return [
        arrays.write_chunk(own.store, path, (index, column), values[:, first : first + width])
        for column, first in enumerate(range(0, values.shape[1], width))
    ]


def stored_rows(own: Session, path_of: Callable[[int], str], index: int) -> list[str]:
    """The digests of `write_rows` of every block, as the pieces read now; `path_of` a block's number."""
    return [
        _stored(own, path, (index, column))
        for path in map(path_of, range(len(own.plan.blocks)))
        for column in range(arrays.array_info(own.store, path).grid[1])
    ]


def store_report(own: Session, index: int, report: SolverReport) -> list[str]:
    """Writes how the solves of chunk `index` ended; the digests."""
    return [
        arrays.write_chunk(own.store, name, (index,), as_array(getattr(report, column)))
        for name, column in _REPORT.items()
    ]


def _stored(own: Session, path: str, index: tuple[int, ...]) -> str:
    return arrays.digest(arrays.read_chunk(own.store, path, index))


def _as_stored(own: Session, block: str, left: Tensor) -> Tensor:
    """A block's left representation in the basis of the store."""
    if stored_basis(own.spec) is Basis.METHOD:
        return left
    return own.fitted.factors({block: left})[block]


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor as the store holds it: half precision becomes float32."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.detach().cpu().contiguous().numpy()
