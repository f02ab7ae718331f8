"""A loss without a curvature is told of, whatever method would divide gradients by λ in its place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator import (
    ArnoldiInfluence,
    BlockMode,
    DirectInfluence,
    NystroemSketchInfluence,
    SecondOrderMode,
    SolverWarning,
)
from influence_calculator.maths.blocks import BlockStructure
from influence_calculator.maths.flat import FLAT
from influence_calculator.torch.base import TorchInfluenceFunctionModel

N, λ = 12, 0.1
GAUSS_NEWTON = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
Made = Callable[..., TorchInfluenceFunctionModel]
METHODS: dict[str, Made] = {
    "direct": DirectInfluence,
    "arnoldi": lambda *given, **own: ArnoldiInfluence(*given, rank=2, use_woodbury=True, **own),
    "nystroem": lambda *given, **own: NystroemSketchInfluence(*given, rank=2, **own),
}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(N, width, generator=generator, dtype=torch.float64) for width in (4, 2))
    return x, y


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def told(method: Made, loss: Any, **options: Any) -> int:
    """How often, by a fit and by influences."""
    x, y = data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SolverWarning)
        method(network(), loss, regularization=λ, **options).fit([(x, y)]).influences(x, y, x, y)
    return sum(str(one.message) == FLAT for one in caught)


@pytest.mark.parametrize("blocks", [BlockMode.FULL, BlockMode.LAYER_WISE])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_without_curvature_is_told(method: str, blocks: BlockStructure) -> None:
    made, own = METHODS[method], {"second_order_mode": GAUSS_NEWTON, "block_structure": blocks}
    assert told(made, F.l1_loss, **own) == 1
    assert told(made, F.mse_loss, **own) == 0
    own["second_order_mode"] = SecondOrderMode.EMPIRICAL_FISHER
    assert told(made, F.l1_loss, **own) == 0


def test_a_block_that_is_flat_beside_others_is_not_told_of() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.zero_()  # type: ignore[union-attr,operator]
    x, y = data()
    influence = DirectInfluence(
        model, F.mse_loss, λ, block_structure=BlockMode.LAYER_WISE, second_order_mode=GAUSS_NEWTON
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", SolverWarning)
        influence.fit([(x, y)]).influences(x, y)


def test_a_hessian_that_is_negative_everywhere_is_not_flat() -> None:
    """Nyström's sketch takes its eigenvalues for 0, and says that they are negative."""
    x, y = data()
    model = nn.Linear(4, 2, bias=False).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SolverWarning)
        NystroemSketchInfluence(model, lambda f, y: -F.mse_loss(f, y), λ, rank=4).fit([(x, y)])
    said = [str(one.message) for one in caught]
    assert said
    assert FLAT not in said
