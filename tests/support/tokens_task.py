"""A task of token ids whose tracked layers are all called with the tokens, some of which are padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import barriers
from influence_job.task import InfluenceTask

barriers.install()

WORDS, TOKENS = 7, 6


def task(train: int = 90, test: int = 12, trimmed: bool = False, tied: bool = False) -> InfluenceTask:
    """Next words of random texts. `trimmed`: a batch is as long as its longest text, as of some collators;
    `tied`: the head multiplies by the embedding's weight.
    """
    generator = torch.Generator().manual_seed(0)
    model = TiedReader() if tied else Reader()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return InfluenceTask(
        model=model.eval(),
        loss=loss,
        train=Texts(train, 1, trimmed),
        test=Texts(test, 2, False),
        forward=lambda model, batch: model(batch["ids"]),
    )


class Reader(nn.Module):
    """Every word sees the ones before it, through layers over frozen embeddings; 0 is no word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 4).requires_grad_(False)
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        before = self.embedding(ids).cumsum(1)
        answer: Tensor = self.head(self.inner(before).tanh())
        return answer


class TiedReader(nn.Module):
    """The same with a head that is the embedding again, used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        before = self.embedding(ids).cumsum(1)
        return self.inner(before).tanh() @ self.embedding.weight.T


class Texts:
    """Token ids by name, 0 where a text has ended."""

    def __init__(self, count: int, seed: int, trimmed: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, WORDS, (count, TOKENS), generator=generator)
        lengths = torch.randint(2, TOKENS + 1, (count, 1), generator=generator)
        lengths[0] = 2 if trimmed else TOKENS
        self.ids = ids.where(torch.arange(TOKENS) < lengths, 0)
        self.trimmed = trimmed

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        ids = self.ids[start:stop]
        return {"ids": ids[:, : int((ids > 0).sum(1).max())] if self.trimmed else ids}


def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return loss_of_ids(outputs, batch["ids"])


def loss_of_ids(outputs: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
