"""From a driver's progress document to the parts of the status that show it.

A job's pods run users' code: every text is made printable and short, every number finite and small enough
for JSON, whatever the document holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from influence_job.progress import Progress, StageTimes
from influence_job.status import ProgressStatus, ResultStatus, StageStatus
from influence_operator.decisions import observed, words

LARGEST = 2**53
"""Beyond it JSON readers disagree."""


def progress_status(progress: Progress, now: datetime) -> ProgressStatus:
    """Regions of the present stage, as of now."""
    regions = progress.regions
    done, total = min(regions.done, LARGEST), min(regions.total, LARGEST)
    eta = _seconds(progress.eta_seconds)
    return ProgressStatus(
        done=done,
        total=total,
        failed=min(regions.failed, LARGEST),
        percent=min(100, 100 * done // total) if total else 0,
        display=f"{done}/{total}"[:32] if total else "",
        rate=_rate(progress.rate),
        eta_seconds=eta,
        eta=_duration(eta) if eta is not None else None,
        updated=now,
    )


def stage_times(progress: Progress) -> list[StageStatus]:
    """When each stage ran."""
    times = (_stage(stage) for stage in progress.stages[:16])
    return [stage for stage in times if stage]


def warnings(progress: Progress) -> list[str]:
    """What the driver warned of."""
    return [words.sentence(warning) for warning in progress.warnings[:20]]


def result(progress: Progress | None, url: str) -> ResultStatus:
    """What was stored, at least where."""
    said: Mapping[str, Any] = (progress.result if progress else None) or {}
    shape = said.get("shape")
    sizes = [size for size in shape if _is_size(size)] if isinstance(shape, list | tuple) else None
    return ResultStatus(
        url=words.sentence(observed.text(said, "url"), 2048) or words.sentence(url, 2048),
        shape=sizes if sizes is not None and sizes == list(shape or ()) and len(sizes) <= 16 else None,
        dtype=words.sentence(observed.text(said, "dtype"), 32) or None,
        bytes=said["bytes"] if _is_size(said.get("bytes")) else None,
        digest=words.sentence(observed.text(said, "digest"), 128) or None,
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _stage(stage: StageTimes) -> StageStatus | None:
    start = observed.in_utc(stage.start)
    end = observed.in_utc(stage.end) if stage.end else None
    return StageStatus(name=stage.name, start=start, end=end) if start else None


def _rate(rate: float | None) -> float | None:
    if rate is None or not math.isfinite(rate) or not 0 <= rate <= LARGEST:
        return None
    return float(f"{rate:.3g}")


def _seconds(eta: float | None) -> int | None:
    if eta is None or not math.isfinite(eta) or not 0 <= eta <= LARGEST:
        return None
    return round(eta)


def _duration(seconds: int) -> str:
    """As kubectl prints ages: 39s, 12m, 5h, 3d."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
