"""Time that passes when nothing else happens: what takes seconds is tested in none."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

Run = Callable[[Coroutine[Any, Any, None]], None]


class JumpingSelector(selectors.DefaultSelector):  # type: ignore[valid-type, misc]
    """Waits for nothing, and notes for how long it would have."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        """What is ready now. However little is left to wait, it passes."""
        self.now += max(1e-9, timeout or 0.0)
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to whatever is due next."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since it was made."""
        return self._jumping.now


@pytest.fixture
def run_at_once() -> Run:
    """Runs a scenario on a loop whose clock jumps."""

    def run(scenario: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            runner.run(scenario)

    return run
