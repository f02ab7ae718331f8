"""The library's methods on a GPU: the numbers of a processor in float64, whatever is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from torch import Tensor, nn
from torch.nn import functional as F

import language_models as lm
from influence_calculator import (
    CgInfluence,
    DaskInfluenceCalculator,
    EkfacInfluence,
    InfluenceMode,
    NestedTorchCatAggregator,
    SecondOrderMode,
    SequentialInfluenceCalculator,
    TorchNumpyConverter,
)
from influence_calculator.torch import functional
from influence_calculator.torch.operator import CgOperator, GaussNewtonOperator, HessianOperator
from influence_calculator.torch.preconditioner import JacobiPreconditioner, NystroemPreconditioner
from influence_models import FISHER, MODELS, arrays, batches
from model_cases import (
    ATTENTION,
    CONV1D,
    CONV2D,
    CONV3D,
    MLP,
    MULTIHEAD_SEQUENCE,
    SEQUENCE,
    SHARED,
    TRANSFORMER,
    ModelCase,
)

BOUND = 1e-8
WIDTH = sum(p.numel() for p in CONV2D.build().parameters())
OF_ANY_LAYER = (
    "direct",
    "arnoldi",
    "ekfac with a diagonal",
    "inverse harmonic mean",
    "trak",
    "grad-dot",
    "tracin",
)
"""Methods that are compared on models with layers which hooks do not see."""
MORE_MODELS: dict[str, Any] = {
    "ekfac with a diagonal": lambda case: EkfacInfluence(
        case.model(), True, 0.1, loss=case.loss, unsupported="diagonal"
    ),
    "cg with jacobi": lambda case: CgInfluence(
        case.model(), case.loss, **FISHER, rtol=1e-12, atol=0.0, preconditioner=JacobiPreconditioner()
    ),
    "cg with nystroem": lambda case: CgInfluence(
        case.model(), case.loss, **FISHER, rtol=1e-12, atol=0.0, preconditioner=NystroemPreconditioner(4)
    ),
    "cg of the hessian": lambda case: CgInfluence(case.model(), case.loss, 1.0, 1e-12, 0.0),
}
ALL_MODELS = {**MODELS, **MORE_MODELS}
READING_THEIR_DATA = ("cg", "lissa in parts", "inverse harmonic mean")
"""Methods that read the training set whenever they solve, and are not fitted on workers."""
CAPTURED = (MLP, CONV1D, CONV2D, CONV3D, SEQUENCE)
OTHERS = (SHARED, TRANSFORMER, ATTENTION, MULTIHEAD_SEQUENCE)
EVERYTHING = [
    *((name, case) for name in ALL_MODELS for case in CAPTURED),
    *((name, case) for name in OF_ANY_LAYER for case in OTHERS),
]


def near(found: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    assert found.device.type == "cuda"
    there = found.double().cpu()
    assert there.shape == expected.shape
    assert (there - expected).norm() <= bound * expected.norm()


def fitted(name: str, case: ModelCase, device: str) -> Any:
    torch.manual_seed(5)  # checkpoints are models as they start
    return ALL_MODELS[name](case).to(device).fit(batches(*case.train(), 6))


@pytest.mark.parametrize(("name", "case"), EVERYTHING, ids=str)
def test_influences_are_those_of_a_processor(name: str, case: ModelCase) -> None:
    """Fitted where they are asked, or moved there or away after the fit."""
    here, there = fitted(name, case, "cpu"), fitted(name, case, "cuda")
    modes = [InfluenceMode.Up, *([] if case.vocabulary else [InfluenceMode.Perturbation])]
    asked = [(*case.test(), *case.train(), mode) for mode in modes]
    expected = [here.influences(*each) for each in asked]
    for each, numbers in zip(asked, expected):
        near(there.influences(*each), numbers)
        near(here.to("cuda").influences(*each), numbers)
        assert here.device.type == "cuda"
        back = there.to("cpu").influences(*each)
        assert back.device.type == "cpu"
        near(back.cuda(), numbers)
        here.to("cpu")
        there.to("cuda")


@pytest.mark.parametrize("name", MODELS)
def test_everything_else_that_a_model_answers(name: str) -> None:
    case = CONV2D
    here, there = fitted(name, case, "cpu"), fitted(name, case, "cuda")
    train, test = case.train(), case.test()
    near(there.self_influences(*train), here.self_influences(*train))
    factors = here.influence_factors(*test)
    near(there.influence_factors(*test), factors)
    near(
        there.influences_from_factors(there.influence_factors(*test), *train),
        here.influences_from_factors(factors, *train),
    )


@pytest.mark.parametrize("name", ["ekfac", "direct", "logra"])
def test_influences_by_token(name: str) -> None:
    case = SEQUENCE
    loss: Callable[[Tensor, Tensor], Tensor] = lambda out, y: F.cross_entropy(out.mT, y, reduction="sum")  # noqa: E731
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    (x, _), (x_test, _) = case.train(), case.test()
    y, y_test = torch.randint(3, x.shape[:2]), torch.randint(3, x_test.shape[:2])
    own = ModelCase("tokens", lambda: model, loss, (3, 4), 3)
    found = []
    for device in ("cpu", "cuda"):
        made = ALL_MODELS[name](_Given(own, model)).to(device).fit(batches(x, y, 6))
        found.append(made.influences_by_token(x_test, y_test, x, y))
    near(found[1], found[0])


class _Given:
    """A case whose model is not trained first."""

    def __init__(self, case: ModelCase, model: nn.Module) -> None:
        self.loss, self._model = case.loss, model

    def model(self) -> nn.Module:
        return self._model.cpu()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as made,
    ):
        yield made


@pytest.mark.parametrize("name", MODELS)
def test_both_calculators(name: str, client: Client) -> None:
    """Workers that share the GPU; what they return is numpy."""
    case = CONV2D
    expected = fitted(name, case, "cpu").influences(*case.test(), *case.train()).numpy()
    there = fitted(name, case, "cuda")
    converter = TorchNumpyConverter(device="cuda")
    dask = DaskInfluenceCalculator(there, converter, client)
    found = dask.influences(*arrays(*case.test(), 3), *arrays(*case.train(), 5)).compute()
    one = SequentialInfluenceCalculator(there)
    in_turn = one.influences(batches(*case.test(), 3), batches(*case.train(), 5))
    for values in (found, in_turn.compute(NestedTorchCatAggregator()).cpu().numpy()):
        assert np.linalg.norm(values - expected) <= BOUND * np.linalg.norm(expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in READING_THEIR_DATA])
def test_fits_on_workers(name: str, client: Client) -> None:
    """Sums travel as numpy; the fitted model is on the GPU."""
    case = CONV2D
    expected = fitted(name, case, "cpu").influences(*case.test(), *case.train())
    torch.manual_seed(5)
    model = MODELS[name](case).to("cuda")
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(device="cuda"), client)
    calculator.fit(*arrays(*case.train(), 5))
    near(model.influences(*case.test(), *case.train()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ekfac", "grad-dot", "logra", "cg", "trak"])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    """Of an image model whose gradients have thousands of entries."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 5)]
    model = nn.Sequential(*layers).double().eval()
    case = ModelCase("images", lambda: model, F.cross_entropy, (3, 8, 8), 5)
    exact = ALL_MODELS[name](_Given(case, model)).fit(batches(*case.train(), 6))
    expected = exact.influences(*case.test(), *case.train())
    rough = ALL_MODELS[name](_Given(case, model.to(dtype))).to("cuda")
    (x, y), (x_test, y_test) = case.train(), case.test()
    rough.fit(batches(x.to(dtype), y, 6))
    found = rough.influences(x_test.to(dtype), y_test, x.to(dtype), y).double().cpu()
    if dtype is torch.float32:
        assert (found - expected).norm() <= 1e-3 * expected.norm()
    else:
        assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] >= 0.95


