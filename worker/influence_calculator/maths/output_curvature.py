"""The loss's second derivative by the model's outputs, `∇²_f ℓ_i`, made positive semi-definite.

Shapes: n examples, d floating-point output elements of one example.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.utils import _pytree as pytree
from typing_extensions import override

from influence_calculator.maths.directional import GRAPH_COPIES, pull_back
from influence_calculator.maths.errors import UnsupportedLossError
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.layout import rows_of
from influence_calculator.maths.log_probabilities import continued
from influence_calculator.maths.objective import Batch, Objective, batch_size, only_tensors
from influence_calculator.maths.recognised_losses import is_recognised, of_positive_weights

MOST_OUTPUTS = 4096
"""Above this d, n eigenproblems of `[d, d]` are no longer the cheap part of a product."""


def float_outputs(outputs: Any) -> Tensor:
    """All floating-point outputs as `[n, d]`.

    Raises:
        UnsupportedLossError: there is none, or a complex one.
    """
    require_real(outputs)
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if _is_float(leaf)]
    return torch.cat([rows_of(leaf) for leaf in leaves], dim=1)


def require_real(outputs: Any) -> None:
    """What the model answers with has floating-point tensors by which a loss has a curvature.

    Raises:
        UnsupportedLossError: there is none, or a complex one.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if any(leaf.is_complex() for leaf in leaves):
        raise UnsupportedLossError(
            "outputs of forward: expected real tensors, got complex ones; return torch.view_as_real of them "
            "and let the loss take torch.view_as_complex, or take the Hessian or the Fisher at the true "
            "labels (second_order_mode hessian or empirical_fisher)"
        )
    if not any(_is_float(leaf) for leaf in leaves):
        raise UnsupportedLossError(
            "outputs of forward: expected at least one floating-point tensor, got none; return the logits"
        )


class OutputEigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors of `clip(∇²_f ℓ_i)` of every example of a batch."""

    eigenvalues: Tensor
    """`[n, d]`, at least 0; NaN for an example whose second derivative is not finite."""
    vectors: Tensor
    """`[n, d, d]`, in columns."""
    clipped: int
    """How many negative eigenvalues were taken as 0 (those within rounding of 0 not counted)."""


_UNDERIVED = re.compile("derivative for .* is not implemented|must override the setup_context")


def has_no_derivative(error: RuntimeError) -> bool:
    """Whether torch says so of a function, or of the derivative of one."""
    return _UNDERIVED.search(str(error)) is not None


class OutputCurvature(ABC):
    """`clip(∇²_f ℓ_i)` of every example of a batch, as far as products with it tell."""

    width: int
    """d."""
    nbytes: int
    """What stays allocated while it lives."""
    clipped: int = 0
    """As in `OutputEigenpairs`."""

    @abstractmethod
    def products(self, vectors: Tensor) -> Tensor:
        """Of `[q, n, d]`, each example's matrix times each of its q vectors."""


class _Matrices(OutputCurvature):
    """Matrices `[n, d, d]`, of any loss."""

    def __init__(self, objective: Objective, outputs: Any, batch: Batch) -> None:
        eigenvalues, vectors, self.clipped = output_eigenpairs(objective, outputs, batch)
        self._matrices = (vectors * eigenvalues[:, None, :]) @ vectors.mT
        self.width = self._matrices.shape[-1]
        self.nbytes = self._matrices.nbytes

    @override
    def products(self, vectors: Tensor) -> Tensor:
        found = torch.einsum("nde,qne->qnd", self._matrices, vectors.to(self._matrices.dtype))
        return found.to(vectors.dtype)


class _SecondDerivatives(OutputCurvature):
    """Derivatives of a loss's gradient that have no negative eigenvalues, by any number of outputs."""

    def __init__(self, objective: Objective, outputs: Any, batch: Batch) -> None:
        tensors, rebuilt = only_tensors(outputs)
        flat = float_outputs(outputs)
        objective = of_positive_weights(objective)

        def loss(values: Tensor) -> Tensor:
            return objective.losses(rebuilt(vmap(_with_floats)(tensors, values)), batch).sum()

        _, self._pull = pull_back(grad(loss), flat)
        self.width = flat.shape[1]
        self.nbytes = GRAPH_COPIES * flat.nbytes

    @override
    def products(self, vectors: Tensor) -> Tensor:
        found: Tensor = vmap(self._pull)(vectors)
        return found


