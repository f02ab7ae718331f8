"""Measures EK-FAC's memory in a process of its own and prints what was planned beside it, as JSON.

Argument: the number of groups of the second of two convolutions, or `words`: an embedding.

Run as a script: the largest resident size since a mark can be read once the mark is set through
/proc/self/clear_refs, and only a process that did nothing else before starts from an idle heap.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_calculator.maths.capture import measure
from influence_calculator.maths.ekfac import Ekfac
from influence_calculator.maths.method import fit
from influence_calculator.maths.objective import xy_objective
from peak_memory import mark, since
from training_sets import TrainingSet

MICRO_BATCH, ROWS = 128, 32
IMAGES = (3, 64, 64)
WORDS, WIDTH, TOKENS = 20_000, 256, 448


def _warm_up(method: Ekfac) -> None:
    """Loads what torch loads on first use."""
    objective = xy_objective(nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 2)), F.cross_entropy)
    zeros = torch.zeros(4, dtype=torch.int64)
    fit(method, objective, TrainingSet((zeros, zeros), 2))


def _convolutions(groups: int) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 16 * groups, 3, padding=1, stride=2, groups=groups), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16 * groups, 10)),
    )
    return model, torch.randn(MICRO_BATCH, *IMAGES)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _words() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        *(nn.Embedding(WORDS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 64), nn.Tanh(), _Mean(), nn.Linear(64, 10))
    )
    return model, torch.randint(WORDS, (MICRO_BATCH, TOKENS))


def main() -> None:
    torch.set_num_threads(1)
    model, x = _words() if sys.argv[1] == "words" else _convolutions(int(sys.argv[1]))
    y = torch.randint(10, (MICRO_BATCH,))
    objective, method = xy_objective(model, F.cross_entropy), Ekfac(regularization=0.1)
    _warm_up(method)
    shapes = measure(objective, (x, y))
    planned = method.footprint(shapes, MICRO_BATCH, ROWS)
    before = mark()
    state = fit(method, objective, TrainingSet((x, y), MICRO_BATCH))
    result = {"fit": [since(before), planned.fit]}
    fitted = method.fitted(objective, state, None)
    before = mark()
    left = fitted.solve(fitted.gradients(objective, (x[:ROWS], y[:ROWS]))).left
    for block, rows in left.items():
        fitted.factors({block: rows})
    result["factors"] = [since(before), max(planned.factors, planned.by_parameter)]
    before = mark()
    fitted.score(left, (x, y))
    result["capture"] = [since(before), planned.capture]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
