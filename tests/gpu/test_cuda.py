"""The same numbers on a GPU: `make test-gpu`. Without a CUDA device every test here fails and says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
import zarr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import jobs
import stored
from influence_calculator import CgInfluence, DirectInfluence, EkfacInfluence
from influence_calculator.torch.base import TorchInfluenceFunctionModel

EXAMPLE = Path(__file__).parents[2] / "examples/digits.yaml"


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("torch.cuda.is_available() is False: these tests need a GPU", pytrace=False)
    return torch.device("cuda")


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 5)]
    return nn.Sequential(*layers).to(dtype).eval()


def influences(kind: str, dtype: torch.dtype, device: str) -> Tensor:
    model = network(dtype).to(device)
    loss = nn.functional.cross_entropy
    methods: dict[str, TorchInfluenceFunctionModel] = {
        "direct": DirectInfluence(model, loss, regularization=0.1),
        "cg": CgInfluence(model, loss, regularization=0.1, rtol=1e-6, atol=0.0),
        "ekfac": EkfacInfluence(model, update_diagonal=True, regularization=0.1, expectation="exact"),
    }
    x, y = data(64, 1)
    x_test, y_test = data(8, 2)
    fitted = methods[kind].fit(DataLoader(TensorDataset(x.to(dtype), y), batch_size=16))
    scores: Tensor = fitted.influences(x_test.to(dtype), y_test, x.to(dtype), y)
    assert scores.device.type == device
    return scores.double().cpu()


@pytest.mark.parametrize("kind", ["direct", "cg", "ekfac"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_a_gpu_gives_the_numbers_of_a_cpu_in_float64(kind: str, dtype: torch.dtype, bound: float) -> None:
    expected = influences(kind, torch.float64, "cpu")
    assert (influences(kind, dtype, "cuda") - expected).norm() <= bound * expected.norm()


def run(folder: Path, device: str, **changes: object) -> Path:
    """A digits job on this machine; the folder of its store."""
    document = yaml.safe_load(EXAMPLE.read_text())
    output = folder / f"{device}-{len(list(folder.iterdir()))}.zarr"
    document["spec"] |= {"device": device, "output": {"url": str(output)}, **changes}
    (folder / "job.yaml").write_text(yaml.safe_dump(document))
    command = [str(Path(sys.executable).with_name("influence")), "run", str(folder / "job.yaml")]
    subprocess.run([*command, "--workers", "1"], check=True, timeout=jobs.TIMEOUT_SECONDS)
    return output


def scores(store: Path) -> np.ndarray:
    values: np.ndarray = np.asarray(zarr.open_group(store, mode="r")["influences"])
    return values


def test_a_job_on_a_gpu_agrees_with_one_on_a_cpu(tmp_path: Path) -> None:
    on_gpu, on_cpu = scores(run(tmp_path, "cuda")), scores(run(tmp_path, "cpu"))
    assert np.linalg.norm(on_gpu - on_cpu) <= 1e-2 * np.linalg.norm(on_cpu)


def test_a_job_on_a_gpu_gives_the_same_bits_twice(tmp_path: Path) -> None:
    with stored.open_store(run(tmp_path, "cuda")) as one, stored.open_store(run(tmp_path, "cuda")) as two:
        assert stored.differing(stored.result(one), stored.result(two)) == []


@pytest.mark.parametrize("precision", ["TF32", "BFloat16"])
def test_lower_precision_keeps_the_ranking(tmp_path: Path, precision: str) -> None:
    exact, quick = scores(run(tmp_path, "cuda")), scores(run(tmp_path, "cuda", precision=precision))
    assert np.corrcoef(exact.ravel(), quick.ravel())[0, 1] >= 0.95
