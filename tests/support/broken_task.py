"""Entry points with the mistakes that users make, one each. What is not broken is as in `traced_task`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import traced_task
from influence_job.data import ArraySource, TorchDatasetSource
from influence_job.task import DataSource, InfluenceTask

FAULTY_EXAMPLE = 333
"""None of those that a job reads to know the data again."""
AWAY_SECONDS = 3.0


def returns_a_model() -> nn.Module:
    return traced_task.task().model


def raises() -> InfluenceTask:
    raise FileNotFoundError("no checkpoint at /models/last.pt")


def raises_at_length() -> InfluenceTask:
    raise ValueError(f"{'größe ' * 20_000}\nGewichte fehlen: größe 𝄞")


def leaves() -> InfluenceTask:
    raise SystemExit(0)


def takes_a_path(path: str) -> InfluenceTask:
    return traced_task.task()


def returns_a_loader() -> InfluenceTask:
    """Data that can only be iterated over."""
    task = traced_task.task()
    loader = iter([task.train.read(0, 10)])
    return replace(task, train=loader)  # type: ignore[arg-type]


def adapts_an_iterable_dataset() -> InfluenceTask:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.zeros(6)

    return replace(traced_task.task(), train=TorchDatasetSource(Stream()))


def has_short_labels() -> InfluenceTask:
    x, y = traced_task.task().train.read(0, traced_task.TRAIN)
    return replace(traced_task.task(), train=ArraySource(x, y[:-1]))


def has_no_examples() -> InfluenceTask:
    return replace(traced_task.task(), test=ArraySource(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)))


def leaves_dropout_on() -> InfluenceTask:
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    return replace(traced_task.task(), model=model.train())


def leaves_batch_norm_on() -> InfluenceTask:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return replace(traced_task.task(), model=model.train())


def selects_nothing() -> InfluenceTask:
    return replace(traced_task.task(), parameters="lora_")


def has_the_wrong_inputs() -> InfluenceTask:
    """The model takes 6 features, the data has 5."""
    x, y = traced_task.task().train.read(0, traced_task.TRAIN)
    return replace(traced_task.task(), train=ArraySource(x[:, :5], y))


def has_a_layer_norm() -> InfluenceTask:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    return replace(traced_task.task(), model=model.eval())


def takes_token_ids() -> InfluenceTask:
    """Integers have no derivative."""
    task = traced_task.task()
    _, y = task.train.read(0, traced_task.TRAIN)
    tokens = torch.arange(6 * traced_task.TRAIN).reshape(traced_task.TRAIN, 6) % 7
    model = nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(12, 3))
    model[0].requires_grad_(False)
    data = ArraySource(tokens, y)
    return replace(task, model=model.eval(), train=data, test=data)


def cannot_be_read() -> InfluenceTask:
    return replace(traced_task.task(), train=_Unreadable(OSError("no such share")))


def leaves_when_read() -> InfluenceTask:
    return replace(traced_task.task(), train=_Unreadable(SystemExit(0)))


class _Unreadable:
    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __len__(self) -> int:
        return traced_task.TRAIN

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        raise self._error


def annotates_too_little() -> InfluenceTask:
    return replace(traced_task.task(), annotate=lambda batch, _: {"label": batch[1][:1]})


def faulty() -> InfluenceTask:
    """Sound, unless the environment variable FAULT names what is wrong with one example."""
    task = traced_task.task()
    fault = os.environ.get("FAULT", "")
    side = "test" if fault.endswith("-test") else "train"
    return replace(task, **{side: _Faulty(getattr(task, side), fault.removesuffix("-test"))})


class _Faulty:
    def __init__(self, source: DataSource, fault: str) -> None:
        self._source = source
        self._fault = fault

    def __len__(self) -> int:
        return len(self._source)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        x, y = (leaf.clone() for leaf in self._source.read(start, stop))
        example = min(FAULTY_EXAMPLE, len(self) - 1)
        if not start <= example < stop:
            return x, y
        place = example - start
        if self._fault.startswith("away"):
            _raise_for_seconds(Path(self._fault.split(maxsplit=1)[1]))
        if self._fault == "raises":
            raise OSError("image 0333.png is truncated")
        if self._fault == "nan":
            x[place, 2] = torch.nan
        if self._fault == "differs":
            x[place] += torch.rand(6, generator=torch.Generator().manual_seed(int.from_bytes(os.urandom(4))))
        if self._fault == "changed":
            x[place] += 1
        if self._fault == "class":
            y[place] = 7
        if self._fault == "short":
            return x, y[:-1]
        return x, y


def _raise_for_seconds(first: Path) -> None:
    """As a share that is away for a moment: from the first call of any process, which makes a file."""
    if not first.exists():
        first.touch()
    if time.time() < first.stat().st_ctime + AWAY_SECONDS:
        raise OSError("no such share")


def logs_a_probability() -> InfluenceTask:
    """A loss without a bound: the gradient of one example is infinite."""
    return replace(traced_task.task(), loss=_unsafe_loss)


def _unsafe_loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.nll_loss((outputs.softmax(dim=1) * 0).log(), batch[1])
