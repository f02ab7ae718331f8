"""The driver's batch/v1 Job: one pod that starts before any worker, and that only the operator retries."""

from __future__ import annotations

from influence_job.document import METRICS_PORT, PROGRESS_PORT
from influence_job.exit_codes import ExitCode
from influence_operator.manifests.child import Attempt, Manifest
from influence_operator.manifests.names import Role
from influence_operator.manifests.pods import pod_metadata, pod_spec


def driver_job(attempt: Attempt) -> Manifest:
    """The Job. Its controller replaces a pod that was disrupted, within the attempt, and no other."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": attempt.metadata(attempt.base, Role.DRIVER),
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            # Two drivers of one attempt never overlap, as far as the kubelet can tell.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": Role.DRIVER.value,
                            "operator": "In",
                            "values": [ExitCode.PERMANENT.value],
                        },
                    },
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {
                "metadata": pod_metadata(attempt, Role.DRIVER),
                "spec": {
                    "restartPolicy": "Never",
                    **pod_spec(attempt, Role.DRIVER, _container()),
                },
            },
        },
    }


def _container() -> Manifest:
    health = {"httpGet": {"path": "/healthz", "port": "progress"}}
    return {
        "command": ["influence", "drive"],
        "ports": [
            {"name": "progress", "containerPort": PROGRESS_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        "startupProbe": {**health, "periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": 300},
        # Ends only a driver that is frozen for good: an entry point's imports may hold it for minutes.
        "livenessProbe": {**health, "periodSeconds": 20, "timeoutSeconds": 10, "failureThreshold": 30},
        "terminationMessagePath": "/dev/termination-log",
    }
