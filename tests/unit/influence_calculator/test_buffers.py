"""Models of influence that travel: memory beside the pickle, everything as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from distributed.protocol import deserialize, serialize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from influence_calculator import TorchNumpyConverter
from influence_calculator.chunk_tasks import WorkerSide, left_of_chunk
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


class SendsOn:
    """A forward hook that sends the side on, as another worker that asks for it would have it sent."""

    def __init__(self, side: WorkerSide) -> None:
        self.side = side
        self.sent: list[WorkerSide] = []

    def __call__(self, *_: Any) -> None:
        self.sent.append(pickle.loads(pickle.dumps(self.side, protocol=5)))

    def __reduce__(self) -> Any:
        return dict, ()


class TestAWorkersSide:
    @pytest.fixture
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(0)
        return random.random((12, WIDTH), dtype=np.float32), random.integers(3, size=12)

    @pytest.fixture
    def side(self, data: tuple[np.ndarray, np.ndarray]) -> WorkerSide:
        """As it came to a worker."""
        network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
        x, y = map(torch.from_numpy, data)
        model = EkfacInfluence(network, True, 0.1).fit([(x, y)])
        side = WorkerSide(model, TorchNumpyConverter(), model.factor_dtype)
        return pickle.loads(pickle.dumps(side, protocol=5))

    def test_it_is_sent_on_as_it_came_also_while_it_computes(
        self, side: WorkerSide, data: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Meanwhile its modules hold detached parameters: none of them would be tracked."""
        expected = left_of_chunk(side, *data)
        hook = SendsOn(side)
        with side.model.model.register_forward_hook(hook):
            left_of_chunk(side, *data)
        assert hook.sent
        for sent in hook.sent:
            assert sent.model.model_params.keys() == side.model.model_params.keys()
            assert np.array_equal(left_of_chunk(sent, *data), expected)
            again = pickle.loads(pickle.dumps(sent, protocol=5))
            assert np.array_equal(left_of_chunk(again, *data), expected)

    def test_what_it_keeps_for_that_takes_no_memory(self, side: WorkerSide) -> None:
        kept = side.__getstate__()["model"]
        assert kept is not side.model
        pairs = zip(kept.model.parameters(), side.model.model.parameters(), strict=True)
        assert all(mine.data_ptr() == own.data_ptr() for mine, own in pairs)
        fitted = zip(pytree.tree_leaves(kept._state), pytree.tree_leaves(side.model._state), strict=True)
        assert all(mine.data_ptr() == own.data_ptr() for mine, own in fitted)
