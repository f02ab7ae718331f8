"""Our side with EK-FAC: the same calls as pyDVL's side, with the imports changed."""

from __future__ import annotations

from functools import partial

import side
import workload
from distributed import Client
from numpy import ndarray

from influence_calculator import DaskInfluenceCalculator
from influence_calculator.torch import EkfacInfluence
from influence_calculator.torch.util import TorchNumpyConverter


def compute(client: Client, inputs: side.Inputs, expectation: str = "sampled") -> ndarray:
    model = EkfacInfluence(
        inputs.model,
        update_diagonal=True,
        hessian_regularization=inputs.workload.regularization,
        loss=workload.loss,
        expectation=expectation,
        seed=inputs.seed,
    ).fit(inputs.loader)
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    influences: ndarray = calculator.influences(*inputs.arrays).compute()
    return influences


if __name__ == "__main__":
    side.main("influence_calculator.torch", compute, partial(compute, expectation="exact"))
