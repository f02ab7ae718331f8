"""Models of influence that travel: memory beside the pickle, everything as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import cloudpickle
import pytest
import torch
from distributed.protocol import deserialize, serialize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence_calculator.torch import EkfacInfluence
from influence_calculator.torch.buffers import packed, unpacked

WIDTH = 64


def there_and_back(value: Any) -> Any:
    """As received from a stream: in other memory, which nobody may write to."""
    pickled, buffers = packed(value)
    return unpacked(pickled, [bytes(buffer.raw()) for buffer in buffers])


class TestModelOfInfluence:
    @pytest.fixture
    def data(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return torch.randn(12, WIDTH), torch.randint(3, (12,))

    @pytest.fixture
    def model(self, data: tuple[Tensor, Tensor]) -> EkfacInfluence:
        network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
        # A function of this file's own test, as those of a notebook: only cloudpickle takes it.
        loss = lambda outputs, y: F.cross_entropy(outputs, y)  # noqa: E731
        model = EkfacInfluence(network, hessian_regularization=0.1, loss=loss)
        return model.fit(DataLoader(TensorDataset(*data), batch_size=4))

    def test_dask_sends_its_memory_beside_the_pickle(
        self, model: EkfacInfluence, data: tuple[Tensor, Tensor]
    ) -> None:
        header, frames = serialize(model)
        sizes = [memoryview(frame).nbytes for frame in frames]
        assert sizes[0] < WIDTH * WIDTH, "tensors are in the pickle"
        # The first layer's weight, Q_A, Q_G and Λ are as large as that each.
        assert sum(size >= 4 * WIDTH * WIDTH for size in sizes) >= 4
        again = deserialize(header, frames)
        assert torch.equal(again.influences(*data), model.influences(*data))

    def test_without_buffers_it_travels_too(self, model: EkfacInfluence, data: tuple[Tensor, Tensor]) -> None:
        for protocol in (4, 5):
            again = pickle.loads(cloudpickle.dumps(model, protocol))
            assert torch.equal(again.influences(*data), model.influences(*data))

    def test_a_copy_has_memory_of_its_own(self, model: EkfacInfluence, data: tuple[Tensor, Tensor]) -> None:
        before = model.influences(*data)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model[0].weight.zero_()
        assert torch.equal(model.influences(*data), before)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3),
        torch.arange(6.0).view(2, 3).mT,
        torch.arange(6).expand(4, 6)[::2],
        torch.tensor(3.5, dtype=torch.float64),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        torch.ones(2, requires_grad=True),
        torch.tensor([[0.0, 2.0]]).to_sparse(),
        torch.empty(3, device="meta"),
        nn.Parameter(torch.ones(2), requires_grad=False),
    ],
    ids=repr,
)
def test_every_kind_of_tensor_arrives_as_it_was(tensor: Tensor) -> None:
    (again,) = there_and_back([tensor])
    assert type(again) is type(tensor)
    assert (again.dtype, again.shape, again.layout, again.device) == (
        *(tensor.dtype, tensor.shape, tensor.layout, tensor.device),
    )
    assert again.requires_grad == tensor.requires_grad
    if not tensor.is_meta:
        assert torch.equal(again.to_dense(), tensor.to_dense())


def test_what_arrives_may_be_written_to() -> None:
    here = torch.zeros(4)
    again = there_and_back(here)
    again += 1
    assert torch.equal(here, torch.zeros(4))


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    again = there_and_back(model)
    assert again["head"].weight is again["embedding"].weight
