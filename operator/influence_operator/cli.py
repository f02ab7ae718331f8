"""The command `influence-operator`: the process of the operator's image."""

from __future__ import annotations


def main() -> None:
    """Runs the operator until it is told to stop."""
    raise SystemExit("not built yet")
