"""Who may write to a store: one driver at a time, by epochs.

A driver claims a store by creating `ledger/epoch-<n>`, which nothing ever replaces or deletes; whoever
holds the highest epoch is the writer. An older driver finds the higher epoch before its next flush and
stops. A job that overwrites claims twice: first as any other, and, once it is sure to start, with a claim
after which segments of earlier epochs never count, even while their objects still exist. One that fails
before leaves what is there as it was.

    inspect   what is there, before anything is written
    claim     become the writer
    begin     what an Overwrite deletes, once the job is sure to start
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from influence_job.errors import InfrastructureError, PermanentError, Reason
from influence_job.storage.arrays import OURS, forget, read_attributes
from influence_job.storage.store import Store

RESUME, OVERWRITE, FAIL = "Resume", "Overwrite", "Fail"
"""`output.onExisting`."""

CHECK_SECONDS = 1.0
"""So long a driver may go on without knowing that another took its store."""

_EPOCH = re.compile(r"ledger/epoch-(\d+)")


@dataclass(frozen=True)
class Claim:
    """What a driver writes when it takes a store."""

    job_uid: str
    attempt: int
    pod: str
    """Where it runs: a pod's name, or a host's."""
    on_existing: str
    """`Resume`, `Overwrite` or `Fail`: what the job asks for; it decides in a UID's first claim only."""
    overwrites: bool = False
    """Set by `begin`: nothing that earlier epochs did counts any more."""
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    nonce: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Makes the content unique, so that a claim whose answer was lost is recognized as our own."""


@dataclass(frozen=True)
class Existing:
    """What is at a URL that may be claimed: nothing, or a store of ours."""

    claims: Mapping[int, Claim]
    """By epoch."""
    attributes: Mapping[str, Any]
    """Root attributes; empty if there are none, or if they no longer count."""
    must_delete: bool
    """An Overwrite has begun and its deletion has not ended: what is there does not count."""

    @property
    def empty(self) -> bool:
        """Nothing is there that counts."""
        return not self.attributes and (self.must_delete or not self.claims)

    @property
    def finished(self) -> bool:
        """The driver that completed the store has said so."""
        return self.attributes.get(OURS, {}).get("finished") is True

    @property
    def counts_from(self) -> int:
        """Segments of the ledger count from this epoch on; 0 if none ever overwrote."""
        return _counts_from(self.claims)

    def latest(self) -> Epoch | None:
        """The claim that holds now, for those who only read; None if nobody ever claimed the store."""
        if not self.claims:
            return None
        number = max(self.claims)
        return Epoch(
            number=number,
            claim=self.claims[number],
            resumes=True,
            previous={n: made for n, made in self.claims.items() if n != number},
            counts_from=self.counts_from,
            overwrites=False,
            must_delete=self.must_delete,
        )

    def effective(self, job_uid: str, on_existing: str) -> str:
        """What `onExisting` means for this UID now: after its first claim every attempt resumes, but that it
        overwrites as long as none of them got so far.
        """
        own = [made for _, made in sorted(self.claims.items()) if made.job_uid == job_uid]
        if not own:
            return on_existing
        is_to = own[0].on_existing == OVERWRITE and not any(made.overwrites for made in own)
        return OVERWRITE if is_to else RESUME


@dataclass(frozen=True)
class Epoch:
    """A claim that was won."""

    number: int
    claim: Claim
    resumes: bool
    """This UID has claimed the store before."""
    previous: Mapping[int, Claim]
    """Earlier claims by epoch."""
    counts_from: int
    """Segments of the ledger count from this epoch on; 0 if none ever overwrote."""
    overwrites: bool
    """`begin` will overwrite what is there."""
    must_delete: bool
    """An earlier Overwrite has begun and its deletion has not ended; `begin` ends it."""

    @property
    def starts_anew(self) -> bool:
        """Nothing that is there counts for this driver."""
        return self.overwrites or self.must_delete


def inspect(store: Store) -> Existing:
    """What is at the URL. Writes nothing.

    Raises:
        PermanentError: something that is not ours.
    """
    claims = _claims(store)
    attributes = read_attributes(store)
    if not claims and OURS not in attributes:
        found = store.first_path()
        claims = _claims(store)  # what was found may be a claim that was made meanwhile
        if found is not None and not claims:
            raise _not_ours(store, found)
    counts_from = _counts_from(claims)
    must_delete = counts_from > 0 and store.get(_deleted_path(counts_from)) is None
    return Existing(claims, {} if must_delete else attributes, must_delete)


def claim(store: Store, wanted: Claim) -> Epoch:
    """Becomes the writer: creates the next epoch.

    Raises:
        PermanentError: `onExisting: Fail`, and another job's store is there (also when it came meanwhile).
    """
    if wanted.on_existing not in (RESUME, OVERWRITE, FAIL):
        raise ValueError(f"on_existing: expected Resume, Overwrite or Fail, got {wanted.on_existing!r}")
    while True:
        existing = inspect(store)
        mode = existing.effective(wanted.job_uid, wanted.on_existing)
        if mode == FAIL and (existing.claims or existing.attributes):
            raise PermanentError(
                Reason.STORE_EXISTS,
                f"{store.url}: output.onExisting is Fail and a store is there; choose another output.url, or "
                f"Resume or Overwrite",
            )
        number = max(existing.claims, default=0) + 1
        if store.create_json(_epoch_path(number), asdict(wanted)):
            return Epoch(
                number=number,
                claim=wanted,
                resumes=any(c.job_uid == wanted.job_uid for c in existing.claims.values()),
                previous=existing.claims,
                counts_from=existing.counts_from,
                overwrites=mode == OVERWRITE,
                must_delete=existing.must_delete,
            )


def check_epoch(store: Store, epoch: Epoch) -> None:
    """Proves that no later claim exists. Epochs have no gaps, so one read of the next one tells.

    Raises:
        InfrastructureError: a later attempt of this job writes now.
        PermanentError: another job does.
    """
    latest: tuple[int, Claim] | None = None
    number = epoch.number + 1
    while (data := store.get(_epoch_path(number))) is not None:
        latest = number, _parse(data)
        number += 1
    if latest is None:
        return
    number, other = latest
    if other.job_uid == epoch.claim.job_uid:
        raise InfrastructureError(
            Reason.SUPERSEDED,
            f"{store.url}: attempt {other.attempt} of this job took the store over (epoch {number})",
        )
    raise PermanentError(
        Reason.STORE_CLAIMED,
        f"{store.url}: job {other.job_uid or 'unknown'} on {other.pod or 'an unknown host'} took the store "
        f"over at {other.time} (epoch {number}); two jobs cannot write to one output.url",
    )


class Guard:
    """Proves again and again that an epoch's driver is still the writer."""

    def __init__(self, store: Store, epoch: Epoch) -> None:
        self._store = store
        self._epoch = epoch
        self._checked = time.monotonic()

    def check(self) -> None:
        """As `check_epoch`."""
        check_epoch(self._store, self._epoch)
        self._checked = time.monotonic()

    def check_if_due(self) -> None:
        """`check` when the last is a second ago: for long work that is done step by step."""
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self.check()


