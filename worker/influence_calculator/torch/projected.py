"""TRAK and LoGra: influences in a random projection of the gradients, of all together or layer by layer."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from influence_calculator.maths.blocks import Regularization
from influence_calculator.maths.logra import Logra
from influence_calculator.maths.trak import Trak
from influence_calculator.torch.base import GivenRegularization, regularization_of
from influence_calculator.torch.blockwise import TorchBlockwiseInfluence
from influence_calculator.torch.util import LossType


class TrakInfluence(TorchBlockwiseInfluence):
    """Solves with the empirical Fisher matrix of gradients that a random projection made k numbers long.

    One pass to fit, `k²` memory. TRAK's estimate (Park et al. 2023) with the loss's gradients on both sides,
    for one model. With k of at least the number of parameters nothing is projected, and the answer is that of
    `DirectInfluence` with the empirical Fisher matrix.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        regularization: λ, added to the diagonal of the projected matrix, whose trace is about that of the
            matrix itself.
        rank: k, columns of the projection.
        seed: of the projection, which depends on nothing else.
    """

    method: Trak

    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        regularization: GivenRegularization,
        rank: int,
        seed: int = 0,
    ) -> None:
        super().__init__(model, loss, Trak(regularization_of(regularization), rank, seed))

    def _regularized(self, regularization: Regularization) -> Trak:
        return replace(self.method, regularization=regularization)


class LograInfluence(TorchBlockwiseInfluence):
    """Solves with the empirical Fisher matrices of layers' gradients that are projected on both sides.

    LoGra's estimate (Choe et al. 2024) in random projections: of the gradient G of each Linear or
    convolutional layer `P_outᵀ G P_in` is formed, `rank` × `rank` numbers, from what the layer saw, token by
    token and without G. Other parameters are projected to `rank²` numbers as `TrakInfluence` projects them,
    one block per module. One pass to fit, `rank⁴` memory per layer. Scores are computed in the projection;
    factors have a column per parameter.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        regularization: λ, added to the diagonal of each projected matrix, whose trace is about that of the
            matrix itself: one number, one per module, or `Relative(0.1)`, a usual start.
        rank: k, columns of the projection of each side. A side with no more is taken as it is.
        seed: of the projections, which depend on nothing else but the names and sizes of layers.
    """

    method: Logra

    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        regularization: GivenRegularization,
        rank: int,
        seed: int = 0,
    ) -> None:
        super().__init__(model, loss, Logra(regularization_of(regularization), rank, seed).narrow())

    def _regularized(self, regularization: Regularization) -> Logra:
        return replace(self.method, regularization=regularization)
