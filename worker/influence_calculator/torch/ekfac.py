"""EK-FAC with pyDVL's constructor, for any loss, and for convolutions and embeddings too."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator.errors import NotImplementedLayerRepresentationException
from influence_calculator.maths.blocks import Regularization
from influence_calculator.maths.ekfac import Ekfac, Unsupported
from influence_calculator.maths.ekfac_passes import uncaptured_blocks
from influence_calculator.maths.expectation import Expectation
from influence_calculator.maths.own_modes import own_modes
from influence_calculator.torch.base import regularization_of
from influence_calculator.torch.blockwise import TorchBlockwiseInfluence
from influence_calculator.torch.user_warnings import warn_user
from influence_calculator.torch.util import LossType
from influence_calculator.types import InfluenceMode


class EkfacInfluence(TorchBlockwiseInfluence):
    """Solves with the eigenvalue-corrected Kronecker approximation of the Gauss-Newton matrix, layer by
    layer, for Linear and Conv1d, Conv2d, Conv3d, with or without bias, Embedding, and Hugging Face's Conv1D,
    called once or more often.

    Args:
        model: in eval mode; parameters that do not require grad are not tracked.
        update_diagonal: fit the eigenvalue correction (EK-FAC); pyDVL's default leaves it out (KFAC).
        hessian_regularization: λ, added to the eigenvalues; one number, or one per layer.
        progress: kept for pyDVL's signature, without effect.
        loss: `loss(model(x), y)`; pyDVL knows cross-entropy only.
        regularization: another name of `hessian_regularization`.
        expectation: over which outputs the curvature is taken: `sampled` (a backward pass per sample, of
            `B ε` with `B Bᵀ = ∇²_f ℓ` and random signs ε), `exact` (a backward pass per output) or
            `empirical` (the true labels).
        samples: draws of ε per example when sampled.
        seed: of the draws, which do not depend on the batching.
        unsupported: other layers with tracked parameters are refused, treated by a `diagonal`, or
            excluded (`exclude`: they contribute 0).

    Raises:
        NotImplementedLayerRepresentationException: layers that are refused, by name.
        UnsupportedModelError: when `fit` begins, an embedding whose weight is used by hand too, as a head
            that multiplies by it does; `unsupported` decides of it as of other layers.
    """

    method: Ekfac

    def __init__(
        self,
        model: nn.Module,
        update_diagonal: bool = False,
        hessian_regularization: Regularization | Mapping[str, float | None] = 0.0,
        progress: bool = False,
        loss: LossType = F.cross_entropy,
        *,
        regularization: Regularization | Mapping[str, float | None] | None = None,
        expectation: Expectation | str = Expectation.SAMPLED,
        samples: int = 1,
        seed: int = 0,
        unsupported: Unsupported | str = Unsupported.REFUSE,
    ) -> None:
        if progress:
            warn_user("progress has no effect", UserWarning)
        if regularization is not None and hessian_regularization != 0.0:
            raise TypeError(
                "regularization: expected one of regularization and hessian_regularization, got both"
            )
        λ = hessian_regularization if regularization is None else regularization
        method = Ekfac(
            regularization=regularization_of(λ),
            update_diagonal=update_diagonal,
            expectation=expectation,
            samples=samples,
            seed=seed,
            unsupported=unsupported,
        )
        super().__init__(model, loss, method)
        untreated = uncaptured_blocks(self.objective)
        if untreated and Unsupported(unsupported) is Unsupported.REFUSE:
            raise NotImplementedLayerRepresentationException(", ".join(untreated))

    def _regularized(self, regularization: Regularization) -> Ekfac:
        return replace(self.method, regularization=regularization)

    def influence_factors_by_layer(self, x: Tensor, y: Tensor) -> OrderedDict[str, Tensor]:
        """Factors `[t, P_layer]` of each layer; layers are this model's blocks."""
        return self.influence_factors_by_block(x, y)

    def influences_by_layer(
        self,
        x_test: Tensor,
        y_test: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> OrderedDict[str, Tensor]:
        """Each layer's part of `influences`."""
        return self.influences_by_block(x_test, y_test, x, y, mode)

    def influences_from_factors_by_layer(
        self,
        z_test_factors: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> OrderedDict[str, Tensor]:
        """Each layer's influences, from its factors."""
        return self.influences_from_factors_by_block(z_test_factors, x, y, mode)

    @own_modes()
    def explore_hessian_regularization(
        self, x: Tensor, y: Tensor, regularization_values: Iterable[float]
    ) -> dict[float, OrderedDict[str, Tensor]]:
        """λ -> layer -> influences of the examples on each other, `[n, n]`, differentiating once.

        This model keeps its own λ.

        Raises:
            NotFittedException: `fit` has not run.
        """
        fitted, gradients = self._require_fitted(), self._gradients(x, y)
        explored = {}
        for λ in regularization_values:
            left = self._fitted_at(λ).solve(gradients).left
            explored[λ] = OrderedDict(
                (block, left[block] @ gradients[block].T) for block in fitted.layout.blocks
            )
        return explored
