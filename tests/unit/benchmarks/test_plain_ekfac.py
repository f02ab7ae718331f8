"""The plain implementation, which benchmarks hold our numbers to."""

from __future__ import annotations

import torch
from plain_ekfac import plain_ekfac
from torch import nn


def test_chunks_change_nothing():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)]
    model = nn.Sequential(*layers).double()
    train, test = ((torch.randn(n, 2, 5, 5).double(), torch.randint(4, (n,))) for n in (24, 3))
    whole, chunked = (plain_ekfac(model, train, test, 0.1, None, chunk) for chunk in (None, 8))
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
