"""`make demo`: from nothing to a finished InfluenceJob on a real cluster on this machine, watched live.

Brings up the test cluster, builds the images, installs the chart and a storage emulator, applies
`examples/digits.yaml` with its output in that storage, watches it, and shows the result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

import chart
import cluster_storage
from cluster import CHECKOUT, Cluster, prepare
from cluster_storage import ClusterStorage

NAMESPACE = "demo"
INFLUENCE = str(Path(sys.executable).with_name("influence"))


def main() -> None:
    """Runs every step, saying which; ends with the job's exit code."""
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"== {time.monotonic() - begin:5.0f} s  {text}", flush=True)

    say("the cluster and the images (minutes the first time)")
    prepare()
    cluster = Cluster.connect()
    say("helm install influence-operator, and a storage emulator for the result")
    chart.install(cluster)
    cluster_storage.install(cluster)
    storage = ClusterStorage(cluster)
    try:
        bucket = storage.new_bucket()
        url = f"{bucket.url}/digits.zarr"
        cluster.make_namespace(NAMESPACE)
        cluster.kubectl("delete", "influencejob", "digits", "--namespace", NAMESPACE, "--ignore-not-found")
        say(f"kubectl apply -k: examples/digits.yaml, with output.url {url}")
        _apply(cluster, url, bucket.pod_options)
        environment = os.environ | {"KUBECONFIG": str(cluster.kubeconfig)}
        code = subprocess.run(
            [INFLUENCE, "watch", "digits", "--namespace", NAMESPACE], env=environment, check=False
        ).returncode
        say("kubectl get influencejobs -o wide")
        print(cluster.kubectl("get", "influencejobs", "--namespace", NAMESPACE, "--output", "wide"))
        if code == 0:
            options = ["--storage-options", json.dumps(bucket.options)]
            subprocess.run([INFLUENCE, "show", url, *options], env=environment, check=True)
        say(f"the cluster stays up: KUBECONFIG={cluster.kubeconfig}; `make cluster-down` ends it")
    finally:
        storage.close()
    raise SystemExit(code)


def _apply(cluster: Cluster, url: str, options: dict[str, Any]) -> None:
    """The example as it is, patched by kustomize as a user would."""
    patch = [
        {"op": "replace", "path": "/spec/output/url", "value": url},
        {"op": "add", "path": "/spec/output/storageOptions", "value": options},
        {"op": "add", "path": "/spec/workers/resources/requests", "value": {"cpu": "100m"}},
        {"op": "add", "path": "/spec/driver", "value": {"resources": {"requests": {"cpu": "100m"}}}},
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "digits.yaml").write_text((CHECKOUT / "examples/digits.yaml").read_text())
        document = {
            "resources": ["digits.yaml"],
            "patches": [{"target": {"kind": "InfluenceJob"}, "patch": yaml.safe_dump(patch)}],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(document))
        cluster.kubectl("apply", "--kustomize", folder, "--namespace", NAMESPACE)


if __name__ == "__main__":
    main()
