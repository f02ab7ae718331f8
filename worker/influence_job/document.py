"""The job document: what the operator tells a driver, in a file of an immutable ConfigMap.

Written by the operator, read by `influence drive`. Pydantic and the standard library only.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from influence_job.progress import CONTRACT_VERSION
from influence_job.spec import InfluenceJob

FILE = "job.json"
"""Key in the ConfigMap."""
DIRECTORY = "/etc/influence/job"
"""Where the ConfigMap is mounted in the driver."""
SOURCE_DIRECTORY = "/etc/influence/task"
"""Where the copy of `task.source.configMap` is mounted in all three roles; entry points are looked for in it
first."""
TLS_DIRECTORY = "/etc/influence/tls"
"""Where the attempt's `ca.crt`, `tls.crt` and `tls.key` are mounted in all three roles."""
CREDENTIALS_DIRECTORY = "/etc/influence/credentials"
"""Where `output.credentialsSecretRef` is mounted in driver and workers; it is also in the environment."""
PROGRESS_PORT = 8080
"""`/progress` and `/healthz` of the driver."""
METRICS_PORT = 9090
"""`/metrics` of the driver."""
WORKER_PORT = 40000
"""The Dask workers' port."""
TERMINATION_BYTES = 4096
"""The kubelet keeps so much of a termination message."""
PROGRESS_BYTES = 64 * 1024
"""The operator reads so much of `/progress`."""


class JobDocument(BaseModel):
    """One attempt of one job, with every default of the operator filled in."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    contract_version: int = CONTRACT_VERSION
    uid: str = Field(max_length=64)
    attempt: int = Field(ge=1)
    scheduler: str = Field(max_length=512)
    """Address of the Dask scheduler, tls://..."""
    job: InfluenceJob
