"""What users import from pyDVL's module of this name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_calculator.maths import curvature
from influence_calculator.maths.blocks import BlockMode
from influence_calculator.maths.gradients import accumulation_dtype
from influence_calculator.maths.objective import version_of
from influence_calculator.torch.converter import (
    NestedTorchCatAggregator,
    TorchCatAggregator,
    TorchNumpyConverter,
)
from influence_calculator.torch.user_warnings import warn_user
from influence_calculator.torch_dataset import torch_dataset_to_dask_array

LossType = Callable[[Tensor, Tensor], Tensor]
"""`loss(model(x), y)`: a scalar, reduced over the batch in any way."""


class SecondOrderMode(Enum):
    """Which matrix stands for the curvature H."""

    HESSIAN = "hessian"
    """`(1/N) Σ ∇²θ ℓ_i`."""
    EMPIRICAL_FISHER = "empirical_fisher"
    """`(1/N) Σ g_i g_iᵀ` at the labels given."""
    GENERALIZED_GAUSS_NEWTON = "generalized_gauss_newton"
    """`(1/N) Σ J_iᵀ (∇²_f ℓ_i) J_i` over the model's outputs f."""
    GAUSS_NEWTON = "gauss_newton"
    """pyDVL's name of EMPIRICAL_FISHER; deprecated."""


def second_order_of(mode: SecondOrderMode | curvature.SecondOrderMode | str) -> curvature.SecondOrderMode:
    """The maths' word for a public second-order mode, or its value.

    Raises:
        ValueError: no such mode.
    """
    try:
        public = SecondOrderMode(mode.value if isinstance(mode, Enum) else mode)
    except ValueError as error:
        modes = ", ".join(repr(known.value) for known in SecondOrderMode)
        raise ValueError(
            f"second_order_mode: expected one of {modes}, got {mode!r}; SecondOrderMode names them"
        ) from error
    if public is SecondOrderMode.GAUSS_NEWTON:
        warn_user(
            "second_order_mode: GAUSS_NEWTON means the empirical Fisher matrix, as in pyDVL; say "
            "EMPIRICAL_FISHER, or GENERALIZED_GAUSS_NEWTON if you want that matrix",
            DeprecationWarning,
        )
        public = SecondOrderMode.EMPIRICAL_FISHER
    return curvature.SecondOrderMode(public.value)


def factor_dtype_of(dtype: torch.dtype) -> np.dtype[Any]:
    """What factors of parameters of `dtype` are in numpy: float32 for half precision, else the same."""
    return np.dtype(str(accumulation_dtype(dtype)).removeprefix("torch."))


def versions_of(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes when a parameter or buffer is replaced or changed in place."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple((tensor.data_ptr(), version_of(tensor)) for tensor in tensors)


def require_factor_width(z_test_factors: Tensor, width: int) -> None:
    """Factors have one column per parameter.

    Raises:
        ValueError: they are not `[t, width]`.
    """
    if z_test_factors.ndim != 2 or z_test_factors.shape[1] != width:
        raise ValueError(
            f"z_test_factors: expected shape [t, {width}] (one column per parameter), got "
            f"{list(z_test_factors.shape)}; pass what influence_factors of this model returned"
        )


def require_block_widths(z_test_factors: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    """Factors of every block and of no other, with one column per parameter of the block.

    Raises:
        ValueError: factors of other blocks, or of other widths.
    """
    given = {block: list(rows.shape[1:]) for block, rows in z_test_factors.items()}
    if given != {block: [width] for block, width in widths.items()}:
        raise ValueError(
            f"z_test_factors: expected [t, width] for each of the blocks {dict(widths)}, got widths {given}; "
            "pass what influence_factors_by_block of this model returned"
        )


def get_model_parameters(
    model: nn.Module, detach: bool = True, require_grad_only: bool = True
) -> dict[str, Tensor]:
    """A model's parameters by name, in order.

    Args:
        model: any.
        detach: outside of autograd's graphs.
        require_grad_only: without those that are frozen.
    """
    return {
        name: parameter.detach() if detach else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not require_grad_only
    }


__all__ = [
    "BlockMode",
    "LossType",
    "NestedTorchCatAggregator",
    "SecondOrderMode",
    "TorchCatAggregator",
    "TorchNumpyConverter",
    "get_model_parameters",
    "second_order_of",
    "torch_dataset_to_dask_array",
]
