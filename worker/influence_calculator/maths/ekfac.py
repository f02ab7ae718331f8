"""EK-FAC: the Gauss-Newton matrix of each layer, diagonal in the eigenbasis of two small covariances.

    A = (1/NS) Σ ã ãᵀ      G = (1/N) Σ E[g gᵀ]      over examples and tokens, ã = [a, 1] with a bias
    Λ = (1/N) Σ_n E[(Q_Gᵀ (Σ_s g ãᵀ) Q_A)²]          per example, tokens summed before squaring
    (H + λI)^-1 V = Q_G ( (Q_Gᵀ V Q_A) / (Λ + λ) ) Q_Aᵀ

Two passes over the training data: `covariance` leaves the eigenvectors and eigenvalues of A and G,
`correction` the eigenvalues Λ. Without the second, `Λ = λ_G λ_Aᵀ` (KFAC).

A convolution with k groups is k layers side by side, each with an A and a G of its own: the curvature is
block-diagonal over them, as the groups share neither inputs nor rows of the weight. An embedding's inputs
are one-hot and never formed: A is the diagonal of its tokens' frequencies, and Q_A the identity. With V rows
of o columns it leaves V + o² numbers of the first pass and V·o of the second, and takes V·o per row of a left
representation, as any layer of as many parameters does.

Shapes: N training examples, S tokens per example, i inputs, o outputs, j = i + 1 with a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.blocks import (
    Regularization,
    block_regularization,
    check_coverage,
    checked_regularization,
)
from influence_calculator.maths.capture import supported_layers
from influence_calculator.maths.ekfac_fitted import EkfacFitted
from influence_calculator.maths.ekfac_footprint import ekfac_footprint
from influence_calculator.maths.ekfac_passes import (
    CORRECTION,
    COVARIANCE,
    CorrectionPass,
    CovariancePass,
    KeptCaptures,
    basis_of,
    matrix_shape,
    output_basis_of,
    scored_by_parameter,
    side_shapes,
    uncaptured_blocks,
)
from influence_calculator.maths.embeddings import EmbeddingRows
from influence_calculator.maths.errors import UnsupportedModelError
from influence_calculator.maths.expectation import Expectation, OutputExpectation
from influence_calculator.maths.gradient_methods import fitted_tensor
from influence_calculator.maths.kronecker import DiagonalSolver, LayerRows
from influence_calculator.maths.layers import EmbeddingSpec, LayerSpec, described, supported_embeddings
from influence_calculator.maths.layout import Layout
from influence_calculator.maths.memory_format import laid_out
from influence_calculator.maths.method import FitPass, FitState, Fitted, Footprint, Method
from influence_calculator.maths.objective import Batch, Objective, TrainingData
from influence_calculator.maths.shapes import ModelShapes
from influence_calculator.maths.singularity import rounding_of_products
from influence_calculator.maths.traced_gradients import used_by_hand

FLAT = (
    "EK-FAC's curvature is 0 in every layer, so that influences are products of gradients divided by λ: the "
    "loss has no second derivative by the model's outputs, as mean absolute error has none (take expectation "
    "empirical, the Fisher matrix at the true labels), or no training example has a gradient"
)


class Unsupported(StrEnum):
    """What becomes of tracked parameters of layers that EK-FAC cannot treat."""

    REFUSE = "refuse"
    """An error that names them."""
    DIAGONAL = "diagonal"
    """`Λ = (1/N) Σ E[g²]`, one block per module."""
    EXCLUDE = "exclude"
    """They have no place in the layout and contribute 0."""


@dataclass(frozen=True)
class Ekfac(Method):
    """Gauss-Newton influence with one block per layer, named as the module."""

    regularization: Regularization | None = 0.0
    """λ ≥ 0: a number, one per layer, or `Relative(c)`. None is 0."""
    update_diagonal: bool = True
    """Whether a second pass corrects the eigenvalues (EK-FAC); else KFAC's products are taken."""
    expectation: Expectation | str = Expectation.SAMPLED
    samples: int = 1
    """Draws per training example, at least 1; sampled only."""
    seed: int = 0
    """Of the draws."""
    unsupported: Unsupported | str = Unsupported.REFUSE

    needs_data = False

    def __post_init__(self) -> None:
        checked_regularization(self.regularization)
        _refuse_other("expectation", Expectation, self.expectation)
        _refuse_other("unsupported", Unsupported, self.unsupported)
        if self.samples < 1:
            raise ValueError(f"samples: expected at least 1, got {self.samples}; 1 is the usual choice")

    @override
    def looked_at(self, objective: Objective, first: Callable[[], Batch]) -> Objective:
        untouched = laid_out(objective, first)
        embeddings = supported_embeddings(untouched)
        if not embeddings:
            return untouched
        by_hand = used_by_hand(untouched, first(), embeddings)
        seen = replace(untouched, by_hand=(*untouched.by_hand, *by_hand))
        self.layout(seen)
        return seen

    def layout(self, objective: Objective) -> Layout:
        block_of = {name: layer.name for layer in supported_layers(objective) for name in layer.parameters}
        block_of |= {spec.weight: spec.name for spec in supported_embeddings(objective)}
        for block, names in uncaptured_blocks(objective).items():
            match Unsupported(self.unsupported):
                case Unsupported.REFUSE:
                    raise _refused(objective)
                case Unsupported.DIAGONAL:
                    block_of |= dict.fromkeys(names, block)
                case Unsupported.EXCLUDE:
                    pass
        structure: dict[str, tuple[str, ...]] = {}
        for name in objective.names:
            if name in block_of:
                structure[block_of[name]] = (*structure.get(block_of[name], ()), name)
        if not structure:
            raise UnsupportedModelError(
                "model: expected at least one tracked Linear, convolutional or Embedding layer that shares "
                "its parameters with no other, got none; unfreeze one, or take another method"
            )
        check_coverage(checked_regularization(self.regularization), tuple(structure))
        shapes = {name: tuple(value.shape) for name, value in objective.parameters().items()}
        return Layout.of(shapes, structure)

    def passes(self) -> tuple[FitPass, ...]:
        return self.passes_in_one_process(0)

    @override
    def passes_in_one_process(self, kept_bytes: int) -> tuple[FitPass, ...]:
        expectation = OutputExpectation(Expectation(self.expectation), self.samples, self.seed)
        diagonal = Unsupported(self.unsupported) is Unsupported.DIAGONAL
        if not self.update_diagonal:
            return (CovariancePass(expectation, diagonal, None),)
        others = expectation.of_other_draws()
        kept = KeptCaptures(others, kept_bytes)
        return CovariancePass(expectation, diagonal, kept), CorrectionPass(others, kept)

    @override
    def fitted(self, objective: Objective, state: FitState, data: TrainingData | None = None) -> Fitted:
        layout = self.layout(objective)
        layers = {layer.name: layer for layer in supported_layers(objective)}
        embeddings = {spec.name: spec for spec in supported_embeddings(objective)}
        solvers: dict[str, DiagonalSolver] = {}
        is_flat = True
        for block, width in layout.widths.items():
            if block in layers:
                what, eigenvalues = f"layer {block!r}", self._eigenvalues(objective, layers[block], state)
            elif block in embeddings:
                what, eigenvalues = f"embedding {block!r}", self._of_embedding(embeddings[block], state)
            else:
                what = f"block {block!r}"
                eigenvalues = fitted_tensor(state, COVARIANCE, block, "diagonal", (width,))
            eigenvalues = eigenvalues.to(objective.device)
            is_flat = is_flat and not eigenvalues.any()
            are_products = not self.update_diagonal and (block in layers or block in embeddings)
            rounding = rounding_of_products(eigenvalues.dtype) if are_products else None
            solvers[block] = DiagonalSolver(what, eigenvalues, self._λ(block, eigenvalues), rounding)
        rows = {
            block: LayerRows(
                layer, basis_of(objective, layer, state), scored_by_parameter(objective, layer, state)
            )
            for block, layer in layers.items()
        }
        looked_up = {
            block: EmbeddingRows(spec, output_basis_of(objective, spec, state))
            for block, spec in embeddings.items()
        }
        return EkfacFitted(layout, objective, rows, looked_up, solvers, (FLAT,) if is_flat else ())

    def _eigenvalues(self, objective: Objective, layer: LayerSpec, state: FitState) -> Tensor:
        """`Λ` of a layer, `[o, j]`."""
        o, j = matrix_shape(objective, layer)
        if self.update_diagonal:
            return fitted_tensor(state, CORRECTION, layer.name, "eigenvalues", (o, j))
        A, G = side_shapes(objective, layer)
        λ_A = fitted_tensor(state, COVARIANCE, layer.name, "input_values", A)
        λ_G = fitted_tensor(state, COVARIANCE, layer.name, "output_values", G)
        return (λ_G.unsqueeze(-1) * λ_A.unsqueeze(-2)).view(o, j)

    def _of_embedding(self, spec: EmbeddingSpec, state: FitState) -> Tensor:
        """`Λ` of an embedding, `[V, o]`."""
        if self.update_diagonal:
            return fitted_tensor(state, CORRECTION, spec.name, "eigenvalues", (spec.rows, spec.columns))
        λ_A = fitted_tensor(state, COVARIANCE, spec.name, "input_values", (spec.rows,))
        λ_G = fitted_tensor(state, COVARIANCE, spec.name, "output_values", (spec.columns,))
        return torch.outer(λ_A, λ_G)

    def _λ(self, block: str, eigenvalues: Tensor) -> float:
        trace = float(eigenvalues.sum())
        regularization = checked_regularization(self.regularization)
        return block_regularization(regularization, block, trace, eigenvalues.numel())

    def footprint(self, shapes: ModelShapes, micro_batch: int, rows: int) -> Footprint:
        diagonal = Unsupported(self.unsupported) is Unsupported.DIAGONAL
        return ekfac_footprint(shapes, micro_batch, rows, self.update_diagonal, diagonal)


def _refused(objective: Objective) -> UnsupportedModelError:
    named = [
        f"{name} ({described(objective.model, block)}{', used by hand too' * (name in objective.by_hand)})"
        for block, names in uncaptured_blocks(objective).items()
        for name in names
    ]
    return UnsupportedModelError(
        "model: EK-FAC treats Linear, Conv1d, Conv2d, Conv3d and Embedding layers, and the Conv1D of "
        "transformers, that are called as modules and whose parameters nothing else uses (an Embedding "
        "without max_norm and scale_grad_by_freq), got "
        f"{', '.join(named)}; take unsupported='diagonal' or 'exclude', or freeze them "
        "(requires_grad_(False))"
    )


def _refuse_other(field: str, kind: type[StrEnum], value: str) -> None:
    if value not in list(kind):
        raise ValueError(
            f"{field}: expected one of {', '.join(kind)}, got {value!r}; the first is the default"
        )
