"""The Dask scheduler's HTTP API: who is connected, and whom to retire.

The image is the tenant's, so that answers are parsed and bounded and only JSON is spoken: the scheduler's
own port, where pickles go both ways, is never used. Called by `cluster.apply` when workers are to go.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from influence_operator.cluster.bounded_http import BoundedHttp, host
from influence_operator.cluster.errors import BadAnswerError
from influence_operator.manifests.names import DASHBOARD_PORT

READ_SECONDS = 2.0
RETIRE_SECONDS = 30.0
"""Retiring copies results to other workers first."""
MOST_BYTES = 4 * 1024 * 1024
"""A thousand workers, each with the few kB that the scheduler tells of one."""
AT_ONCE = 16

Name = Annotated[str, Field(max_length=253)]


class _Worker(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)  # Dask's own default names are numbers

    name: Name
    address: Annotated[str, Field(max_length=512)] = ""


class _Workers(BaseModel):
    workers: Annotated[list[_Worker], Field(max_length=10_000)]


_Retired = TypeAdapter(dict[Annotated[str, Field(max_length=512)], _Worker])


class SchedulerClient:
    """Speaks to the schedulers of jobs."""

    def __init__(self, port: int = DASHBOARD_PORT) -> None:
        self._http = BoundedHttp(AT_ONCE)
        self._port = port

    async def workers(self, pod_ip: str) -> dict[str, str]:
        """Name -> address of every connected worker.

        Raises:
            ClusterError: no answer, or none that can be used.
        """
        url = self._url(pod_ip, "get_workers")
        answer = await self._http.fetch("GET", url, seconds=READ_SECONDS, most_bytes=MOST_BYTES)
        try:
            workers = _Workers.model_validate_json(answer).workers
        except ValidationError as error:
            raise BadAnswerError(f"{url}: {error.error_count()} fields are not as documented") from error
        return {worker.name: worker.address for worker in workers}

    async def retire(self, pod_ip: str, count: int) -> tuple[str, ...]:
        """Has the scheduler choose `count` workers and move their results away; returns their names.

        Raises:
            ClusterError: no answer, or none that can be used.
        """
        url = self._url(pod_ip, "retire_workers")
        answer = await self._http.fetch(
            "POST", url, seconds=RETIRE_SECONDS, most_bytes=MOST_BYTES, body={"n": count}
        )
        try:
            return tuple(worker.name for worker in _Retired.validate_json(answer).values())
        except ValidationError as error:
            raise BadAnswerError(f"{url}: {error.error_count()} fields are not as documented") from error

    async def close(self) -> None:
        """Ends all connections."""
        await self._http.close()

    def _url(self, pod_ip: str, call: str) -> str:
        return f"http://{host(pod_ip)}:{self._port}/api/v1/{call}"
