"""The command `influence-operator`: the process of the operator's image.

Configured by environment variables, one per field of `influence_operator.settings`. In a pod it uses the
service account; anywhere else $KUBECONFIG, which serves for trying it against a test cluster, as long as
pods can be reached from there:

    INFLUENCE_OPERATOR_IMAGE=... INFLUENCE_OPERATOR_NAMESPACE=default KUBECONFIG=... influence-operator
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from kubernetes.aio.config import ConfigException

from influence_job.exit_codes import ExitCode
from influence_operator import logs, process
from influence_operator.settings import Settings, read


def main() -> None:
    """Runs the operator until it is told to stop.

    Exit codes: 0 told to stop; 1 the lease was lost, or a defect: start it anew; 64 settings.
    """
    try:
        settings = read(os.environ)
    except ValueError as error:
        print(f"influence-operator: {error}", file=sys.stderr)  # noqa: T201 - no logging before settings
        sys.exit(ExitCode.PERMANENT)
    logs.configure(settings.log_format, settings.log_level)
    code = _run(settings)
    logging.shutdown()
    # kopf's threads have nothing to finish, and waiting for them would take seconds.
    os._exit(code)


def _run(settings: Settings) -> int:
    try:
        return asyncio.run(process.run(settings))
    except ConfigException as error:
        logging.getLogger(__name__).error(
            "no cluster: expected a service account or a file that KUBECONFIG names: %s", error
        )
        return ExitCode.PERMANENT
    except OSError as error:
        logging.getLogger(__name__).error("cannot serve probes and metrics: %s", error)
        return ExitCode.INTERNAL
    except Exception:
        logging.getLogger(__name__).exception("the operator ends with a defect")
        return ExitCode.INTERNAL
