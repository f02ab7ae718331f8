"""The stages after loading, each as work for the submitter: what is left of it is what the ledger lacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from influence_job.driver import earlier_job, layout
from influence_job.driver.passes import Passes
from influence_job.driver.preflight import Opened
from influence_job.driver.reporting import ProgressTracker
from influence_job.driver.row_work import Rows, RowWork
from influence_job.driver.submission import Submitter, Work
from influence_job.errors import PermanentError, Reason
from influence_job.plan import Plan
from influence_job.progress import Stage
from influence_job.spec import CgSpec, InfluenceJobSpec, LissaSpec, MethodSpec, Mode, Verify
from influence_job.storage import arrays
from influence_job.worker import closing, factors, scores, self_influences, training_gradients
from influence_job.worker.loading import Loaded
from influence_job.worker.outcome import Outcome
from influence_job.worker.session import WorkerContext, data_changed

RUN_REGIONS = 64
"""Most regions in one Dask task: long enough that scheduling costs nothing, short enough to spread."""
VERIFY_ROUNDS = 3
PARTS = {
    scores.KIND: "regions",
    self_influences.KIND: "chunks of self-influences",
    training_gradients.KIND: "chunks of gradients",
    factors.KIND: "chunks of factors",
}
"""What rows stand for, for the kinds that a result is made of."""
SOLVER_STATUS = ("CONVERGED", "MAX_ITERATIONS", "INDEFINITE", "NOT_FINITE")
"""By the number that the store holds."""


@dataclass
class Stages:
    """One attempt's stages from Fitting to Verifying."""

    spec: InfluenceJobSpec
    plan: Plan
    context: WorkerContext
    opened: Opened
    loaded: Loaded
    submitter: Submitter
    tracker: ProgressTracker
    rows: RowWork = field(init=False)
    passes: Passes = field(init=False)

    def __post_init__(self) -> None:
        store, ledger = self.opened.store, self.opened.ledger
        self.rows = RowWork(self.context, ledger, self.submitter, self.tracker)
        self.passes = Passes(self.plan, self.loaded, store, ledger, self.rows)

    def run(self) -> None:
        """All stages in order; a stage that is done already costs a look at the ledger."""
        operation = self.spec.operation
        if operation.fits:
            self.fit()
        if self.plan.on_itself:
            self.self_influences()
        elif self.plan.gradients_only:
            self.gradients()
        elif operation.solves_tests:
            self.factors()
        if self.plan.has_scores:
            self.scores()
        self.verify()

    def fit(self) -> None:
        """The passes over the training data that the method takes."""
        self._enter(Stage.FITTING)
        self.passes.fit()

    def factors(self) -> None:
        """One left representation per test chunk."""
        self._enter(Stage.FACTORS)
        self._solve(factors.KIND, factors.compute_factors)

    def self_influences(self) -> None:
        """Every training chunk against itself."""
        self._enter(Stage.SCORES)
        self._solve(self_influences.KIND, self_influences.compute_self_influences)
        self._check_chunks_read(self_influences.KIND)

    def gradients(self) -> None:
        """Every training chunk in the coordinates in which the method scores."""
        self._enter(Stage.GRADIENTS)
        rows = Rows(training_gradients.KIND, self.plan.train_chunks)
        self.rows.compute(rows, training_gradients.compute_gradients, on_value=self._tell_notes)
        self._check_chunks_read(training_gradients.KIND)

    def scores(self) -> None:
        """Every region, group by group, and each group's merge when its regions are there."""
        self._enter(Stage.SCORES)
        total = self.plan.regions + self.plan.groups
        self.tracker.start_counting(self._scored(), total)
        self.submitter.run(self._region_work(), on_row=lambda: self.tracker.count(self._scored()))
        self._check_inputs()
        merges = self.rows.work(Rows(closing.MERGE_KIND, self.plan.groups), closing.merge)
        self.submitter.run(merges, on_row=lambda: self.tracker.count(self._scored()))

    def verify(self) -> None:
        """Reads rows of the result back; those that differ from the ledger's digests are computed again.

        Raises:
            PermanentError: STORE_CORRUPT when rows still differ after being computed again.
        """
        self._enter(Stage.VERIFYING)
        if self.opened.finished:
            return
        kind, total = layout.result_rows(self.plan)
        sample = self._sample(total)
        for _ in range(VERIFY_ROUNDS):
            bad = self._differing(kind, sample)
            if not bad:
                return
            self.tracker.warn(
                f"{len(bad)} {PARTS[kind]} differed from their digests and are computed again: {bad[:10]}"
            )
            self._compute_again(kind, bad)
            self._enter(Stage.VERIFYING)
            sample = np.asarray(bad)
        raise PermanentError(
            Reason.STORE_CORRUPT,
            f"output.url: {PARTS[kind]} {bad[:10]} of {self.opened.store.url} read back other than they were "
            f"written, {VERIFY_ROUNDS} times; the storage does not keep what it is given",
        )

    def _compute_again(self, kind: str, indices: list[int]) -> None:
        self.opened.ledger.forget(kind, indices)
        if self.plan.has_scores:
            groups = {self.plan.unravel(index)[0] for index in indices}
            self.opened.ledger.forget(closing.MERGE_KIND, sorted(groups))
            return self.scores()
        if self.plan.gradients_only:
            return self.gradients()
        self.passes.forget(indices)
        return self.self_influences() if self.plan.on_itself else self.factors()

    # -- what is left ---------------------------------------------------------------------------

    def _enter(self, stage: Stage) -> None:
        self.opened.ledger.guard.check()
        self.tracker.enter(stage)

    def _solve(self, kind: str, function: Callable[..., Outcome]) -> None:
        """The rows of all chunks that are solved, by passes or each by one worker."""
        chunks = self.plan.solved_chunks
        if self.plan.solves_by_passes:
            self.passes.solve(kind, chunks, function, self._tell_notes)
        else:
            self.rows.compute(Rows(kind, chunks), function, None, on_value=self._tell_notes)
        self._count_solver()

    def _tell_notes(self, notes: tuple[str, ...]) -> None:
        """What the fit cannot promise, and what the workers that solve found to be in their way."""
        for note in notes:
            self.tracker.warn(note)

    def _scored(self) -> int:
        ledger = self.opened.ledger
        return ledger.count(scores.KIND) + ledger.count(closing.MERGE_KIND)

    def _region_work(self) -> Iterator[Work]:
        """Runs of consecutive missing regions, never across a group."""
        missing = self.opened.ledger.missing(scores.KIND, self.plan.regions)
        run = max(1, min(RUN_REGIONS, math.ceil(len(missing) / (4 * max(1, self.submitter.workers())))))
        for group in range(self.plan.groups):
            first = self.plan.region(group, 0)
            inside = missing[(missing >= first) & (missing < first + self.plan.train_chunks)]
            for start in range(0, len(inside), run):
                indices = tuple(int(i) for i in inside[start : start + run])
                yield Work(
                    scores.KIND, indices, scores.compute_regions, self._region_arguments, f"group {group}"
                )

    def _region_arguments(self, left: tuple[int, ...]) -> tuple[object, ...]:
        pairs = [self.plan.unravel(index) for index in left]
        return self.context, pairs[0][0], [chunk for _, chunk in pairs], self.opened.ledger.next_segment

    # -- checks ---------------------------------------------------------------------------------

    def _check_inputs(self) -> None:
        """Each group read the same training chunks, and they are what the fit read."""
        plan, ledger = self.plan, self.opened.ledger
        chunk_inputs: list[str] = []
        for chunk in range(plan.train_chunks):
            seen = {ledger.row(scores.KIND, plan.region(g, chunk)).inputs for g in range(plan.groups)}
            if len(seen) > 1:
                raise self._changed(*plan.train_range(chunk))
            chunk_inputs.append(seen.pop())
        self._check_fit_read(chunk_inputs)

    def _changed(self, start: int, stop: int) -> PermanentError:
        """The error for training examples, or their gradients, that one group read otherwise than another."""
        wanted = earlier_job.taken(self.spec)
        if wanted is None or self.spec.gradients is None:
            return data_changed("train", start, stop)
        return earlier_job.changed(wanted, f" of training examples {start} to {stop - 1}")

    def _check_chunks_read(self, kind: str) -> None:
        """The training chunks that rows of a kind are of, one each, are what the fit read."""
        ledger, chunks = self.opened.ledger, range(self.plan.train_chunks)
        self._check_fit_read([ledger.row(kind, chunk).inputs for chunk in chunks])

    def _check_fit_read(self, chunk_inputs: list[str]) -> None:
        """The training chunks, of which these are the digests, are what the fit read."""
        for index in range(self.plan.fit_ranges):
            start, stop = self.plan.fit_range(index)
            length = self.plan.train_chunk
            found = arrays.joined_digest(chunk_inputs[start // length : math.ceil(stop / length)])
            if any(expected != found for expected in self.passes.range_inputs(index)):
                raise data_changed("train", start, stop)

    def _count_solver(self) -> None:
        """Solver counts over all test rows, those of earlier attempts included."""
        status = arrays.read_array(self.opened.store, "solver_status")
        counts = {name: int((status == value).sum()) for value, name in enumerate(SOLVER_STATUS)}
        self.tracker.solver(counts)
        if warning := unsolved(counts, self.spec.method):
            self.tracker.warn(warning)

    def _sample(self, total: int) -> np.ndarray:
        """Those of `total` rows that are read back: all, or evenly spaced ones."""
        if self.spec.output.verify is Verify.NONE:
            return np.empty(0, int)
        if self.spec.output.verify is Verify.ALL:
            return np.arange(total)
        return (
            np.unique(np.linspace(0, total - 1, min(total, max(16, total // 100))).astype(int))
            if total
            else np.empty(0, int)
        )

    def _differing(self, kind: str, sample: np.ndarray) -> list[int]:
        bad: list[int] = []
        ledger = self.opened.ledger
        batches = [
            sample[start : start + RUN_REGIONS].tolist() for start in range(0, len(sample), RUN_REGIONS)
        ]
        self.tracker.start_counting(0, len(sample))
        works = [
            Work(
                closing.VERIFY_KIND,
                tuple(batch),
                closing.verify,
                lambda left: (self.context, kind, list(left), [ledger.row(kind, i).digest for i in left]),
                "verifying",
            )
            for batch in batches
        ]
        self.submitter.run(works, on_value=bad.extend)
        self.tracker.count(len(sample))
        return sorted(set(bad))


def perturbs(spec: InfluenceJobSpec) -> bool:
    """Whether the result has the training input's feature dimensions."""
    return spec.mode is Mode.PERTURBATION


def unsolved(counts: Mapping[str, int], method: MethodSpec) -> str | None:
    """The warning for solves that did not converge, with what may cure them; None if all did."""
    failed = {name: n for name, n in counts.items() if n and name != "CONVERGED"}
    if not failed:
        return None
    listed = ", ".join(f"{n} {name.lower()}" for name, n in failed.items())
    # More steps do not lower a residual that rounding keeps above the tolerance.
    has_rtol = "MAX_ITERATIONS" in failed and isinstance(method, CgSpec | LissaSpec)
    cures = "maxiter, rtol or regularization" if has_rtol else "maxiter or regularization"
    return (
        f"some examples were not solved to tolerance: {listed}; see solver_status in the store, raise {cures}"
    )
