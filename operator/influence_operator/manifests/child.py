"""One attempt of a job, as every builder here gets it, and the metadata that its children share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from influence_job.spec import InfluenceJobSpec, PodSettings
from influence_operator.decisions.snapshot import Object
from influence_operator.manifests import names
from influence_operator.manifests.names import Role
from influence_operator.manifests.pod_settings import merged
from influence_operator.settings import Settings

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """What an attempt's manifests are made from."""

    job: Object
    """The InfluenceJob as stored."""
    spec: InfluenceJobSpec
    number: int
    """From 1."""
    settings: Settings
    source: Object | None
    """The ConfigMap that `task.source.configMap` names."""

    @property
    def job_name(self) -> str:
        return str(self.job["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.job["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        return str(self.job["metadata"]["uid"])

    @property
    def base(self) -> str:
        """The name of the children."""
        return names.base_name(self.job_name, self.uid, self.number)

    @property
    def image(self) -> str:
        return self.spec.image or self.settings.defaults.image

    @cached_property
    def _pods(self) -> dict[Role, PodSettings]:
        own = {
            Role.DRIVER: self.spec.driver,
            Role.SCHEDULER: self.spec.scheduler,
            Role.WORKER: self.spec.workers,
        }
        return {role: merged(role, settings, self.spec.pod_defaults) for role, settings in own.items()}

    def pod(self, role: Role) -> PodSettings:
        """The user's settings of one role, merged with `podDefaults`."""
        return self._pods[role]

    def metadata(self, name: str, role: Role | None = None) -> Manifest:
        """Of a child: name, our labels and its owner; none of the job's labels, which tools track."""
        return {
            "name": name,
            "namespace": self.namespace,
            "labels": names.labels(self.job_name, self.uid, self.number, role),
            "ownerReferences": [names.owner_reference(self.job)],
        }

    def selector(self, role: Role | None = None) -> Manifest:
        """A label selector of the attempt's pods."""
        return {"matchLabels": names.pod_selector(self.uid, self.number, role)}
