"""`influence run`: a job on this machine."""

from __future__ import annotations

import logging
import sys

import click

from influence_job.cli.options import (
    Settings,
    file_argument,
    job_options,
    json_option,
    only_the_document,
    read_job,
    verbose_option,
)
from influence_job.cli.progress_bar import ProgressBar
from influence_job.progress import Progress
from influence_job.spec import OnExisting


@click.command()
@file_argument
@job_options
@click.option(
    "--on-existing",
    type=click.Choice([member.value for member in OnExisting], case_sensitive=False),
    help="What to do with a store that is there, instead of spec.output.onExisting.",
)
@click.option(
    "--workers", type=click.IntRange(1, 1000), help="Worker processes. Default: one per core or GPU."
)
@click.option(
    "--progress-port", type=click.IntRange(0, 65535), help="Serve /progress and /healthz on this port."
)
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), help="Serve /metrics for Prometheus on this port."
)
@json_option
@verbose_option
@click.pass_obj
def run(
    settings: Settings,
    file: str,
    device: str | None,
    output: str | None,
    on_existing: str | None,
    workers: int | None,
    progress_port: int | None,
    metrics_port: int | None,
    as_json: bool,
) -> None:
    """Run the job in FILE on this machine.

    The result is one Zarr group at the job's output url. Kill it whenever you like: the same command goes
    on where it stopped, with any number of workers, and the result is the same to the last bit.

    \b
    influence run examples/digits.yaml --output digits.zarr
    influence run job.yaml --workers 8 --device cpu
    influence run job.yaml --json | jq .result.digest      the last progress document
    """  # noqa: D301 - `\b` is click's mark for lines to be left as they are
    job = read_job(file, device=device, output=output, on_existing=on_existing)
    from influence_job.local import run_local

    if not settings.verbose:  # after the import, which sets the level itself
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
    last: list[Progress] = []
    try:
        with only_the_document(as_json), ProgressBar(sys.stderr) as bar:

            def note(progress: Progress) -> None:
                last[:] = [progress]
                bar.update(progress)

            last[:] = [
                run_local(
                    job,
                    workers=workers,
                    on_progress=note,
                    progress_port=progress_port,
                    metrics_port=metrics_port,
                )
            ]
    finally:
        if as_json and last:
            click.echo(last[0].model_dump_json(by_alias=True, indent=2))
    if not as_json:
        click.echo(_outcome(last[0], job.spec.output.url))


def _outcome(progress: Progress, url: str) -> str:
    result = progress.result or {}
    shape = result.get("shape")
    size = " × ".join(str(extent) for extent in shape) if isinstance(shape, list) else "the result"
    seconds = 0.0
    if progress.stages and progress.stages[-1].end is not None:
        seconds = (progress.stages[-1].end - progress.stages[0].start).total_seconds()
    return f"done in {seconds:.1f} s: {size} {result.get('dtype', '')} in {url}\nnext: influence show {url}"
