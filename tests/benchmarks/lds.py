"""Linear datamodeling scores of every method on the digits MLP, beside their ceiling: a part of `make bench`.

Models retrained on halves of the training images are read from `retrained_digits.npz`, which `retraining`
makes. The ceiling is the agreement of one half of the seeds with the other: no method can predict what the
seeds do not agree on. Exit code 1: EK-FAC missed its target.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import retraining
import torch
import torch.nn.functional as F
from datamodeling import Score, agreement, datamodeling_score
from findings import Finding, table
from numpy.typing import NDArray
from torch.utils.data import DataLoader, TensorDataset

from influence_calculator import NestedTorchCatAggregator, SequentialInfluenceCalculator
from influence_calculator.torch import (
    ArnoldiInfluence,
    CgInfluence,
    Checkpoint,
    DirectInfluence,
    EkfacInfluence,
    GradDotInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    LograInfluence,
    NystroemSketchInfluence,
    SecondOrderMode,
    TracInInfluence,
    TrakInfluence,
)
from influence_calculator.torch.blockwise import TorchBlockwiseInfluence
from influence_calculator.torch.influence_function_model import TorchInfluenceFunctionModel
from influence_job.examples import digits

REGULARIZATION = 0.01
GRID = (0.001, 0.01, 0.1)
"""λ; a method is reported at `REGULARIZATION` and at the best of these."""
SLOW = ("Lissa",)
"""It takes 1000 steps over all training images for every λ and still has not converged."""
TARGET = 1.5
"""EK-FAC's score at least, in grad-dot's."""
CHECKPOINT_EPOCHS = (5, 10, 20, 30)
RANK = 256
LAYER_RANK = 16
"""Of each side of a layer."""
GAUSS_NEWTON = SecondOrderMode.GENERALIZED_GAUSS_NEWTON

Loader = DataLoader[tuple[torch.Tensor, ...]]
Method = Callable[[torch.nn.Module], TorchInfluenceFunctionModel]
RegularizedMethod = Callable[[torch.nn.Module, float], TorchBlockwiseInfluence]

WITHOUT_REGULARIZATION: dict[str, Method] = {
    "GradDot": lambda net: GradDotInfluence(net, F.cross_entropy),
    "TracIn": lambda net: TracInInfluence(net, F.cross_entropy, _checkpoints()),
}
REGULARIZED: dict[str, RegularizedMethod] = {
    "Trak": lambda net, damping: TrakInfluence(net, F.cross_entropy, damping, rank=512),
    "Logra": lambda net, damping: LograInfluence(net, F.cross_entropy, damping, LAYER_RANK),
    "InverseHarmonicMean": lambda net, damping: InverseHarmonicMeanInfluence(net, F.cross_entropy, damping),
    "KFAC": lambda net, damping: EkfacInfluence(net, False, damping),
    "EK-FAC": lambda net, damping: EkfacInfluence(net, True, damping),
    "NystroemSketch": lambda net, damping: NystroemSketchInfluence(
        net, F.cross_entropy, damping, RANK, second_order_mode=GAUSS_NEWTON
    ),
    "Arnoldi": lambda net, damping: ArnoldiInfluence(
        net, F.cross_entropy, damping, RANK, second_order_mode=GAUSS_NEWTON, use_woodbury=True
    ),
    "Lissa": lambda net, damping: LissaInfluence(
        net, F.cross_entropy, damping, scale=50.0, rtol=1e-2, second_order_mode=GAUSS_NEWTON
    ),
    "Cg": lambda net, damping: CgInfluence(
        net, F.cross_entropy, damping, 1e-3, 0.0, solve_simultaneously=True, second_order_mode=GAUSS_NEWTON
    ),
    "Direct": lambda net, damping: DirectInfluence(
        net, F.cross_entropy, damping, second_order_mode=GAUSS_NEWTON
    ),
}


def main() -> None:
    """Scores what was asked for, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="of the figures, as JSON")
    help_only = f"default: all but {', '.join(SLOW)}, which takes some 20 minutes"
    parser.add_argument("--only", choices=REGULARIZED, action="append", help=help_only)
    options = parser.parse_args()
    found = list(findings(options.only or [name for name in REGULARIZED if name not in SLOW]))
    print(table(found))
    if options.output:
        options.output.write_text(json.dumps([asdict(finding) for finding in found], indent=2) + "\n")
    if not all(finding.reached for finding in found):
        raise SystemExit(1)


def findings(names: list[str]) -> Iterator[Finding]:
    """Each method's score with its standard error, and what EK-FAC is held to."""
    masks, by_seed = retraining.load()
    losses = by_seed.mean(axis=1)
    half = by_seed.shape[1] // 2
    yield from _lines("ceiling", agreement(by_seed[:, :half].mean(axis=1), by_seed[:, half:].mean(axis=1)))
    task = digits.task()
    train, test = (
        DataLoader(TensorDataset(*source.read(0, len(source))), batch_size=100)
        for source in (task.train, task.test)
    )

    def scored(fitted: TorchInfluenceFunctionModel) -> Score:
        return datamodeling_score(influences_of(fitted, train, test), masks, losses)

    plain = {name: scored(method(task.model).fit(train)) for name, method in WITHOUT_REGULARIZATION.items()}
    for name, score in plain.items():
        yield from _lines(name, score)
    for name in names:
        fitted = REGULARIZED[name](task.model, REGULARIZATION).fit(train)
        by_damping = {damping: scored(fitted.with_regularization(damping)) for damping in GRID}
        score = by_damping[REGULARIZATION]
        yield from _lines(f"{name}, λ = {REGULARIZATION}", score)
        best = max(by_damping, key=lambda damping: by_damping[damping].mean)
        yield from _lines(f"{name}, best λ = {best}", by_damping[best])
        if name == "EK-FAC":
            ratio = score.mean / plain["GradDot"].mean
            yield Finding("EK-FAC / GradDot", ratio, "×", f"≥ {TARGET}", ratio >= TARGET)


def influences_of(model: TorchInfluenceFunctionModel, train: Loader, test: Loader) -> NDArray[np.float32]:
    """`[T, N]` of a fitted model, computed in this process."""
    calculator = SequentialInfluenceCalculator(model)
    lazy = calculator.influences(test, train)
    influences: NDArray[np.float32] = lazy.compute(aggregator=NestedTorchCatAggregator()).numpy()
    return influences


def _lines(name: str, score: Score) -> list[Finding]:
    return [Finding(f"LDS: {name}", score.mean, ""), Finding(f"LDS: {name}, standard error", score.error, "")]


def _checkpoints() -> list[Checkpoint]:
    """States on the way of one training: the same seed takes the same steps."""
    return [Checkpoint(digits.task(epochs=epochs).model.state_dict(), 0.1) for epochs in CHECKPOINT_EPOCHS]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
