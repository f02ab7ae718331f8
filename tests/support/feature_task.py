"""A task that uses what `InfluenceTask` offers besides model, loss and data; its scores have a formula.

Batches are dicts of token ids and labels, the model returns a dict, half of it is not tracked, and the test
side measures something else than the loss.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import barriers
from influence_job.task import InfluenceTask

barriers.install()

TRAIN, TEST, WORDS, TOKENS = 60, 7, 11, 4


class Sentences:
    """Token ids and labels by name."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(WORDS, (count, TOKENS), generator=generator)
        self.labels = torch.randint(3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[start:stop], "labels": self.labels[start:stop]}


class Classifier(nn.Module):
    """A bag of words; takes ids by name and returns an object, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 5)
        self.body = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(int(os.environ.get("FEATURE_SEED", "3")))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(self.embedding(input_ids).mean(1)).tanh())}


def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = model(input_ids=batch["input_ids"])
    return outputs


def loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs["logits"], batch["labels"])


def margin(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """How far the label's logit is above the mean."""
    logits = outputs["logits"]
    return (logits.gather(1, batch["labels"][:, None])[:, 0] - logits.mean(1)).sum()


def task() -> InfluenceTask:
    """In double precision, so that the comparison with the formula is sharp."""
    return InfluenceTask(
        model=Classifier().double().eval(),
        loss=loss,
        train=Sentences(TRAIN, 1),
        test=Sentences(TEST, 2),
        measurement=margin,
        forward=forward,
        parameters=r"^(body|head)\.",
    )


def notes_its_process() -> InfluenceTask:
    """As `task`, with annotations of the process: whether it flushes denormals, and its id.

    Every call of the entry point appends the process's id to the file CALLS.
    """
    with Path(os.environ["CALLS"]).open("a") as calls:
        calls.write(f"{os.getpid()}\n")
    made = task()
    return InfluenceTask(
        **{**vars(made), "annotate": _process},
    )


def _process(batch: Mapping[str, Tensor], _: object) -> Mapping[str, Tensor]:
    flushes = bool(torch.tensor(1e-40) * 1.0 == 0)
    count = len(batch["labels"])
    return {"flushes": torch.full((count,), int(flushes)), "process": torch.full((count,), os.getpid())}


def trains_differently() -> InfluenceTask:
    """A model of other numbers at every call, as training on several threads gives."""
    made = task()
    with torch.no_grad():
        for parameter in made.model.parameters():
            noise = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
            parameter.add_(torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype))
    return made


def forgets_forward() -> InfluenceTask:
    """Batches are dicts, for which `model(batch[0])` means nothing."""
    return InfluenceTask(**{**vars(task()), "forward": None})


def breaks_once() -> InfluenceTask:
    """The second half of the training data cannot be read the first time: a network share that came late."""
    made = task()
    return InfluenceTask(**{**vars(made), "train": _BreaksOnce(Sentences(TRAIN, 1))})


class _BreaksOnce:
    def __init__(self, source: Sentences) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        if stop > TRAIN // 2:
            try:
                Path(os.environ["BROKEN_ONCE"]).touch(exist_ok=False)
            except FileExistsError:
                return self._source.read(start, stop)
            raise OSError("the share is not mounted yet")
        return self._source.read(start, stop)


def may_die() -> InfluenceTask:
    """With DEADLY in the environment, reading the last training chunk ends the process as the kernel does."""
    made = task()
    return InfluenceTask(**{**vars(made), "train": _Deadly(TRAIN, 1)})


class _Deadly(Sentences):
    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        if "DEADLY" in os.environ and stop == TRAIN and start > 0 and stop - start > 1:
            os._exit(137)
        return super().read(start, stop)
