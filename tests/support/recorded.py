"""Shows at the end of a run what its tests recorded with `record_property`: figures, which nobody asserts.

A hook of pytest that `tests/conftest.py` imports.
"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(specname="pytest_terminal_summary")
def pytest_terminal_summary_of_figures(terminalreporter: Any) -> None:
    """One line per figure."""
    figures = [
        f"{report.nodeid.rpartition('::')[2]}: {name} {value}"
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
    ]
    if figures:
        terminalreporter.section("recorded")
        for figure in figures:
            terminalreporter.line(figure)
