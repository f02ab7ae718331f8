"""Tiny models of Hugging Face with random weights, and their batches: dicts of token ids, masks and labels.

Nothing is downloaded. `Packed` is the same model with its inputs in one tensor, for oracles that know
of tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, TOKENS, CLASSES = 7, 5, 3
IGNORED = -100


def bert() -> nn.Module:
    """A classifier of sentences, 249 parameters."""
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=TOKENS,
        type_vocab_size=1,
        num_labels=CLASSES,
    )
    return _random(lambda: transformers.BertForSequenceClassification(config))


def bert_with_adapters() -> nn.Module:
    """The same, frozen, with low-rank adapters of two of its layers."""
    base = bert()
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    return _random(lambda: peft.get_peft_model(base, config))


def gpt2(tied: bool = True) -> nn.Module:
    """A language model whose head shares its weight with the embedding, or does not."""
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=TOKENS,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_inner=6,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _random(lambda: transformers.GPT2LMHeadModel(config))


def _random(build: Any) -> nn.Module:
    """Larger weights than a fresh model has, so that its layers matter."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: nn.Module = build().double().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) / 3)
    return model


def sentences(count: int, seed: int) -> dict[str, Tensor]:
    """Sentences of different lengths, each with a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (count, TOKENS), generator=generator)
    lengths = torch.randint(2, TOKENS + 1, (count, 1), generator=generator)
    mask = (torch.arange(TOKENS) < lengths).long()
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def texts(count: int, seed: int) -> dict[str, Tensor]:
    """The same, each token being the label of the one before; what is padding is ignored."""
    batch = sentences(count, seed)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return {**batch, "labels": labels}


def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Keywords in, an object with `.logits` out."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def classification_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs.logits, batch["labels"])


def language_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return next_token_loss(outputs.logits, batch["labels"])


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


class Packed(nn.Module):
    """Ids and masks as `[n, 2, S]`; answers logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        ids, mask = x.unbind(1)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits


def packed(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A batch as `Packed` takes it."""
    return torch.stack([batch["input_ids"], batch["attention_mask"]], 1), batch["labels"]


def bert_with_normed_adapters() -> nn.Module:
    """With adapters whose norm is taken of their product with the identity (DoRA)."""
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, use_dora=True)
    return _random(lambda: peft.get_peft_model(bert(), config))


def deberta() -> nn.Module:
    """Its layers project relative positions too, which all sentences share."""
    config = transformers.DebertaV2Config(
        vocab_size=WORDS,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=TOKENS,
        type_vocab_size=0,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=4,
        num_labels=CLASSES,
    )
    return _random(lambda: transformers.DebertaV2ForSequenceClassification(config))


def xlnet() -> nn.Module:
    """Time stands before sentences in its feed-forward layers."""
    config = transformers.XLNetConfig(
        vocab_size=WORDS, d_model=4, n_layer=1, n_head=2, d_inner=6, num_labels=CLASSES, use_mems_eval=False
    )
    return _random(lambda: transformers.XLNetForSequenceClassification(config))


def mamba() -> nn.Module:
    """Multiplies by the weights of two of its layers itself."""
    config = transformers.MambaConfig(vocab_size=WORDS, hidden_size=4, num_hidden_layers=1, state_size=3)
    return _random(lambda: transformers.MambaForCausalLM(config))
