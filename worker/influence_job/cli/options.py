"""Options and arguments that several commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from influence_job.errors import PermanentError, Reason
from influence_job.job_file import load_job, parse_job
from influence_job.spec import Device, InfluenceJob, OnExisting
from influence_job.yaml_lines import Document

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Settings:
    """What holds for the whole process."""

    verbose: bool = False
    """Tracebacks and the log of Dask are shown."""


def _set_verbose(context: click.Context, _: click.Parameter, value: bool) -> bool:
    context.ensure_object(Settings).verbose |= value
    return value


verbose_option = click.option(
    "-v",
    "--verbose",
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help="Show tracebacks and the log of Dask.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, for scripts.")


@contextmanager
def only_the_document(as_json: bool) -> Iterator[None]:
    """With --json, what the task's code prints meanwhile goes to stderr, here and in processes that start."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()  # what another reference to it holds back is no part of the document
        os.dup2(kept, 1)
        os.close(kept)


file_argument = click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))


def job_options(command: Command) -> Command:
    """The options that override a job file."""
    device = click.option(
        "--device",
        type=click.Choice([member.value for member in Device]),
        help="Where to compute, instead of spec.device.",
    )
    output = click.option(
        "--output", metavar="URL", help="Path, gs:// or s3:// of the result, instead of spec.output.url."
    )
    return device(output(command))


def read_job(
    file: str, *, device: str | None = None, output: str | None = None, on_existing: str | None = None
) -> InfluenceJob:
    """The job of a file (`-` is standard input) with the options' values in place of its own.

    Raises:
        PermanentError: InvalidSpec, with every problem.
    """
    name = "standard input" if file == "-" else file
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PermanentError(
            Reason.INVALID_SPEC, f"{name}: expected a YAML file in UTF-8: {error}"
        ) from error
    job = load_job(text, name)
    given = {"url": output, "onExisting": None if on_existing is None else OnExisting(on_existing)}
    changed = {name: value for name, value in given.items() if value is not None}
    if device is None and not changed:
        return job
    document = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    document["spec"]["output"].update(changed)
    if device is not None:
        document["spec"]["device"] = device
    return parse_job(Document(document), f"{name} with the options given")
