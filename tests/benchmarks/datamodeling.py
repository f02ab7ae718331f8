"""The linear datamodeling score: how well summed influences predict what retrained models lose.

Park et al. 2023 (TRAK), section 5: for each test example Spearman's correlation, over subsets of the training
data, of the summed influences of the subset's examples with the loss of a model trained on it.

Shapes: K subsets, T test and N training examples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


class Score(NamedTuple):
    """The mean over test examples of their correlations, and its standard error from drawing subsets anew."""

    mean: float
    error: float


def datamodeling_score(
    influences: Array, masks: NDArray[np.bool_], losses: Array, draws: int = 50, seed: int = 0
) -> Score:
    """`mean_t ρ_k(Σ_{n in subset k} influences[t, n], -losses[k, t])`: 1 where influences rank subsets right.

    Args:
        influences: `[T, N]`; positive: the training example lowers the test example's loss.
        masks: `[K, N]`: whether the subset holds the training example.
        losses: `[K, T]` of models trained on the subsets.
        draws: of K subsets with replacement, for the standard error.
        seed: of these draws.
    """
    return agreement(masks.astype(np.float64) @ influences.T.astype(np.float64), -losses, draws, seed)


def agreement(predicted: Array, measured: Array, draws: int = 50, seed: int = 0) -> Score:
    """The mean over columns of Spearman's correlation of two matrices `[K, T]`, with its bootstrap error.

    A column that is constant on one side predicts nothing and counts 0.
    """
    generator = np.random.default_rng(seed)
    count = len(predicted)
    drawn = [generator.integers(count, size=count) for _ in range(draws)]
    means = [_mean_correlation(predicted[rows], measured[rows]) for rows in drawn]
    return Score(_mean_correlation(predicted, measured), float(np.std(means, ddof=1)))


def _mean_correlation(predicted: Array, measured: Array) -> float:
    left, right = (_ranks(side) - (len(side) + 1) / 2 for side in (predicted, measured))
    norms = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=0)
    products = (left * right).sum(axis=0)
    return float(np.divide(products, norms, out=np.zeros_like(products), where=norms > 0).mean())


def _ranks(values: Array) -> NDArray[np.float64]:
    """Within each column from 1 on; equal values share the mean of theirs."""
    ranks = np.empty(values.shape)
    for column in range(values.shape[1]):
        _, places, counts = np.unique(values[:, column], return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks
