"""Arguments that pyDVL's signatures have and that change nothing here: whoever gives one is told."""

from __future__ import annotations

import warnings

SEE_REPORT = "see solver_report"


def warn_of_no_effect(why: str, *, stacklevel: int, **given: bool) -> None:
    """One UserWarning for each argument that was given; `stacklevel` as seen from the caller."""
    for name, value in given.items():
        if value:
            warnings.warn(f"{name} has no effect: {why}", UserWarning, stacklevel=stacklevel + 1)
