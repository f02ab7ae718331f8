"""The model's parameters and buffers in the store: `fit/model`, written by the first process of a job.

An entry point may train, and training need not give the same bits twice. So one process of a job stores
what its call returned; every other process of the job, and every later attempt, takes that instead of its
own, and refuses only what cannot be taken: other names, shapes or dtypes.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from influence_calculator.maths.objective import Objective
from influence_job.data import tensor_bytes
from influence_job.errors import PermanentError, Reason
from influence_job.identity import JobIdentity
from influence_job.storage.store import Store
from influence_job.worker import tensor_file

PATH = "fit/model"
OWNER_PATH = "fit/model.json"


def states_of(objective: Objective) -> nn.Module:
    """What a job's numbers are computed from: the model, and the checkpoints where the objective has some."""
    if objective.checkpoints is None:
        return objective.model
    return nn.ModuleDict({"model": objective.model, "checkpoints": objective.checkpoints})


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, in the model's order."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def digest(model: nn.Module) -> str:
    """Digest of all names, dtypes, shapes and bytes."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in named_tensors(model).items():
        state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor_bytes(tensor.cpu()))
    return state.hexdigest()


def save(store: Store, model: nn.Module, identity: JobIdentity) -> str:
    """Stores the model for all processes of `identity`, before anything is computed with it; its digest.

    The tensors come first and the note of whose they are last: a crash between leaves tensors that
    nobody adopts.
    """
    own = digest(model)
    if stored_digest(store) != own:
        store.put(PATH, tensor_file.pack(named_tensors(model)))
    store.put_json(OWNER_PATH, {"uid": identity.uid, "digest": own})
    return own


def take_over(store: Store, identity: JobIdentity) -> None:
    """Makes the stored model, which an earlier job computed with, that of all processes of `identity`.

    Raises:
        PermanentError: there is none.
    """
    kept = stored_digest(store)
    if kept is None:
        raise PermanentError(
            Reason.STORE_CORRUPT,
            f"{store.url}: {OWNER_PATH} is missing, although results are there; restore it, or start anew "
            f"with output.onExisting: Overwrite",
        )
    store.put_json(OWNER_PATH, {"uid": identity.uid, "digest": kept})


def stored_digest(store: Store) -> str | None:
    """Digest of the stored model; None if there is none."""
    owner = store.get_json(OWNER_PATH)
    return None if owner is None else str(owner["digest"])


def adopt(store: Store, model: nn.Module, identity: JobIdentity) -> str:
    """Puts the stored tensors into `model` if they are this job's, and others; its digest afterwards.

    Another job's are left alone: its digest is compared with the fingerprint, which refuses or accepts it.

    Raises:
        PermanentError: names, shapes or dtypes differ, or the stored model is damaged.
    """
    owner, present = store.get_json(OWNER_PATH), digest(model)
    if owner is None or owner["uid"] != identity.uid or owner["digest"] == present:
        return present
    data = store.get(PATH)
    if data is None:
        raise PermanentError(Reason.STORE_CORRUPT, f"{store.url}: {PATH} is missing beside {OWNER_PATH}")
    own = {name: _kind(tensor) for name, tensor in named_tensors(model).items()}
    stored = {name: _kind(tensor) for name, tensor in tensor_file.unpack(data, store, PATH)}
    if own != stored:
        problems = [name for name in own.keys() | stored.keys() if own.get(name) != stored.get(name)]
        raise PermanentError(
            Reason.INVALID_TASK,
            f"spec.task.entrypoint: the model differs from the one this job stored in names, shapes or "
            f"dtypes of {sorted(problems)[:10]}; an entry point must build the same architecture "
            f"at every call",
        )
    with torch.no_grad():
        tensors = named_tensors(model)
        for name, tensor in tensor_file.unpack(data, store, PATH):
            tensors[name].copy_(tensor)
    return str(owner["digest"])


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape
