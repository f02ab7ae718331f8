"""The model in the store: every process of a job computes with that of the first, whatever it trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from influence_calculator import Checkpoint
from influence_calculator.maths.checkpoints import load_checkpoints
from influence_calculator.maths.objective import xy_objective
from influence_job.errors import PermanentError, Reason
from influence_job.identity import JobIdentity
from influence_job.storage.store import Store
from influence_job.worker import model_state, tensor_file

OURS, OTHERS = JobIdentity("ours", 0, "pod"), JobIdentity("others", 0, "pod")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "x.zarr"))


def network(seed: int, hidden: int = 3) -> nn.Module:
    """With buffers: batch norm counts its batches in an integer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 2))


def test_later_processes_of_a_job_take_the_parameters_and_buffers_of_the_first(store: Store) -> None:
    first, later = network(1), network(2)
    first[1].num_batches_tracked += 5
    model_state.save(store, first, OURS)
    model_state.adopt(store, later, OURS)
    assert model_state.digest(later) == model_state.digest(first) == model_state.stored_digest(store)
    assert int(later[1].num_batches_tracked) == 5


def test_another_jobs_model_is_left_for_the_fingerprint_to_compare(store: Store) -> None:
    model_state.save(store, network(1), OTHERS)
    own = network(2)
    before = model_state.digest(own)
    model_state.adopt(store, own, OURS)
    assert model_state.digest(own) == before


def test_the_first_process_finds_nothing_to_take(store: Store) -> None:
    own = network(2)
    before = model_state.digest(own)
    model_state.adopt(store, own, OURS)
    assert model_state.digest(own) == before
    assert model_state.stored_digest(store) is None


@pytest.mark.parametrize(
    "other",
    [network(1, hidden=4), network(1).double(), network(1).append(nn.Linear(2, 2))],
    ids=["shape", "dtype", "name"],
)
def test_other_names_shapes_or_dtypes_are_refused_by_name(store: Store, other: nn.Module) -> None:
    model_state.save(store, network(1), OURS)
    with pytest.raises(
        PermanentError, match=r"spec\.task\.entrypoint: .*weight.* same architecture"
    ) as caught:
        model_state.adopt(store, other, OURS)
    assert caught.value.reason is Reason.INVALID_TASK


def test_an_earlier_jobs_model_changes_hands_without_being_written_again(
    store: Store, tmp_path: Path
) -> None:
    kept = model_state.save(store, network(1), OTHERS)
    written = (tmp_path / "x.zarr" / model_state.PATH).stat().st_ino
    model_state.take_over(store, OURS)
    assert (tmp_path / "x.zarr" / model_state.PATH).stat().st_ino == written
    model_state.adopt(store, later := network(2), OURS)
    assert model_state.digest(later) == kept


def test_results_without_their_model_are_not_taken_over(store: Store) -> None:
    with pytest.raises(PermanentError, match=r"fit/model\.json is missing.*Overwrite") as caught:
        model_state.take_over(store, OURS)
    assert caught.value.reason is Reason.STORE_CORRUPT


def test_tensors_without_the_note_of_whose_they_are_are_not_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: str, document: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as death:
        death.setattr(store, "put_json", killed)
        with pytest.raises(KeyboardInterrupt):
            model_state.save(store, network(1), OURS)
    own = network(2)
    before = model_state.digest(own)
    model_state.adopt(store, own, OURS)
    assert model_state.digest(own) == before


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_a_tensor_file_keeps_every_bit_of_every_dtype(dtype: torch.dtype, store: Store) -> None:
    tensors = {"a/b.weight": torch.randn(3, 4).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    data = tensor_file.pack(tensors)
    found = dict(tensor_file.unpack(data, store, "there"))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype is dtype
        assert torch.equal(found[name], tensor)
    assert tensor_file.pack(found) == data, "the same tensors give the same bytes"


def test_a_tensor_file_with_a_changed_byte_of_data_is_named(store: Store) -> None:
    data = tensor_file.pack({"weight": torch.arange(64.0)})
    place = data.index(torch.arange(64.0).numpy().tobytes())
    for position in range(place, place + 256, 5):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(PermanentError, match=r"fit/model: expected an intact tensor file") as caught:
            dict(tensor_file.unpack(bytes(changed), store, "fit/model"))
        assert caught.value.reason is Reason.STORE_CORRUPT
    with pytest.raises(PermanentError, match="fit/model"):
        dict(tensor_file.unpack(data[: len(data) // 2], store, "fit/model"))


def test_checkpoints_and_their_learning_rates_are_kept_with_the_model(store: Store) -> None:
    """An entry point that trains gives others each time; a job computes with those of its first process."""

    def states(seed: int, rate: float) -> nn.Module:
        given = [Checkpoint(network(10 + seed).state_dict(), rate), Checkpoint(network(20).state_dict())]
        loaded = load_checkpoints(network(seed), given)
        return model_state.states_of(replace(xy_objective(network(seed), nn.MSELoss()), checkpoints=loaded))

    first, later = states(1, 0.5), states(2, 0.25)
    assert model_state.digest(states(1, 0.25)) != model_state.digest(first)
    model_state.save(store, first, OURS)
    model_state.adopt(store, later, OURS)
    assert model_state.digest(later) == model_state.digest(first)
    assert later["checkpoints"].learning_rates.tolist() == [0.5, 1.0]
