"""The example's data: what the package ships is what scikit-learn has."""

from __future__ import annotations

import torch

from influence_job.examples import digits


def test_the_images_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))[:1700]
    images = torch.as_tensor(data, dtype=torch.float32)[order] / 16
    labels = torch.as_tensor(target, dtype=torch.int64)[order]
    task = digits.task(epochs=0)
    for source, start, stop in ((task.train, 0, 1400), (task.test, 1400, 1700)):
        x, y = source.read(0, len(source))
        assert torch.equal(x, images[start:stop])
        assert torch.equal(y, labels[start:stop])
