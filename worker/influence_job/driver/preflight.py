"""The Preflight stage: everything that can be known, or refused, before a worker is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from influence_job import entrypoint
from influence_job.driver import earlier_job, fingerprints
from influence_job.errors import PermanentError, Reason
from influence_job.identity import JobIdentity
from influence_job.spec import InfluenceJob, InfluenceJobSpec
from influence_job.storage.arrays import OURS, read_attributes
from influence_job.storage.claim import OVERWRITE, Claim, Epoch, begin, claim, inspect
from influence_job.storage.ledger import Ledger
from influence_job.storage.store import Store, absolute


@dataclass
class Opened:
    """A store that is ours to write to."""

    store: Store
    epoch: Epoch
    ledger: Ledger
    fingerprint: dict[str, Any]
    """What is known without the model."""
    record: dict[str, Any]
    """What an earlier job noted at the root (fingerprint, plan, ...), as far as it still counts."""
    earlier: dict[str, Any] | None
    """What the job noted whose factors or gradients are taken, at the root of its store."""

    def begin(self) -> None:
        """What is to be deleted is deleted, and nothing that was there counts."""
        self.epoch = begin(self.store, self.epoch)
        self.ledger.go_on_as(self.epoch)

    @property
    def begun(self) -> bool:
        """Whether an earlier job got as far as creating the arrays."""
        return "fingerprint" in self.record

    @property
    def finished(self) -> bool:
        """Whether an earlier job completed the result."""
        return self.record.get("finished") is True


def rooted(job: InfluenceJob) -> InfluenceJob:
    """The job with urls that mean the same wherever the task's code changes the working directory to.

    Raises:
        PermanentError: INVALID_SPEC, with the field.
    """
    changed: dict[str, Any] = {}
    for name in ("output", "factors", "gradients"):
        part = getattr(job.spec, name)
        if part is None:
            continue
        try:
            changed[name] = part.model_copy(update={"url": absolute(part.url)})
        except ValueError as error:
            raise PermanentError(Reason.INVALID_SPEC, f"spec.{name}.url: {error}") from error
    return job.model_copy(update={"spec": job.spec.model_copy(update=changed)})


def preflight(spec: InfluenceJobSpec, identity: JobIdentity) -> Opened:
    """Imports the entry point, probes the output, compares what is known, and claims the store.

    Raises:
        PermanentError: the task, the output or what it holds does not allow this job.
    """
    entrypoint.find(spec.task.entrypoint)
    earlier_job.refuse_own_store(spec)
    earlier = earlier_job.read_record(spec)
    fingerprint = fingerprints.of_spec(spec, **earlier_job.digests(spec, earlier))
    earlier_job.refuse_other(spec, earlier, fingerprint)
    store = Store.open(spec.output.url, spec.output.storage_options)
    existing = inspect(store)
    store.probe()
    on_existing = str(spec.output.on_existing)
    if existing.effective(identity.uid, on_existing) != OVERWRITE:
        _refuse_other(spec, store, _record(existing.attributes), fingerprint)
    epoch = claim(store, Claim(identity.uid, identity.attempt, identity.pod, on_existing))
    ledger, record = Ledger(store, epoch, spec.output.allow_mixed_hardware), {}
    if not epoch.starts_anew:
        # Only now: whoever held the store before may have begun it, or gone on, until it was ours.
        record = _record(read_attributes(store))
        _refuse_other(spec, store, record, fingerprint)
        ledger.load()
    return Opened(store, epoch, ledger, fingerprint, record, earlier)


def _record(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return dict(attributes.get(OURS, {}))


def _refuse_other(
    spec: InfluenceJobSpec, store: Store, record: dict[str, Any], fingerprint: dict[str, Any]
) -> None:
    """Refuses a store that was begun with something else, as far as that is known without the model."""
    more = fingerprints.plan_differences(spec, record.get("plan"))
    fingerprints.refuse_differences(store.url, record.get("fingerprint"), fingerprint, more)
