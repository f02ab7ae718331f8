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
    CgInfluence,
    DirectInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
    SecondOrderMode,
    SolverWarning,
)
from influence_calculator.maths.blocks import BlockStructure
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.curvature import SecondOrderMode as Mode
from influence_calculator.maths.flat import FLAT
from influence_calculator.maths.method import SETTLED, PassesFitted, fit
from influence_calculator.maths.objective import xy_objective
from influence_calculator.torch.base import TorchInfluenceFunctionModel
from training_sets import TrainingSet

N, λ = 12, 0.1
GAUSS_NEWTON = SecondOrderMode.GENERALIZED_GAUSS_NEWTON
Made = Callable[..., TorchInfluenceFunctionModel]
METHODS: dict[str, Made] = {
    "direct": DirectInfluence,
    "cg": CgInfluence,
    "cg, one by one": lambda *given, **own: CgInfluence(*given, solve_simultaneously=False, **own),
    "lissa": lambda *given, **own: LissaInfluence(*given, scale=1.0, **own),
    "lissa by parts": lambda *given, **own: LissaInfluence(*given, scale=1.0, batch_size=4, **own),
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
    for made in (DirectInfluence, CgInfluence):
        influence = made(
            model, F.mse_loss, λ, block_structure=BlockMode.LAYER_WISE, second_order_mode=GAUSS_NEWTON
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", SolverWarning)
            influence.fit([(x, y)]).influences(x, y)


@pytest.mark.parametrize("loss", [F.l1_loss, F.mse_loss])
def test_solves_by_passes_tell_it_too(loss: Any) -> None:
    objective, batch = xy_objective(network(), loss), data()
    training = TrainingSet(batch, 5)
    method = Cg(
        λ, blocks=BlockMode.LAYER_WISE, second_order=Mode.GENERALIZED_GAUSS_NEWTON, solves_by_passes=True
    )
    fitted = method.fitted(objective, fit(method, objective, training), training)
    assert isinstance(fitted, PassesFitted)
    gradients = fitted.gradients(objective, batch)
    state = {"0": fitted.begun(gradients)}
    number = 0
    while not all(bool(unit[SETTLED]) for unit in state[str(number)].values()):
        step = fitted.solving_pass(str(number + 1), str(number))
        sums = step.accumulate(objective, training.batches(), state)
        state[step.name] = {unit: step.finish(unit, sums[unit], N, state) for unit in step.units(objective)}
        number += 1
    ended = fitted.solved(state[str(number)])
    assert ended.report.notes == ((FLAT,) if loss is F.l1_loss else ())
    assert fitted.solve(gradients).report.notes == ended.report.notes