def output_curvature(objective: Objective, batch: Batch) -> OutputCurvature:
    """`clip(∇²_f ℓ_i)` over all model outputs f of each example."""
    with torch.no_grad():
        outputs = objective.outputs(batch)
    if is_recognised(objective, outputs, batch):
        return _SecondDerivatives(objective, outputs, batch)
    return _Matrices(objective, outputs, batch)


def output_eigenpairs(objective: Objective, outputs: Any, batch: Batch) -> OutputEigenpairs:
    """Eigenpairs of the loss's second derivative at outputs that came from `batch`."""
    flat = float_outputs(outputs)
    if flat.shape[1] > MOST_OUTPUTS:
        raise UnsupportedLossError(
            f"loss: its second derivative is formed for at most {MOST_OUTPUTS} output elements per example, "
            f"got {flat.shape[1]}; return what F.cross_entropy, F.nll_loss, F.mse_loss or "
            "F.binary_cross_entropy_with_logits answers, or a weighted sum of it, of which it need not be "
            "formed, or take the Fisher at the true labels (second_order_mode empirical_fisher, or EK-FAC "
            "with expectation empirical)"
        )
    second = _second_derivatives(objective, outputs, flat, batch)
    second = second.to(accumulation_dtype(second.dtype))
    finite = second.isfinite().all(2).all(1)
    second = second.masked_fill(~finite[:, None, None], 0.0)
    eigenvalues, vectors = torch.linalg.eigh((second + second.mT) / 2)
    # A softmax leaves errors of ε next to probabilities of 1, however small its curvature is.
    scale = eigenvalues.abs().amax(dim=1, keepdim=True).clamp(min=1)
    rounding = flat.shape[1] * torch.finfo(eigenvalues.dtype).eps * scale
    clipped = int((eigenvalues < -rounding).sum())
    eigenvalues = eigenvalues.clamp(min=0).masked_fill(~finite[:, None], torch.nan)
    return OutputEigenpairs(eigenvalues, vectors, clipped)


def _second_derivatives(objective: Objective, outputs: Any, flat: Tensor, batch: Batch) -> Tensor:
    tensors, rebuilt = only_tensors(outputs)
    objective = continued(objective)

    def loss(values: Tensor, output: list[Tensor], example: Batch) -> Tensor:
        # A copy, which a loss may change in place.
        return objective.one_loss(rebuilt(_with_floats(output, values.clone())), example)

    try:
        # Reverse over reverse: forward mode loads decompositions for seconds, and fewer losses have it.
        return vmap(jacrev(jacrev(loss)))(flat, tensors, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        # Control flow that depends on data cannot be vmapped; double backward takes any loss.
        def of_example(i: int, values: Tensor) -> Tensor:
            return loss(values, _at(tensors, i), _at(batch, i))

        return torch.stack(
            [_hessian(partial(of_example, i), flat[i].detach()) for i in range(batch_size(batch))]
        )


def _hessian(loss: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    """By double backward."""
    try:
        found: Tensor = torch.autograd.functional.hessian(loss, output)
    except RuntimeError as error:
        if not has_no_derivative(error):
            raise
        raise UnsupportedLossError(
            f"loss: expected one that torch differentiates twice, got: {error}; write it with functions "
            "that torch does, or take the Fisher at the true labels (second_order_mode empirical_fisher, or "
            "EK-FAC with expectation empirical)"
        ) from error
    return found


def _with_floats(output: list[Tensor], values: Tensor) -> list[Tensor]:
    """One example's output with its floating-point elements replaced by `values`, `[d]`."""
    start, replaced = 0, []
    for leaf in output:
        if _is_float(leaf):
            replaced.append(values[start : start + leaf.numel()].reshape(leaf.shape))
            start += leaf.numel()
        else:
            replaced.append(leaf)
    return replaced


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _at(tree: Any, index: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf[index], tree)
