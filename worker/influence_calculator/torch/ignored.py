"""Arguments that pyDVL's signatures have and that change nothing here: whoever gives one is told."""

from __future__ import annotations

from influence_calculator.torch.user_warnings import warn_user

SEE_REPORT = "see solver_report"


def warn_of_no_effect(why: str, **given: bool) -> None:
    """One UserWarning for each argument that was given."""
    for name, value in given.items():
        if value:
            warn_user(f"{name} has no effect: {why}", UserWarning)
