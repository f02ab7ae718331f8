"""What a benchmark found, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One figure; `target` is what it is held to, None where it only informs."""

    name: str
    value: float | None
    """None where what it is a figure of failed."""
    unit: str
    target: str | None = None
    reached: bool = True


def table(findings: list[Finding]) -> str:
    """One line per figure."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        value = "failed" if finding.value is None else f"{finding.value:.4g}"
        line = f"{finding.name:<{width}}  {value:>10} {finding.unit:<3}"
        if finding.target:
            line += f"  {finding.target:>8}  {'reached' if finding.reached else 'MISSED'}"
        lines.append(line.rstrip())
    return "\n".join(lines)
