"""Whole manifests against committed files, so that a change of a builder is seen in a review.

After a change that is meant: `.venv/bin/python tests/unit/influence_operator/manifests/test_golden.py` writes
them anew; read the difference before you commit it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "support"))

from attempts import all_of, build, from_file  # noqa: E402  the script finds its support first
from influence_job.progress import CONTRACT_VERSION  # noqa: E402
from influence_job.spec import InfluenceJobSpec  # noqa: E402

SOURCE = {
    "kind": "ConfigMap",
    "metadata": {"name": "my-task", "namespace": "research"},
    "data": {"my_task.py": "from my_model import model\n", "my_model.py": "model = None\n"},
    "binaryData": {"weights.npy": "k05VTVBZ"},
}
CASES = {
    "digits": (ROOT / "examples" / "digits.yaml", None),
    "everything": (HERE / "everything.yaml", SOURCE),
}


class _Dumper(yaml.SafeDumper):
    """Lines of text as a block, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def rendered(case: str) -> str:
    path, source = CASES[case]
    manifests = all_of(build(from_file(path), source, attempt=2))
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=1000)


@pytest.mark.parametrize("case", CASES)
def test_the_manifests_of_an_attempt_are_those_that_were_reviewed(case: str) -> None:
    golden = HERE / "golden" / f"{case}.yaml"
    assert rendered(case) == golden.read_text()


DEFAULTS = HERE / "golden" / f"defaults-{CONTRACT_VERSION}.yaml"


def defaults() -> str:
    """Every part of the spec with the defaults of its fields."""
    schema = InfluenceJobSpec.model_json_schema()
    parts = {"InfluenceJobSpec": schema, **schema["$defs"]}
    found = {
        f"{part}.{name}": field["default"]
        for part in sorted(parts)
        for name, field in sorted(parts[part].get("properties", {}).items())
        if "default" in field
    }
    return yaml.safe_dump(found)


def test_the_defaults_are_those_of_the_contracts_version() -> None:
    """The job document leaves defaults out, and an image of another release fills in its own.

    New fields are added here; whoever changes a default raises CONTRACT_VERSION.
    """
    assert defaults() == DEFAULTS.read_text()


if __name__ == "__main__":
    DEFAULTS.write_text(defaults())
    for name in CASES:
        (HERE / "golden" / f"{name}.yaml").write_text(rendered(name))
