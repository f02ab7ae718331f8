"""A driver's last words: the progress document, shortened to what the kubelet keeps of them.

Written by `influence drive` into the container's termination message, where the operator reads it when
nobody answers at `/progress` any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from influence_job.document import TERMINATION_BYTES
from influence_job.progress import Problem, Progress, bounded

log = logging.getLogger(__name__)


def leave(path: Path, progress: Progress) -> None:
    """Writes the last words. A driver that cannot ends as it would have ended."""
    try:
        path.write_bytes(shortened(progress, TERMINATION_BYTES))
    except Exception as error:
        log.warning("the termination message cannot be written: %s", error)


def shortened(progress: Progress, limit: int) -> bytes:
    """The document as JSON of at most `limit` bytes, without what matters least to those who read it."""
    for shorten in _STEPS:
        progress = shorten(progress)
        try:
            text = progress.model_dump_json(by_alias=True).encode()
        except ValueError:  # a result that holds what no JSON can
            continue
        if len(text) <= limit:
            return text
    return _essence(progress).model_dump_json(by_alias=True).encode()


def _as_it_is(progress: Progress) -> Progress:
    return progress


def _with_warnings(most: int, characters: int, progress: Progress) -> Progress:
    warnings = [bounded(warning, characters) for warning in progress.warnings[:most]]
    return progress.model_copy(update={"warnings": warnings})


def _with_message(characters: int, progress: Progress) -> Progress:
    error = progress.last_error
    if error is None:
        return progress
    shorter = Problem(reason=error.reason, message=bounded(error.message, characters))
    return progress.model_copy(update={"last_error": shorter})


def _without_stages(progress: Progress) -> Progress:
    return progress.model_copy(update={"stages": []})


def _without_url(progress: Progress) -> Progress:
    """The spec says the url, too."""
    result = {name: value for name, value in (progress.result or {}).items() if name != "url"}
    return progress.model_copy(update={"result": result or None})


def _essence(progress: Progress) -> Progress:
    """What decides whether another attempt follows, in less than a kilobyte."""
    last = progress.last_error
    return Progress(
        contract_version=progress.contract_version,
        job_uid=progress.job_uid,
        attempt=progress.attempt,
        stage=progress.stage,
        recorded=progress.recorded,
        finished=progress.finished,
        last_error=last and Problem(reason=last.reason, message=bounded(last.message, 32)),
    )


_STEPS: tuple[Callable[[Progress], Progress], ...] = (
    _as_it_is,
    partial(_with_warnings, 5, 128),
    partial(_with_warnings, 0, 0),
    partial(_with_message, 1024),
    partial(_with_message, 512),
    _without_stages,
    _without_url,
    partial(_with_message, 256),
)
