"""A task with low-rank adapters of peft in a frozen BERT, beside which a norm is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

import language_models as lm
from influence_job.task import InfluenceTask

TRAIN, TEST = (20, 1), (4, 2)
"""Number of sentences, and their seed."""
NORM = "base_model.model.bert.encoder.layer.0.output.LayerNorm"


@dataclass(frozen=True)
class Rows:
    """Examples of one batch."""

    batch: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        return {name: values[start:stop] for name, values in self.batch.items()}


def task() -> InfluenceTask:
    """In double precision."""
    return InfluenceTask(
        model=model(),
        loss=lm.classification_loss,
        train=Rows(lm.sentences(*TRAIN)),
        test=Rows(lm.sentences(*TEST)),
        forward=lm.forward,
    )


def model() -> nn.Module:
    adapted = lm.bert_with_adapters()
    adapted.get_submodule(NORM).requires_grad_(True)
    return adapted
