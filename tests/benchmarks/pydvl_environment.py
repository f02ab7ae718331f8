"""pyDVL's own virtual environment, outside the checkout: its pins exclude ours.

Made when it is missing or when `pydvl-constraints.txt` changed; some 5 GB, for torch is in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("pydvl-constraints.txt")
WANTED = ["pyDVL[influence]", "scikit-learn"]


def location() -> Path:
    """`influence-bench/pydvl` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "influence-bench" / "pydvl"


def ensured() -> Path:
    """The environment's interpreter; makes the environment first if need be."""
    python = location() / "bin" / "python"
    if _differences(python):
        print(f"making pyDVL's environment in {location()} (once; some minutes)", file=sys.stderr)
        venv.create(location(), clear=True, with_pip=True)
        install = ["-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), *WANTED]
        subprocess.run([str(python), *install], check=True)
    left = _differences(python)
    if left:
        raise SystemExit(f"{location()}: expected the versions of {CONSTRAINTS.name}, but {', '.join(left)}")
    return python


def _differences(python: Path) -> list[str]:
    """What is installed in another version than the constraints say, or missing of what is wanted."""
    if not python.exists():
        return ["there is no interpreter"]
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    installed = {_normal(entry["name"]): entry["version"] for entry in json.loads(listed.stdout)}
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text().split())
    expected = {_normal(name): version for name, version in pinned.items()}
    missing = [name for name in expected if name not in installed]
    other = [
        f"{name} is {version}"
        for name, version in installed.items()
        if name in expected and expected[name] != version
    ]
    return [f"{name} is missing" for name in missing] + other


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
