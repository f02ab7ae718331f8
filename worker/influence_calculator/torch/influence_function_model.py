"""The influence models for torch, with pyDVL's names and constructor arguments.

All of them answer with shapes, sign and scale of `InfluenceFunctionModel`: factors
`z = (H + λI)^-1 g`, `[n, P]`; influences `z_test · g_train`, `[t, n]`, positive where the training
example helps, not divided by N.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from influence_calculator.maths import curvature
from influence_calculator.maths.blocks import Regularization
from influence_calculator.maths.cg import Cg
from influence_calculator.maths.direct import Direct
from influence_calculator.torch.base import (
    GivenBlocks,
    GivenRegularization,
    TorchInfluenceFunctionModel,
    regularization_of,
)
from influence_calculator.torch.blockwise import TorchBlockwiseInfluence
from influence_calculator.torch.ekfac import EkfacInfluence
from influence_calculator.torch.ignored import SEE_REPORT, warn_of_no_effect
from influence_calculator.torch.preconditioner import Preconditioner
from influence_calculator.torch.renamed import accepts_old_names
from influence_calculator.torch.spectral import ArnoldiInfluence, NystroemSketchInfluence
from influence_calculator.torch.training_passes import InverseHarmonicMeanInfluence, LissaInfluence
from influence_calculator.torch.util import BlockMode, LossType, SecondOrderMode, second_order_of

__all__ = [
    "ArnoldiInfluence",
    "CgInfluence",
    "DirectInfluence",
    "EkfacInfluence",
    "InverseHarmonicMeanInfluence",
    "LissaInfluence",
    "NystroemSketchInfluence",
    "TorchInfluenceFunctionModel",
]


class DirectInfluence(TorchBlockwiseInfluence):
    """Solves with the dense curvature matrix of each block, factorized once: exact, `P_b²` memory.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        regularization: λ, added to the curvature's diagonal; one number, or one per block.
        block_structure: which parameters are solved together.
        second_order_mode: which matrix stands for the curvature.
    """

    method: Direct

    @accepts_old_names("hessian_regularization")
    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        regularization: GivenRegularization = None,
        block_structure: GivenBlocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | curvature.SecondOrderMode = SecondOrderMode.HESSIAN,
    ) -> None:
        method = Direct(
            regularization_of(regularization), block_structure, second_order_of(second_order_mode)
        )
        super().__init__(model, loss, method)

    def _regularized(self, regularization: Regularization) -> Direct:
        return replace(self.method, regularization=regularization)


class CgInfluence(TorchBlockwiseInfluence):
    """Solves by conjugate gradients, with products of the curvature and never the matrix itself.

    How each right-hand side ended is in `solver_report` after `influence_factors`, and in what `solve`
    returns. An indefinite Hessian shows there; a larger λ or another second-order mode cures it.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        regularization: λ, added to the curvature's diagonal; one number, or one per block.
        rtol: a right-hand side b has converged when `‖r‖ ≤ max(rtol ‖b‖, atol)`.
        atol: as above. pyDVL's default 1e-6 answers 0 for confident examples; 0 keeps influences linear.
        maxiter: iterations per right-hand side; default: 10 per parameter, at most 5000.
        progress: kept for pyDVL's signature; iterations are in `solver_report`.
        precompute_grad: kept for pyDVL's signature, without effect.
        preconditioner: Jacobi or Nyström; fitted by `fit`.
        solve_simultaneously: all right-hand sides in one product per iteration: faster, same numbers.
        warn_on_max_iteration: a `SolverWarning` counts the right-hand sides that did not converge.
        block_structure: which parameters are solved together.
        second_order_mode: which matrix stands for the curvature.
    """

    method: Cg

    @accepts_old_names("hessian_regularization", "use_block_cg", "pre_conditioner")
    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        regularization: GivenRegularization = None,
        rtol: float = 1e-4,
        atol: float = 1e-6,
        maxiter: int | None = None,
        progress: bool = False,
        precompute_grad: bool = False,
        preconditioner: Preconditioner | None = None,
        solve_simultaneously: bool = False,
        warn_on_max_iteration: bool = True,
        block_structure: GivenBlocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | curvature.SecondOrderMode = SecondOrderMode.HESSIAN,
    ) -> None:
        warn_of_no_effect(SEE_REPORT, progress=progress, precompute_grad=precompute_grad)
        method = Cg(
            regularization=regularization_of(regularization),
            rtol=rtol,
            atol=atol,
            maxiter=maxiter,
            simultaneous=solve_simultaneously,
            preconditioner=preconditioner,
            blocks=block_structure,
            second_order=second_order_of(second_order_mode),
        )
        super().__init__(model, loss, method, warn_on_max_iteration)

    def _regularized(self, regularization: Regularization) -> Cg:
        return replace(self.method, regularization=regularization)
