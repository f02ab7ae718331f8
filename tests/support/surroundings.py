"""What stands around a job on the test cluster and decides whether it can go on: quotas, tags of its image.

For tests that take something away or change it and then give it back.
"""

from __future__ import annotations

import machine
from cluster_jobs import ClusterJob


def quota(job: ClusterJob, **hard: int) -> None:
    """Sets the quota of the job's namespace; names with a dot or a slash stand for themselves."""
    spec = {"hard": {name: str(count) for name, count in hard.items()}}
    metadata = {"name": "small"}
    document = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": spec}
    job.cluster.apply(document, namespace=job.namespace)
    job.wait_until(
        lambda: (
            job.cluster.get("resourcequota", "small", job.namespace).get("status", {}).get("hard")
            == spec["hard"]
        ),
        "the quota in force",
        20,
    )


def tag_image(image: str, tag: str) -> str:
    """Gives an image of the test cluster's registry one more tag, as a push does; returns its new name."""
    host, _, name = image.partition("/")
    repository, _, old = name.rpartition(":")
    manifests = f"http://{host}/v2/{repository}/manifests"
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = machine.inside(
        "curl", "--fail", "--silent", "--header", f"Accept: {kind}", f"{manifests}/{old}"
    )
    put = ("--request", "PUT", "--header", f"Content-Type: {kind}", "--data-binary", manifest)
    machine.inside("curl", "--fail", "--silent", *put, f"{manifests}/{tag}")
    return f"{host}/{repository}:{tag}"
