"""What a solver's report comes to in words, for those who look at warnings and not at reports."""

from __future__ import annotations

from collections.abc import Iterable

from influence_calculator.errors import SolverWarning
from influence_calculator.maths.method import SolverReport, SolverStatus
from influence_calculator.torch.user_warnings import warn_user


def warn_of_report(report: SolverReport, *, only_not_finite: bool) -> None:
    """A SolverWarning with what did not converge, and one per note; or of what is not finite alone."""
    told = [SolverStatus.NOT_FINITE] if only_not_finite else list(SolverStatus)
    ended = _not_converged(report, told)
    for sentence in (*([ended] if ended else []), *(() if only_not_finite else report.notes)):
        warn_user(sentence, SolverWarning)


def _not_converged(report: SolverReport, told: Iterable[SolverStatus]) -> str | None:
    """One sentence with the number of solves per status; None if there is nothing to tell."""
    counts = {
        status.name.lower(): int((report.status == status.value).sum())
        for status in told
        if status is not SolverStatus.CONVERGED
    }
    ended = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if not ended:
        return None
    return (
        f"{sum(counts.values())} of {len(report.status)} right-hand sides did not converge ({ended}); "
        f"solver_report has each one"
    )
