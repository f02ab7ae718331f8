"""Writes what is generated below charts/: CRDs, the chart of dask-kubernetes, install.yaml.

`make manifests` calls it; tests hold the committed files against `chart_files` and `install`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import dask_kubernetes

CHARTS = Path(__file__).parent
CHART = CHARTS / "influence-operator"
VENDORED = CHART / "charts/dask-kubernetes-operator"
DASK_CRDS = CHART / "files/dask-kubernetes"
INSTALL = CHARTS / "install.yaml"
NAMESPACE = "influence-system"
KUBERNETES = "1.35.0"
"""What to render for: a helm that was built with `go install` takes itself for an old Kubernetes."""

_DASK = distribution("dask-kubernetes")
_ORIGINAL = Path(dask_kubernetes.__file__).parent / "operator/deployment/helm/dask-kubernetes-operator"
_CHANGES = [
    # Released charts have these filled in by the release's script, the one in the wheel has not.
    ("Chart.yaml", "0.0.1-set.by.chartpress", _DASK.version),
    ("Chart.yaml", "2022.4.1", _DASK.version),
    ("values.yaml", "set-by-chartpress", _DASK.version),
    # Helm calls a chart by its alias, daskOperator, which is no valid name of a container.
    ("templates/_helpers.tpl", ".Chart.Name", '"dask-kubernetes-operator"'),
    ("templates/deployment.yaml", "{{ .Chart.Name }}", "dask-kubernetes-operator"),
    # `kubectl apply` knows no namespace of a release.
    (
        "templates/deployment.yaml",
        'fullname" . }}\n  labels',
        'fullname" . }}\n  namespace: {{ .Release.Namespace }}\n  labels',
    ),
    (
        "templates/serviceaccount.yaml",
        'Name" . }}\n  labels',
        'Name" . }}\n  namespace: {{ .Release.Namespace }}\n  labels',
    ),
]
_README = f"""\
# dask-kubernetes-operator {_DASK.version}

The Helm chart in the wheel of [dask-kubernetes](https://github.com/dask/dask-kubernetes), copied by
`make manifests` under its own licence (`LICENSE`, BSD 3-Clause). Changed:

* its version and its image's tag are filled in;
* its name is written out, since Helm calls it by its alias, which is no valid name of a container;
* its namespaced objects name their namespace;
* its CRDs are templates of the chart around it, so that an upgrade upgrades them.
"""
_HEADER = f"""\
# Made by `make manifests` from charts/influence-operator.
# kubectl apply --server-side --filename install.yaml
---
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    pod-security.kubernetes.io/enforce: restricted
"""


def chart_files() -> dict[Path, str]:
    """The chart's generated files: the CRD of InfluenceJob, and everything of dask-kubernetes."""
    files = {CHART / "files/crds/influencejobs.yaml": _influence_crd()}
    for path in sorted((_ORIGINAL / "crds").glob("*.yaml")):
        files[DASK_CRDS / path.name] = path.read_text()
    for path in [
        _ORIGINAL / "Chart.yaml",
        _ORIGINAL / "values.yaml",
        *sorted((_ORIGINAL / "templates").iterdir()),
    ]:
        name = str(path.relative_to(_ORIGINAL))
        files[VENDORED / name] = _changed(name, path.read_text())
    licence = next(path for path in _DASK.files or () if path.name == "LICENSE").read_text()
    return files | {VENDORED / "README.md": _README, VENDORED / "LICENSE": licence}


def install(helm: str) -> str:
    """The chart with its defaults as plain manifests."""
    command = [helm, "template", "influence-operator", str(CHART), "--namespace", NAMESPACE]
    command += ["--kube-version", KUBERNETES]
    return _HEADER + subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _changed(name: str, text: str) -> str:
    for file, old, new in _CHANGES:
        if file == name:
            if old not in text:
                raise ValueError(f"{_ORIGINAL / name}: expected {old!r} to replace it: look at what changed")
            text = text.replace(old, new)
    return text


def _influence_crd() -> str:
    command = [str(Path(sys.executable).with_name("influence")), "crd"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Writes all of them."""
    helm = shutil.which("helm")
    if helm is None:
        sys.exit("manifests.py: expected helm in PATH, found none: install it; `make cluster` builds it, too")
    for path, text in chart_files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    INSTALL.write_text(install(helm))


if __name__ == "__main__":
    main()
