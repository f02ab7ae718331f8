"""The command line `influence`: run a job, plan it, look at its result.

This package reads arguments and draws; everything else is done by the modules below it. Commands import
what they need when they are called, so that `--help` does not wait for torch.
"""

from influence_job.cli.main import main

__all__ = ["main"]
