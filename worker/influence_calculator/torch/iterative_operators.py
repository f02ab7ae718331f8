"""Operators that solve by iterating: with another operator, or with a batch operation's mean.

Shapes: q rows, P input size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import tee
from typing import Any, Generic, Self

import torch
from torch import Tensor
from typing_extensions import override

from influence_calculator.maths.cg import Cg
from influence_calculator.maths.cg_passes import CgSolver
from influence_calculator.maths.conjugate_gradients import Rows
from influence_calculator.maths.gradient_methods import BlockSolver
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.lissa import Lissa, LissaSolver
from influence_calculator.maths.preconditioners import fitted_to
from influence_calculator.maths.stochastic_recursion import Steps
from influence_calculator.maths.training_batches import KeptBatches
from influence_calculator.torch.batch_operation import BatchOperationType, PointAveraging
from influence_calculator.torch.gradient_provider import TorchBatch
from influence_calculator.torch.ignored import SEE_REPORT, warn_of_no_effect
from influence_calculator.torch.inverse_operators import InverseOperator
from influence_calculator.torch.preconditioner import Preconditioner
from influence_calculator.torch.tensor_operator import TensorOperator
from influence_calculator.torch.training_data import IterableTrainingData


class CgOperator(InverseOperator):
    """`(A + λI)^-1` of an operator, by conjugate gradients; needs `A + λI` symmetric and positive.

    Args:
        operator: A.
        regularization: λ; None means 0. May be changed.
        rtol: a row b has converged when `‖r‖ ≤ max(rtol ‖b‖, atol)`.
        atol: as above.
        maxiter: iterations per row; default: 10 per column, at most 5000.
        progress: kept for pyDVL's signature; iterations are in `solver_report`.
        preconditioner: Jacobi or Nyström; fitted to the operator here, at the first `apply`.
        use_block_cg: all rows in one product per iteration: faster, same numbers.
        warn_on_max_iteration: a `SolverWarning` counts the rows that did not converge.

    Raises:
        ValueError: a negative number.
    """

    def __init__(
        self,
        operator: TensorOperator,
        regularization: float | None = None,
        rtol: float = 1e-7,
        atol: float = 1e-7,
        maxiter: int | None = None,
        progress: bool = False,
        preconditioner: Preconditioner | None = None,
        use_block_cg: bool = False,
        warn_on_max_iteration: bool = True,
    ) -> None:
        warn_of_no_effect(SEE_REPORT, progress=progress)
        self.operator = operator
        self._method = Cg(
            rtol=rtol, atol=atol, maxiter=maxiter, simultaneous=use_block_cg, preconditioner=preconditioner
        )
        self._preconditioning: dict[str, Tensor] | None = None
        super().__init__(regularization, warn_on_max_iteration)

    @override
    def _new_solver(self) -> BlockSolver:
        return CgSolver(
            self.operator.products,
            self._λ,
            self._method.stopping(self.input_size),
            self._precondition(),
            self._method.simultaneous,
        )

    def _precondition(self) -> Rows | None:
        preconditioner = self._method.preconditioner
        if preconditioner is None:
            return None
        if self._preconditioning is None:
            like = torch.zeros(self.input_size, dtype=accumulation_dtype(self.dtype), device=self.device)
            self._preconditioning = fitted_to(preconditioner, self.operator.products(), like)
        return preconditioner.rows(self._preconditioning, self._λ)

    @property
    @override
    def input_size(self) -> int:
        """P."""
        return self.operator.input_size

    @property
    @override
    def device(self) -> torch.device:
        """Of the operator."""
        return self.operator.device

    @property
    @override
    def dtype(self) -> torch.dtype:
        """Of the operator."""
        return self.operator.dtype

    @override
    def to(self, device: torch.device | str) -> Self:
        """Moves the operator to a device, and returns this one."""
        self.operator = self.operator.to(device)
        self._preconditioning = None
        self._solver = None
        return self


class LissaOperator(InverseOperator, Generic[BatchOperationType]):
    """`(A + λI)^-1` by LiSSA, for the mean A of a batch operation over all training examples.

    `h ← b + (1 − dampen) h − (A + λI) h / scale`, answering `h / scale`, with steps over all examples. Needs
    a positive `A + λI` and a scale above half of its largest eigenvalue; what grows ends as `NOT_FINITE`.

    Args:
        batch_operation: A as the mean over a batch.
        data: the training data, as anything that iterates over (x, y) again and again.
        regularization: λ; None means 0. May be changed.
        maxiter: steps per row.
        dampen: adds `dampen · scale` to λ.
        scale: the smaller, the faster, as long as it is above half of the largest eigenvalue.
        rtol: a row b has converged when `‖r‖ ≤ rtol ‖b‖`.
        progress: kept for pyDVL's signature; steps are in `solver_report`.
        warn_on_max_iteration: a `SolverWarning` counts the rows that did not converge.

    Raises:
        OneShotIterableError: data that can be read once.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        batch_operation: BatchOperationType,
        data: Iterable[Any],
        regularization: float | None = None,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: float = 10.0,
        rtol: float = 1e-4,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
    ) -> None:
        warn_of_no_effect(SEE_REPORT, progress=progress)
        self.batch_operation = batch_operation
        self.data = data
        self._method = Lissa(maxiter=maxiter, dampen=dampen, scale=scale, rtol=rtol)
        self._batches = self._read_again()
        super().__init__(regularization, warn_on_max_iteration)

    def _read_again(self) -> KeptBatches:
        return KeptBatches(IterableTrainingData(self.data, self.device, passes=2))

    @override
    def _new_solver(self) -> BlockSolver:
        return LissaSolver(
            replace(self._method, regularization=self._λ),
            "",
            self._λ + self._method.dampen * self._method.scale,
            self._products,
            may_be_indefinite=self.batch_operation.may_be_indefinite,
            computed_in=self.dtype,
        )

    def _products(self) -> tuple[Rows, Steps | None]:
        return self._mean, None

    def _mean(self, rows: Tensor) -> Tensor:
        """The average over the training data, every example counting the same."""
        mine, counted = tee(TorchBatch(*batch) for _, batch in self._batches.batches())
        applied = (self.batch_operation.apply(batch, rows) for batch in mine)
        return PointAveraging()(applied, (len(batch) for batch in counted))

    @property
    @override
    def input_size(self) -> int:
        """P."""
        return self.batch_operation.input_size

    @property
    @override
    def device(self) -> torch.device:
        """Of the batch operation."""
        return self.batch_operation.device

    @property
    @override
    def dtype(self) -> torch.dtype:
        """Of the batch operation."""
        return self.batch_operation.dtype

    @override
    def to(self, device: torch.device | str) -> Self:
        """Moves the batch operation to a device, and returns this operator."""
        self.batch_operation = self.batch_operation.to(device)
        self._batches = self._read_again()
        self._solver = None
        return self
