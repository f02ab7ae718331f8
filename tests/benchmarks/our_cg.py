"""Our side of W1 with conjugate gradients."""

from __future__ import annotations

import side
import workload
from distributed import Client
from numpy import ndarray
from torch.nn import functional as F

from influence_calculator import DaskInfluenceCalculator
from influence_calculator.torch import CgInfluence, SecondOrderMode
from influence_calculator.torch.util import TorchNumpyConverter


def compute(client: Client, inputs: side.Inputs) -> ndarray:
    model = CgInfluence(
        inputs.model,
        F.cross_entropy,
        regularization=workload.CG_REGULARIZATION,
        rtol=workload.CG_RTOL,
        atol=0.0,
        solve_simultaneously=True,
        second_order_mode=SecondOrderMode.GENERALIZED_GAUSS_NEWTON,
    ).fit(inputs.loader)
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    influences: ndarray = calculator.influences(*inputs.arrays).compute()
    return influences


if __name__ == "__main__":
    side.main("influence_calculator.torch", compute)
