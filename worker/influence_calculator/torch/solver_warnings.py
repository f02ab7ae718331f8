"""What a solver's report comes to in words, for those who look at warnings and not at reports."""

from __future__ import annotations

import warnings

from influence_calculator.errors import SolverWarning
from influence_calculator.maths.method import SolverReport, SolverStatus


def warn_of_report(report: SolverReport, *, stacklevel: int) -> None:
    """A SolverWarning with what did not converge, and one per note; `stacklevel` as seen from the caller."""
    ended = _not_converged(report)
    for sentence in (*([ended] if ended else []), *report.notes):
        warnings.warn(sentence, SolverWarning, stacklevel=stacklevel + 1)


def _not_converged(report: SolverReport) -> str | None:
    """One sentence with the number of solves per status; None if all converged."""
    counts = {
        status.name.lower(): int((report.status == status.value).sum())
        for status in SolverStatus
        if status is not SolverStatus.CONVERGED
    }
    ended = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if not ended:
        return None
    return (
        f"{sum(counts.values())} of {len(report.status)} right-hand sides did not converge ({ended}); "
        f"solver_report has each one"
    )
