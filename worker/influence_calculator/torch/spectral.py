"""The influence models that know the curvature by a few directions, with pyDVL's names and arguments."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from influence_calculator.maths import curvature
from influence_calculator.maths.arnoldi import Arnoldi
from influence_calculator.maths.blocks import Regularization
from influence_calculator.maths.nystroem_sketch import NystroemSketch
from influence_calculator.torch.base import (
    GivenBlocks,
    GivenRegularization,
    regularization_of,
)
from influence_calculator.torch.blockwise import TorchBlockwiseInfluence
from influence_calculator.torch.ignored import warn_of_no_effect
from influence_calculator.torch.renamed import accepts_old_names
from influence_calculator.torch.util import BlockMode, LossType, SecondOrderMode, second_order_of


class ArnoldiInfluence(TorchBlockwiseInfluence):
    """Solves with the eigenpairs of largest modulus of each block's curvature, found by products with it.

    A fit whose eigenpairs have not converged says so in a `SolverWarning`, and in `solver_report` for every
    right-hand side.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        regularization: λ, added to the curvature's diagonal; one number, or one per block.
        rank: eigenpairs per block; a block hardly wider than `krylov_dimension` is taken as a whole.
        krylov_dimension: rows that the search keeps, more than the rank; default `max(2 rank + 1, 20)`.
        tol: an eigenpair has converged at `‖H v − θ v‖ ≤ tol |θ|`.
        max_iter: restarts of the search at most; default 30.
        eigen_computation_on_gpu: kept for pyDVL's signature; the search runs where the model is.
        block_structure: which parameters are solved together.
        second_order_mode: which matrix stands for the curvature.
        use_woodbury: add `(1/λ)(I − V Vᵀ) g`, the part outside of the eigenvectors V; needs λ > 0. False,
            pyDVL's default, counts that part as 0.
        seed: of the rows that the search starts from.
    """

    method: Arnoldi

    @accepts_old_names("hessian_regularization", "rank_estimate")
    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        regularization: GivenRegularization = None,
        rank: int = 10,
        krylov_dimension: int | None = None,
        tol: float = 1e-6,
        max_iter: int | None = None,
        eigen_computation_on_gpu: bool = False,
        block_structure: GivenBlocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | curvature.SecondOrderMode = SecondOrderMode.HESSIAN,
        use_woodbury: bool = False,
        seed: int = 0,
    ) -> None:
        where = "the search runs where the model is"
        warn_of_no_effect(where, eigen_computation_on_gpu=eigen_computation_on_gpu)
        method = Arnoldi(
            regularization_of(regularization),
            rank,
            krylov_dimension,
            tol,
            max_iter,
            complement=use_woodbury,
            blocks=block_structure,
            second_order=second_order_of(second_order_mode),
            seed=seed,
        )
        super().__init__(model, loss, method, warn_on_max_iteration=False)

    def _regularized(self, regularization: Regularization) -> Arnoldi:
        return replace(self.method, regularization=regularization)


class NystroemSketchInfluence(TorchBlockwiseInfluence):
    """Solves with `HΩ (ΩᵀHΩ)^+ ΩᵀH + λI` in place of each block's curvature, for a seeded random Ω.

    Meant for a positive curvature: what is negative counts as 0. With a Hessian, `fit` also looks for its
    smallest eigenvalue: a negative one is told in a `SolverWarning`, and one below -λ in `solver_report` for
    every right-hand side.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        loss: `loss(model(x), y)`; its reduction over a batch does not matter.
        regularization: λ > 0, added to the curvature's diagonal; one number, or one per block.
        rank: columns of Ω; with as many as a block has parameters the solve is exact, if no
            eigenvalue is negative.
        block_structure: which parameters are solved together.
        second_order_mode: which matrix stands for the curvature.
        seed: of Ω.
    """

    method: NystroemSketch

    @accepts_old_names("hessian_regularization", "rank_estimate")
    def __init__(
        self,
        model: nn.Module,
        loss: LossType,
        regularization: GivenRegularization,
        rank: int,
        block_structure: GivenBlocks = BlockMode.FULL,
        second_order_mode: SecondOrderMode | curvature.SecondOrderMode = SecondOrderMode.HESSIAN,
        seed: int = 0,
    ) -> None:
        method = NystroemSketch(
            regularization_of(regularization),
            rank,
            block_structure,
            second_order_of(second_order_mode),
            seed,
        )
        super().__init__(model, loss, method, warn_on_max_iteration=False)

    def _regularized(self, regularization: Regularization) -> NystroemSketch:
        return replace(self.method, regularization=regularization)
