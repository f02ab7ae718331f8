"""What one worker process keeps for one attempt of a job: the task, the model on its device, the fit.

Every worker calls the entry point once. Neither model nor data passes through the scheduler: a task on a
worker carries a `WorkerContext`, a few kilobytes, and finds the session by the job's UID and attempt.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from influence_calculator.heap import keep_freed_memory
from influence_calculator.maths.by_hand import at_work
from influence_calculator.maths.layout import Layout, Left
from influence_calculator.maths.method import FitPass, FitState, Fitted, Method, PassesFitted
from influence_calculator.maths.objective import Batch, IndexedBatch, Objective, Seen, micro_batches
from influence_calculator.maths.one_by_one import PROBED
from influence_job import entrypoint
from influence_job.data import read_batch
from influence_job.errors import PermanentError, Reason
from influence_job.identity import JobIdentity
from influence_job.methods import method_of
from influence_job.plan import Plan
from influence_job.spec import Device, FactorDtype, InfluenceJobSpec, Operation, Precision
from influence_job.storage import arrays
from influence_job.storage.store import Store
from influence_job.task import DataSource, InfluenceTask
from influence_job.worker import environment, model_state
from influence_job.worker.fit_state import FitReader, solving_step_before


@dataclass(frozen=True)
class WorkerContext:
    """What every task of an attempt carries: the job, who computes it, and the plan once there is one."""

    spec: InfluenceJobSpec
    identity: JobIdentity
    epoch: int
    plan: Plan | None = None
    seen: Seen | None = None
    """What loading found of the model at work."""


@dataclass
class Session:
    """A process's hold on one attempt. Built once; the plan arrives after loading."""

    spec: InfluenceJobSpec
    device: torch.device
    task: InfluenceTask
    tracked: Objective
    """What is differentiated, as the task says."""
    method: Method
    environment: str
    model_digest: str
    """Digest of parameters and buffers: of this process's own call of the entry point, or those that this
    job has stored."""
    _plan: Plan | None = None
    _groups: dict[int, Left] = field(default_factory=dict)
    _fits: dict[str, FitState] = field(default_factory=dict)
    _seen: dict[tuple[str, int, int], str] = field(default_factory=dict)
    _at_work: Seen | None = None

    @cached_property
    def store(self) -> Store:
        """Where the result goes."""
        return Store.open(self.spec.output.url, self.spec.output.storage_options)

    @property
    def plan(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("the plan is made after loading; this task came too early")
        return self._plan

    @property
    def states(self) -> nn.Module:
        """The model, with its checkpoints where the method sums over them: what the store keeps."""
        return model_state.states_of(self.tracked)

    @cached_property
    def objective(self) -> Objective:
        """What is differentiated, with what loading saw of the model at work, or else this process does.

        Raises:
            UnsupportedModelError: a part of the model that the method cannot treat.
        """
        if self._at_work is not None:
            return self.tracked.with_seen(self._at_work)
        side = "train" if self.spec.operation.reads_training else "test"
        few = self.read(side, 0, min(PROBED, len(getattr(self.task, side))))[0]
        seen = self.method.looked_at(at_work(self.side_of(self.tracked, side), few), lambda: few).seen
        return self.tracked.with_seen(seen)

    def side_of(self, objective: Objective, side: str) -> Objective:
        """An objective as the side "train" or "test" has it: for tests with the task's measurement."""
        measurement = self.task.measurement if side == "test" else None
        return objective if measurement is None else objective.with_loss(measurement)

    @property
    def result_dtype(self) -> torch.dtype:
        """Factors' and scores' dtype in the store: the parameters', float32 for half precision."""
        return torch.float64 if self.plan.dtype == "float64" else torch.float32

    @property
    def resident_dtype(self) -> torch.dtype:
        """Factors' dtype on the device, which `factorDtype` may halve."""
        return torch.bfloat16 if self.spec.factor_dtype is FactorDtype.BFLOAT16 else self.result_dtype

    @cached_property
    def layout(self) -> Layout:
        return self.method.layout(self.objective)

    @cached_property
    def fitted(self) -> Fitted:
        """The fitted method, read from the store's finished fit."""
        state = self._fit_reader(self.fit_store).state(self.device)
        return self.method.fitted(self.objective, state, self if self.method.needs_data else None)

    @property
    def solver(self) -> PassesFitted:
        """The fitted method, of a job that solves by passes."""
        if not isinstance(self.fitted, PassesFitted):
            raise RuntimeError(f"{type(self.fitted).__name__} does not solve by passes")
        return self.fitted

    @cached_property
    def fit_store(self) -> Store:
        """Where the fit lies: this store, or the one of an earlier job, with its factors or gradients."""
        url = self.spec.earlier_store
        if url is None:
            return self.store
        store = Store.open(url, self.spec.output.storage_options)
        return arrays.of_earlier_job(store, self.spec.earlier_field)

    @property
    def factor_store(self) -> Store:
        """Where the factors lie."""
        taken = self.spec.operation is Operation.INFLUENCES_FROM_FACTORS
        return self.fit_store if taken else self.store

    # TrainingData, for methods that solve by going over the training set again
    @property
    def length(self) -> int:
        return len(self.task.train)

    def batches(self) -> Iterator[IndexedBatch]:
        yield from self.training_range(0, self.length)

    @cached_property
    def fit_reader(self) -> FitReader:
        """Reads this job's own fit."""
        return self._fit_reader(self.store)

    def _fit_reader(self, store: Store) -> FitReader:
        return FitReader(store, self.method, self.objective)

    def fit_before(self, step: FitPass) -> FitState:
        """The finished passes before a pass, read once; before one that solves, which holds what the fit
        left, the one that it follows.
        """
        if step.name not in self._fits:
            self._fits.clear()
            before = solving_step_before(step.name)
            self._fits[step.name] = (
                self.fit_reader.state(self.device, before=step.name)
                if before is None
                else {before: self.fit_reader.left_by(before, step.units(self.objective), self.device)}
            )
        return self._fits[step.name]

    def training_range(self, start: int, stop: int) -> Iterator[IndexedBatch]:
        """Micro-batches of a range of training examples, in order."""
        for indexed, _ in self.training_reads(start, stop):
            yield from micro_batches(indexed, self.plan.micro_batch)

    def training_reads(self, start: int, stop: int) -> Iterator[tuple[IndexedBatch, str]]:
        """The range in the pieces that are read, each with the digest of what came."""
        step = self.plan.train_chunk
        for first in range(start, stop, step):
            batch, digest = self.read("train", first, min(first + step, stop))
            yield IndexedBatch(first, batch), digest

    def read(self, side: str, start: int, stop: int) -> tuple[Batch, str]:
        """Examples of `train` or `test` on the device, with their digest.

        Raises:
            PermanentError: the same indices gave something else before.
        """
        source: DataSource = self.task.train if side == "train" else self.task.test
        batch, digest = read_batch(source, side, start, stop, self.device)
        if self._seen.setdefault((side, start, stop), digest) != digest:
            raise data_changed(side, start, stop)
        return self.at_precision(batch), digest

    def at_precision(self, batch: Batch) -> Batch:
        """The batch in the dtype that forward passes take."""
        if self.spec.precision is Precision.BFLOAT16:
            return pytree.tree_map(_to_bfloat16, batch)
        return batch

    def group(self, group: int, load: Any) -> Left:
        """The factors of a group on the device; one group is kept, the next replaces it."""
        if group not in self._groups:
            self._groups.clear()
            self._groups[group] = load(group)
        return self._groups[group]


_sessions: dict[tuple[str, int], Session] = {}
_lock = threading.Lock()


def session(context: WorkerContext) -> Session:
    """The session of this process for the context; built at the first call, from the entry point.

    Raises:
        PermanentError: GpuNotVisible, a bad entry point, or a model of other shapes than the stored one.
    """
    torch.set_flush_denormal(True)  # of this thread, as `maths.denormals` says why
    key = (context.identity.uid, context.identity.attempt)
    with _lock:
        found = _sessions.get(key)
        if found is None:
            _sessions.clear()
            store = Store.open(context.spec.output.url, context.spec.output.storage_options)
            found = build(context.spec, lambda m: model_state.adopt(store, m, context.identity))
            found.store = store
            _sessions[key] = found
        elif context.plan is not None and found._plan is None:
            # This process called the entry point before the job had stored a model, maybe another process's.
            model_state.adopt(found.store, found.states, context.identity)
        if context.plan is not None:
            found._plan, found._at_work = context.plan, context.seen
    return found


def build(spec: InfluenceJobSpec, prepare: Callable[[nn.Module], str] = model_state.digest) -> Session:
    """A session from the entry point's own call.

    `prepare` gets the model, with the checkpoints that the method sums over, as it will compute, and returns
    its digest.
    """
    keep_freed_memory()
    device = _device(spec)
    environment.make_deterministic(tf32=spec.precision is Precision.TF32)
    task = entrypoint.build(spec.task.entrypoint, spec.task.arguments)
    torch.set_num_threads(1)  # an entry point may have changed it
    if spec.precision is Precision.BFLOAT16:
        task.model.to(torch.bfloat16)
    task.model.to(device)
    method, objective = method_of(spec), entrypoint.objective_of(task)
    if method.sums_checkpoints:
        objective = entrypoint.with_checkpoints(objective, task)
    states = model_state.states_of(objective)
    model_digest = prepare(states)
    # What is imported and loaded stays to the end: no collection, the one at exit included, need visit it.
    gc.freeze()
    return Session(
        spec=spec,
        device=device,
        task=task,
        tracked=objective,
        method=method,
        environment=environment.describe(device),
        model_digest=model_digest,
    )


def data_changed(side: str, start: int, stop: int) -> PermanentError:
    """The error for indices that were read twice and differed."""
    return PermanentError(
        Reason.INVALID_DATA,
        f"{side} examples {start} to {stop - 1}: dataset not deterministic or changed; read() must "
        f"return the same for the same indices (no random augmentation, no shuffling)",
    )


def _to_bfloat16(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.to(torch.bfloat16) if leaf.is_floating_point() else leaf


def _device(spec: InfluenceJobSpec) -> torch.device:
    if spec.resolved_device is Device.CPU:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PermanentError(
            Reason.GPU_NOT_VISIBLE,
            "spec.device: cuda, but torch sees no GPU on this worker; request one in "
            "spec.workers.resources.limits (nvidia.com/gpu: 1), check the driver, or set device: cpu",
        )
    return torch.device("cuda")
