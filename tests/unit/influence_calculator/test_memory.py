"""What a fit takes for memory that is left: no more than the machine's, the container's or the GPU's."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from influence_calculator.memory import available_bytes
from influence_calculator.torch import EkfacInfluence, base

CPU = torch.device("cpu")
GIB = 2**30


def test_without_a_limit_it_is_what_the_machine_has_left(tmp_path: Path) -> None:
    found = available_bytes(CPU, tmp_path)
    assert abs(found - psutil.virtual_memory().available) < GIB
    assert 0 < found < psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("limit", "use", "stat"),
    [
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ],
    ids=["version 2", "version 1"],
)
def test_a_container_has_left_what_it_does_not_hold(tmp_path: Path, limit: str, use: str, stat: str) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / use).write_text("70000000\n")
    (tmp_path / stat).write_text("anon 50000000\ninactive_file 20000000\n")
    (tmp_path / limit).write_text("60000000\n")
    assert available_bytes(CPU, tmp_path) == 10_000_000
    (tmp_path / limit).write_text("10000000\n")
    assert available_bytes(CPU, tmp_path) == 0
    (tmp_path / limit).write_text("max\n")
    assert available_bytes(CPU, tmp_path) > 10_000_000


def test_of_an_accelerator_that_torch_cannot_ask_nothing_is_taken() -> None:
    assert available_bytes(torch.device("meta")) == 0


def test_a_fit_keeps_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    fit = base.fit
    monkeypatch.setattr(base, "available_bytes", lambda device: 4000)
    monkeypatch.setattr(base, "fit", lambda *a, **k: given.append(k) or fit(*a, **k))
    model = nn.Linear(3, 2)
    data = DataLoader(TensorDataset(torch.randn(5, 3), torch.zeros(5).long()), batch_size=2)
    EkfacInfluence(model, update_diagonal=True, hessian_regularization=0.1).fit(data)
    assert given == [{"kept_bytes": 1000}]