def begin(store: Store, epoch: Epoch) -> Epoch:
    """Deletes all that is there but the claims, if this job overwrites it or an earlier Overwrite did not
    end; the epoch to go on with.

    Raises:
        InfrastructureError, PermanentError: as `check_epoch`; what is there is then another's.
    """
    if epoch.overwrites:
        epoch = _overwriting(store, epoch)
    if epoch.must_delete:
        guard = Guard(store, epoch)
        guard.check()
        store.delete_prefix("", guard.check_if_due, keep=lambda path: _EPOCH.fullmatch(path) is not None)
        forget(store)
        guard.check()
        store.put(_deleted_path(epoch.counts_from), b"")
    return replace(epoch, must_delete=False)


def _overwriting(store: Store, epoch: Epoch) -> Epoch:
    """The claim that takes effect, right after the one that held the store until now."""
    number, made = epoch.number + 1, replace(epoch.claim, overwrites=True, nonce=uuid.uuid4().hex)
    while not store.create_json(_epoch_path(number), asdict(made)):
        check_epoch(store, epoch)
    previous = {**epoch.previous, epoch.number: epoch.claim}
    return Epoch(number, made, epoch.resumes, previous, number, overwrites=False, must_delete=True)


def _claims(store: Store) -> dict[int, Claim]:
    found = [path for path in store.list("ledger/epoch-") if _EPOCH.fullmatch(path)]
    return {int(path.rpartition("-")[2]): _parse(data or b"") for path, data in sorted(store.get_many(found))}


def _parse(data: bytes) -> Claim:
    """The claim; one that cannot be read (a file system lost it half way) is a job's we do not know."""
    try:
        return Claim(**json.loads(data))
    except (ValueError, TypeError):
        return Claim("", 0, "", RESUME, time="an unknown time", nonce="")


def _counts_from(claims: Mapping[int, Claim]) -> int:
    return max((number for number, made in claims.items() if made.overwrites), default=0)


def _not_ours(store: Store, found: str) -> PermanentError:
    return PermanentError(
        Reason.STORE_EXISTS,
        f"{store.url}: expected a store of an earlier job or nothing, found {found!r}, which no job wrote; "
        f"choose another output.url (nothing was changed)",
    )


def _epoch_path(number: int) -> str:
    return f"ledger/epoch-{number}"


def _deleted_path(number: int) -> str:
    return f"ledger/deleted-before-{number}"
