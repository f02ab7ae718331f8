"""Pod settings that dask-kubernetes would lose are named before anything is created.

When dask-kubernetes changes, this writes the schema anew:
`.venv/bin/python tests/unit/influence_operator/manifests/test_frozen_pod_spec.py`
"""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[4] / "tests" / "support"))

from attempts import build, from_file, job, spec_of
from dask_crd import cluster_schema, dropped, mistakes
from influence_job.spec import PodSettings
from influence_operator.manifests.frozen_pod_spec import refused_settings

SCHEMA = Path(str(files("influence_operator.manifests"))) / "frozen_pod_spec.json"


def cut() -> str:
    """The schema of what a user may set, one field a line."""
    spec = cluster_schema()["properties"]["spec"]["properties"]["worker"]["properties"]["spec"]["properties"]
    fields = {**spec["containers"]["items"]["properties"], **spec}
    own = {field.alias for field in PodSettings.model_fields.values()}
    lines = [
        f'"{name}": {json.dumps(_short(fields[name]), separators=(",", ":"))}'
        for name in sorted(own & fields.keys())
        if fields[name]["type"] == "array" or name == "affinity"
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _short(schema: dict[str, Any]) -> Any:
    if schema["type"] == "array":
        return [_short(schema["items"])]
    if schema["type"] != "object":
        return schema["type"]
    required = schema.get("required", [])
    named = {f"{k}!" if k in required else k: _short(v) for k, v in schema.get("properties", {}).items()}
    if "additionalProperties" in schema:
        return {"*": _short(schema["additionalProperties"])}
    return named


def test_the_committed_schema_is_that_of_the_dask_kubernetes_we_install() -> None:
    assert SCHEMA.read_text() == cut()


def test_a_job_with_every_setting_is_accepted() -> None:
    assert refused_settings(spec_of(from_file(Path(__file__).parent / "everything.yaml"))) == ()
    assert refused_settings(spec_of(job())) == ()


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"volumes": [{"name": "m", "image": {"reference": "x"}}]}, "volumes[0].image"),
        (
            {"volumeMounts": [{"name": "m", "mountPath": "/m", "recursiveReadOnly": "Enabled"}]},
            "volumeMounts[0].recursiveReadOnly",
        ),
        (
            {
                "topologySpreadConstraints": [
                    {"maxSkew": 1, "topologyKey": "z", "whenUnsatisfiable": "DoNotSchedule", "minDomains": 2}
                ]
            },
            "topologySpreadConstraints[0].minDomains",
        ),
        ({"env": [{"name": "A", "valueFrom": {"fileKeyRef": {}}}]}, "env[0].valueFrom.fileKeyRef"),
    ],
)
def test_a_field_that_would_be_dropped_is_named(settings: dict[str, Any], path: str) -> None:
    stored = job(workers=settings)
    (problem,) = refused_settings(spec_of(stored))
    assert problem.startswith(f"spec.workers.{path}: unknown to dask-kubernetes")
    assert list(dropped(build(stored).dask_cluster, cluster_schema()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": [{"name": 5}]}, 'spec.workers.env[0].name: expected text, got 5; write "5"'),
        ({"env": [{"value": "x"}]}, "spec.workers.env[0].name: required, but absent"),
        ({"env": [{"name": "A", "value": True}]}, "spec.workers.env[0].value: expected text, got True"),
        (
            {"volumes": [{"name": "v", "emptyDir": {"sizeLimit": 1024}}]},
            'spec.workers.volumes[0].emptyDir.sizeLimit: expected text, got 1024; write "1024"',
        ),
        ({"volumes": [{"name": "v", "emptyDir": []}]}, "emptyDir: expected a mapping, got a list"),
        (
            {"tolerations": [{"tolerationSeconds": True}]},
            "spec.workers.tolerations[0].tolerationSeconds: expected a whole number, got True",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(settings: dict[str, Any], message: str) -> None:
    stored = job(workers=settings)
    (problem,) = refused_settings(spec_of(stored))
    assert message in problem
    assert list(mistakes(build(stored).dask_cluster, cluster_schema()))


def test_what_the_driver_alone_uses_is_left_to_the_api_server() -> None:
    assert refused_settings(spec_of(job(driver={"volumes": [{"name": "m", "image": {}}]}))) == ()


def test_many_problems_make_a_short_message() -> None:
    problems = refused_settings(spec_of(job(podDefaults={"env": [{}] * 50})))
    assert len(problems) == 6
    assert problems[-1] == "and 45 more"


if __name__ == "__main__":
    SCHEMA.write_text(cut())