@pytest.mark.parametrize("build", [lm.bert, lm.bert_with_adapters], ids=["bert", "adapters"])
@pytest.mark.parametrize("name", ["direct", "ekfac with a diagonal", "grad-dot", "trak"])
def test_language_models(name: str, build: Callable[[], nn.Module]) -> None:
    """Ids and masks, of a model that answers objects."""
    loss = F.cross_entropy
    found = []
    for device in ("cpu", "cuda"):
        case = ModelCase("bert", build, loss, (), None)
        model = ALL_MODELS[name](_Given(case, lm.Packed(build()).double().eval())).to(device)
        train, test = lm.packed(lm.sentences(24, 1)), lm.packed(lm.sentences(6, 2))
        found.append(model.fit(batches(*train, 8)).influences(*test, *train))
    near(found[1], found[0], 1e-7)


def test_second_order_modes() -> None:
    """A Hessian, an empirical Fisher and a Gauss-Newton matrix by conjugate gradients."""
    case = CONV2D
    for mode in SecondOrderMode:
        found = []
        for device in ("cpu", "cuda"):
            model = CgInfluence(case.model(), case.loss, 1.0, 1e-12, 0.0, second_order_mode=mode).to(device)
            found.append(model.fit(batches(*case.train(), 6)).influences(*case.test(), *case.train()))
        near(found[1], found[0])


def test_operators_and_functions_of_parameters() -> None:
    """The building blocks, made of a model and rows that are on the GPU."""
    case, found = CONV2D, []
    rows = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for device in ("cpu", "cuda"):
        model, data, own = case.model().to(device), batches(*case.train(), 6), rows.to(device)
        curvature = GaussNewtonOperator(model, case.loss, data)
        solved = CgOperator(curvature, 0.1, rtol=1e-12, atol=0.0, use_block_cg=True)
        dense = curvature.apply(torch.eye(WIDTH, dtype=torch.float64, device=device))
        sketch = functional.randomized_nystroem_approximation(
            dense, WIDTH, 20, torch.float64, mat_vec_device=own.device
        )
        found.append(
            [
                curvature.apply(own),
                solved.apply(own),
                HessianOperator(model, case.loss, data).apply(own),
                functional.hessian(model, case.loss, data),
                sketch.projections @ torch.diag(sketch.eigen_vals) @ sketch.projections.mT,
            ]
        )
    for there, here in zip(found[1], found[0]):
        near(there, here)
