"""LiSSA and DataInf with pyDVL's constructors: both go over the training set while they solve."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from influence_calculator.maths import curvature
from influence_calculator.maths.blocks import Regularization
from influence_calculator.maths.inverse_harmonic_mean import InverseHarmonicMean
from influence_calculator.maths.lissa import Lissa
from influence_calculator.torch.base import (
    GivenBlocks,
    GivenRegularization,
    regularization_of,
)
from influence_calculator.torch.blockwise import TorchBlockwiseInfluence
from influence_calculator.torch.ignored import SEE_REPORT, warn_of_no_effect
from influence_calculator.torch.renamed import accepts_old_names
from influence_calculator.torch.util import BlockMode, LossType, SecondOrderMode, second_order_of


class LissaInfluence(TorchBlockwiseInfluence):
    """Solves by LiSSA: `h ← g + (1 − dampen) h − (H + λI) h / scale`, answering `h / scale`.

    Needs a positive `H + λI` and a scale above half of its largest eigenvalue; where either fails, a
    `SolverWarning` names the λ or the scale that does, and what grows ends as `NOT_FINITE` with NaN.
    `CgInfluence` answers the same in fewer passes over the training data, and needs no scale.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        regularization: λ, added to the curvature's diagonal; one number, or one per block.
        maxiter: steps per right-hand side.
        dampen: adds `dampen · scale` to the curvature's diagonal.
        scale: the smaller, the faster, as long as it is above half of the largest eigenvalue.
        rtol: a right-hand side b has converged when `‖r‖ ≤ max(rtol ‖b‖, atol)`.
        progress: kept for pyDVL's signature; iterations are in `solver_report`.
        warn_on_max_iteration: a `SolverWarning` counts the right-hand sides that did not converge.
        block_structure: which parameters are solved together.
        second_order_mode: which matrix stands for the curvature.
        atol: as above; 0 keeps influences linear.
        batch_size: training examples per step, drawn at random; default: all, which makes steps exact.
            Steps of a few cost less and leave noise in the answer, less of it the larger `scale` is.
        seed: of the draws, which are the same for every right-hand side.
    """

    method: Lissa

    @accepts_old_names("hessian_regularization")
    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        regularization: GivenRegularization = None,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: float = 10.0,
        rtol: float = 1e-4,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
        block_structure: GivenBlocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | curvature.SecondOrderMode = SecondOrderMode.HESSIAN,
        *,
        atol: float = 0.0,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        warn_of_no_effect(SEE_REPORT, progress=progress)
        method = Lissa(
            regularization=regularization_of(regularization),
            maxiter=maxiter,
            dampen=dampen,
            scale=scale,
            rtol=rtol,
            atol=atol,
            batch_size=batch_size,
            seed=seed,
            blocks=block_structure,
            second_order=second_order_of(second_order_mode),
        )
        super().__init__(model, loss, method, warn_on_max_iteration)

    def _regularized(self, regularization: Regularization) -> Lissa:
        return replace(self.method, regularization=regularization)


class InverseHarmonicMeanInfluence(TorchBlockwiseInfluence):
    """DataInf: `(1/N) Σ_i (g_i g_iᵀ + λI)^-1` of each block in place of the inverse of the mean.

    Nothing iterates: solving differentiates the training set once for all test examples.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        regularization: λ > 0; one number, one per block, or `Relative` to the mean of `‖g‖² / P_b`.
        block_structure: which parameters are solved together.

    Raises:
        ValueError: a regularization that is not above 0.
    """

    method: InverseHarmonicMean

    @accepts_old_names("hessian_regularization")
    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        regularization: GivenRegularization,
        block_structure: GivenBlocks = BlockMode.FULL,
    ) -> None:
        super().__init__(model, loss, InverseHarmonicMean(regularization_of(regularization), block_structure))

    def _regularized(self, regularization: Regularization) -> InverseHarmonicMean:
        return replace(self.method, regularization=regularization)
