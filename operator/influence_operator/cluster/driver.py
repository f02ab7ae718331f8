"""What a driver says of itself at `/progress`. Called by `cluster.gather` while a driver's pod runs."""

from __future__ import annotations

from pydantic import ValidationError

from influence_job.document import PROGRESS_PORT
from influence_job.progress import CONTRACT_VERSION, Progress
from influence_operator.cluster.bounded_http import BoundedHttp, host
from influence_operator.cluster.errors import ClusterError, UnreachableError
from influence_operator.decisions.driver import Envelope
from influence_operator.decisions.snapshot import DriverReport

SECONDS = 2.0
MOST_BYTES = 64 * 1024
AT_ONCE = 16


class DriverClient:
    """Asks drivers for their progress."""

    def __init__(self, port: int = PROGRESS_PORT) -> None:
        self._http = BoundedHttp(AT_ONCE)
        self._port = port

    async def report(self, pod_ip: str, job_uid: str, attempt: int) -> DriverReport:
        """What the driver at this address says, or why that says nothing. Never raises."""
        url = f"http://{host(pod_ip)}:{self._port}/progress"
        try:
            answer = await self._http.fetch("GET", url, seconds=SECONDS, most_bytes=MOST_BYTES)
        except UnreachableError as error:
            cure = f"let the operator's pods reach TCP port {self._port} of the driver's pod"
            return DriverReport(attempt, None, f"{error}; {cure}")
        except ClusterError as error:
            return DriverReport(attempt, None, str(error))
        return parse(answer, job_uid, attempt)

    async def close(self) -> None:
        """Ends all connections."""
        await self._http.close()


def parse(answer: bytes, job_uid: str, attempt: int) -> DriverReport:
    """The document in `answer`, if it is one about this attempt of this job."""
    try:
        envelope = Envelope.model_validate_json(answer)
    except ValidationError as error:
        return DriverReport(attempt, None, _problem(error))
    if (envelope.job_uid, envelope.attempt) != (job_uid, attempt):
        return DriverReport(
            attempt,
            None,
            f"expected attempt {attempt} of job {job_uid}, got attempt {envelope.attempt} of "
            f"{envelope.job_uid}",
        )
    try:
        return DriverReport(attempt, Progress.model_validate_json(answer))
    except ValidationError as error:
        if envelope.contract_version == CONTRACT_VERSION:
            return DriverReport(attempt, None, _problem(error))
    return DriverReport(attempt, envelope.progress())


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "document"
    return f"{field}: {first['msg']}"[:512]
