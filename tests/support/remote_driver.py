"""A driver whose scheduler is another process, as in a cluster: `remote_driver.py JOB ADDRESS`.

Exits with the job's exit code and leaves the last progress document on standard output. The environment's
REMOTE_GRACE_SECONDS shortens how long it waits for a scheduler.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distributed import Client

from influence_job.driver import submission
from influence_job.driver.reporting import ProgressTracker
from influence_job.driver.run import run
from influence_job.errors import JobError
from influence_job.identity import JobIdentity
from influence_job.job_file import load_job


def main(job_file: str, address: str) -> int:
    grace = float(os.environ.get("REMOTE_GRACE_SECONDS", submission.SCHEDULER_GRACE_SECONDS))
    submission.SCHEDULER_GRACE_SECONDS = grace
    job = load_job(Path(job_file).read_text(), job_file)
    identity = JobIdentity("remote", 0, "tests")
    tracker = ProgressTracker(identity, lambda _: None)
    code = 0
    try:
        run(job, identity, lambda: Client(address, timeout=10, set_as_default=False), tracker)
    except JobError as error:
        print(error, file=sys.stderr)
        code = int(error.exit_code)
    print(tracker.snapshot().model_dump_json(by_alias=True))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
