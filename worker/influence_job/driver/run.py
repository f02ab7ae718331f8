"""One attempt of one job, from Preflight to the finished store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from distributed import Client

from influence_job.driver import earlier_job, fingerprints, layout
from influence_job.driver.preflight import Opened, preflight
from influence_job.driver.reporting import ProgressTracker
from influence_job.driver.stages import Stages
from influence_job.driver.stop import Stop
from influence_job.driver.submission import Submitter
from influence_job.errors import JobError, ended_with
from influence_job.identity import JobIdentity
from influence_job.methods import method_of
from influence_job.plan import Plan, make_plan
from influence_job.progress import Progress, Stage
from influence_job.spec import InfluenceJob
from influence_job.worker import model_state
from influence_job.worker.loading import Loaded, load, save_model
from influence_job.worker.session import WorkerContext


def run(
    job: InfluenceJob,
    identity: JobIdentity,
    connect: Callable[[], Client],
    tracker: ProgressTracker,
    stop: Stop | None = None,
    trust_finished: bool = False,
) -> Progress:
    """Runs the job and returns its last progress document.

    Args:
        job: the manifest.
        identity: UID, attempt and pod, as the claim on the store records them.
        connect: connects to the scheduler, or raises NoSchedulerError; called again when it is lost.
        tracker: the progress document, which others serve or draw.
        stop: asked by a signal handler; the ledger is flushed before the run ends.
        trust_finished: end a finished job without comparing its model and data, which needs a worker.

    Raises:
        JobError: with the reason and the exit code.
    """
    try:
        _attempt(job, identity, connect, tracker, stop or Stop(), trust_finished)
    except BaseException as error:
        tracker.fail(ended_with(error))
        raise
    return tracker.snapshot()


def _attempt(
    job: InfluenceJob,
    identity: JobIdentity,
    connect: Callable[[], Client],
    tracker: ProgressTracker,
    stop: Stop,
    trust_finished: bool,
) -> None:
    tracker.enter(Stage.PREFLIGHT)
    opened = preflight(job.spec, identity)
    try:
        if opened.finished and trust_finished:
            tracker.warn("the store is finished; compared without loading the model")
            layout.tidy(opened.store, opened.ledger.guard)  # whoever finished it may have died before he did
            tracker.finish(opened.record["result"])
            return
        tracker.update(workers_needed=True)
        submitter = Submitter(connect, opened.ledger, tracker, stop)
        try:
            submitter.open()
            _compute(job, identity, opened, submitter, tracker)
        except BaseException:
            # What is known is kept, whatever ended the attempt; what ended it is what is told.
            with suppress(JobError):
                opened.ledger.flush()
            raise
        finally:
            submitter.close()
    finally:
        with suppress(Exception):  # everything is written: nothing that goes wrong now may change the outcome
            opened.store.close()


def _compute(
    job: InfluenceJob, identity: JobIdentity, opened: Opened, submitter: Submitter, tracker: ProgressTracker
) -> None:
    opened.ledger.guard.check()
    tracker.enter(Stage.LOADING)
    context = WorkerContext(job.spec, identity, opened.epoch.number)
    loaded: Loaded = submitter.call(load, context)
    fingerprint = fingerprints.with_model(opened.fingerprint, loaded)
    fingerprints.refuse_differences(opened.store.url, opened.record.get("fingerprint"), fingerprint, [])
    earlier_job.refuse_other(job.spec, opened.earlier, fingerprint)
    earlier_job.refuse_other_rows(job.spec, loaded.sizes.blocks)
    opened.ledger.refuse_other(loaded.environment)
    plan = _plan(job, opened, loaded)
    if opened.begun:
        model_state.take_over(opened.store, identity)
    else:
        opened.begin()
        # Any worker may be the one that stores its model, and each may have trained another.
        fingerprint["model"] = submitter.call(save_model, context)
        guard = opened.ledger.guard
        copied = earlier_job.copy_coordinates(job.spec, opened.earlier, opened.store, guard.check_if_due)
        layout.create(opened.store, opened.epoch, guard, job, plan, loaded, fingerprint, copied)
    context = replace(context, epoch=opened.epoch.number, plan=plan, seen=loaded.seen)
    Stages(job.spec, plan, context, opened, loaded, submitter, tracker).run()
    earlier_job.refuse_changed(job.spec, opened.earlier)
    tracker.finish(layout.complete(opened.store, opened.ledger, plan))


def _plan(job: InfluenceJob, opened: Opened, loaded: Loaded) -> Plan:
    """The stored plan as it stands, or a new one."""
    stored: dict[str, Any] | None = opened.record.get("plan")
    if stored is not None:
        return Plan.from_json(stored)
    return make_plan(job.spec, method_of(job.spec), loaded.sizes)
