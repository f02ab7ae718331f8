"""What a benchmark found, and how it is printed. Used by `run` and `operator_scale`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One figure; `target` is what it is held to, None where it only informs."""

    name: str
    value: float
    unit: str
    target: str | None = None
    reached: bool = True


def table(findings: list[Finding]) -> str:
    """One line per figure."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        line = f"{finding.name:<{width}}  {finding.value:>10.4g} {finding.unit:<3}"
        if finding.target:
            line += f"  {finding.target:>8}  {'reached' if finding.reached else 'MISSED'}"
        lines.append(line.rstrip())
    return "\n".join(lines)
