"""How fast EK-FAC could be on this machine: its arithmetic at the rate of matrix products of its shapes.

Shapes: a layer has i inputs (one more with a bias), o outputs and S tokens per example; P = Σ i·o.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

Rate = Callable[[int, int, int, int], float]
"""`rate(batch, m, k, n)`: FLOP per second of `batch` products `[m, k] @ [k, n]` on all cores."""


class Layer(NamedTuple):
    """What one layer costs by."""

    inputs: int
    """i, the bias's 1 included."""
    outputs: int
    """o"""
    tokens: int = 1
    """S"""


def layers(model: nn.Module, x: Tensor) -> list[Layer]:
    """The model's Linear and Conv2d layers in the order of their calls, for the one example `x`."""
    found: list[Layer] = []

    def record(module: nn.Module, inputs: object, outputs: Tensor) -> None:
        weight = module.get_parameter("weight")
        o = weight.shape[0]
        inputs_and_bias = weight[0].numel() + (getattr(module, "bias", None) is not None)
        found.append(Layer(inputs_and_bias, o, outputs.numel() // o))

    hooked = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [module.register_forward_hook(record) for module in hooked]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def physical_bound(
    layers: Sequence[Layer], train: int, test: int, chunk: int, rate: Rate, bytes_per_second: float
) -> float:
    """Seconds that EK-FAC fit and score take at least, when `chunk` examples are differentiated at once.

    Per training example: 3 captures (2 in the fit, 1 in the score; each a forward, 2Sio, and activation
    gradients, 2Sio, none below the first layer), covariances and the rotation of captures at 2S(i² + o²)
    each, per-sample gradients 2PS twice. Per test example: 1 capture, 2PS. To score, either every test
    gradient is rotated there and back, 4io(i + o), or the captures of both sides are, 2S(i² + o²).
    Eigenproblems 10(i³ + o³) per layer. 2P FLOP and 4 bytes per pair.
    """
    seconds = 0.0
    P = sum(layer.inputs * layer.outputs for layer in layers)
    for position, (i, o, S) in enumerate(layers):
        rows = chunk * S
        capture = 2 * S * i * o / rate(1, rows, i, o)
        if position > 0:
            capture += 2 * S * i * o / rate(1, rows, o, i)
        gradient = 2 * S * i * o / rate(chunk, o, S, i)
        covariance = 2 * S * (i * i / rate(1, i, rows, i) + o * o / rate(1, o, rows, o))
        rotation = 2 * S * (i * i / rate(1, rows, i, i) + o * o / rate(1, rows, o, o))
        seconds += train * (3 * capture + covariance + rotation + 2 * gradient)
        turn = 4 * i * o * (o / rate(chunk, o, o, i) + i / rate(chunk, o, i, i))
        seconds += test * (capture + gradient) + min(test * turn, (test + train) * rotation)
        seconds += 10 * (i**3 / rate(1, i, i, i) + o**3 / rate(1, o, o, o))
    pair = max(2 * P / rate(1, test, P, chunk), 4 / bytes_per_second)
    return seconds + train * test * pair


@contextmanager
def measured_rate(cores: int) -> Iterator[Rate]:
    """The rate of float32 products of each shape asked for: the sum over `cores` processes of one thread
    each that compute it at the same time. One alone may be faster than when all are busy.
    """
    spawned = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = [stack.enter_context(ProcessPoolExecutor(1, spawned)) for _ in range(cores)]

        @cache
        def rate(batch: int, m: int, k: int, n: int) -> float:
            running = [process.submit(_seconds_of_product, batch, m, k, n) for process in processes]
            return sum(2 * batch * m * k * n / seconds.result() for seconds in running)

        rate(1, 1, 1, 1)  # all have started
        yield rate


def _seconds_of_product(batch: int, m: int, k: int, n: int) -> float:
    left, right, out = torch.randn(batch, m, k), torch.randn(batch, k, n), torch.empty(batch, m, n)
    if batch == 1:
        left, right, out = left[0], right[0], out[0]
    # Trials long enough to be at the same time as the other processes'.
    return shortest(lambda: torch.matmul(left, right, out=out), trials=3, at_least=0.05)


def measured_bandwidth(size: int = 2**26) -> float:
    """Bytes per second that one thread writes to memory: what `cores` threads share."""
    target = torch.empty(size, dtype=torch.uint8)
    return size / shortest(lambda: target.fill_(1))


def shortest(work: Callable[[], object], trials: int = 5, at_least: float = 0.01) -> float:
    """Seconds per call: the best of `trials`, each of as many calls as take `at_least` seconds."""
    calls, best = 1, float("inf")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while _seconds(work, calls) < at_least:
            calls *= 2
        for _ in range(trials):
            best = min(best, _seconds(work, calls) / calls)
    finally:
        torch.set_num_threads(threads)
    return best


def _seconds(work: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - start
