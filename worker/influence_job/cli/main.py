"""The entry point: the group of commands, and the one place where an error becomes a message and a code.

Exit codes are those of `influence_job.exit_codes`: 0 done, 1 unforeseen, 64 no retry can cure it (usage
errors too), 75 run it again, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from influence_job.cli.crd import crd
from influence_job.cli.drive import drive
from influence_job.cli.options import Settings
from influence_job.cli.plan import plan
from influence_job.cli.run import run
from influence_job.cli.show import show
from influence_job.cli.watch import watch
from influence_job.errors import JobError
from influence_job.exit_codes import ExitCode


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done; 64 the input must change first; 75 run it again, it resumes; 130 Ctrl-C; 1 a "
    "defect.",
)
@click.version_option(package_name="influence-operator", message="influence %(version)s")
def commands() -> None:
    """Find the training examples that made a model do what it does.

    A job is a YAML file that names your model, your data and a method. The same file runs here and in a
    Kubernetes cluster.

    \b
    influence plan digits.yaml                        what it would take
    influence run digits.yaml --output digits.zarr    compute; run it again to resume
    influence show digits.zarr                        the training examples behind each test example
    """  # noqa: D301 - `\b` is click's mark for lines to be left as they are


commands.add_command(run)
commands.add_command(plan)
commands.add_command(show)
commands.add_command(drive)
commands.add_command(watch)
commands.add_command(crd)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits."""
    sys.exit(execute(arguments))


def execute(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    settings = Settings()
    try:
        code = commands.main(
            args=None if arguments is None else list(arguments),
            prog_name="influence",
            standalone_mode=False,
            obj=settings,
        )
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return ExitCode.PERMANENT
    except click.ClickException as error:
        error.show()
        return ExitCode.PERMANENT
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted; what was done is kept: run it again and it resumes", settings)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # `influence show URL | head`: the reader has seen enough. What Python flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except JobError as error:
        _say(f"error: {error.reason}: {error.message}", settings)
        return error.exit_code
    except Exception as error:
        hint = "" if settings.verbose else "\n  run it again with -v to see where"
        _say(f"error: {type(error).__name__}: {error}{hint}", settings)
        return ExitCode.INTERNAL
    return code if isinstance(code, int) else ExitCode.DONE


def _say(message: str, settings: Settings) -> None:
    if settings.verbose:
        traceback.print_exc()
    click.echo(message, err=True)
