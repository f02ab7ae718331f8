"""The peers' own virtual environments, outside the checkout: their pins exclude ours.

Each is made when it is missing or when its constraints changed; some 5 GB, for torch is in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Peer:
    """A library that ours is compared with."""

    name: str
    """As its authors write it."""
    wanted: tuple[str, ...]
    """What pip is asked for; `<folder>-constraints.txt` has the exact version of everything that comes."""

    @property
    def folder(self) -> Path:
        """The environment: the name in the user's cache folder, below `influence-bench`."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "influence-bench" / self.name.lower()

    @property
    def constraints(self) -> Path:
        """Of everything in the environment."""
        return Path(__file__).with_name(f"{self.name.lower()}-constraints.txt")

    def ensured(self) -> Path:
        """The environment's interpreter; makes the environment first if need be."""
        python = self.folder / "bin" / "python"
        if self._differences(python):
            print(f"making {self.name}'s environment in {self.folder} (once; some minutes)", file=sys.stderr)
            venv.create(self.folder, clear=True, with_pip=True)
            install = ["-m", "pip", "install", "--quiet", "--constraint", str(self.constraints), *self.wanted]
            subprocess.run([str(python), *install], check=True)
        left = self._differences(python)
        if left:
            raise SystemExit(
                f"{self.folder}: expected the versions of {self.constraints.name}, but {', '.join(left)}"
            )
        return python

    def _differences(self, python: Path) -> list[str]:
        """What is installed in another version than the constraints say, or missing of what is wanted."""
        if not python.exists():
            return ["there is no interpreter"]
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        installed = {_normal(entry["name"]): entry["version"] for entry in json.loads(listed.stdout)}
        pinned = dict(line.split("==") for line in self.constraints.read_text().split())
        expected = {_normal(name): version for name, version in pinned.items()}
        missing = [name for name in expected if name not in installed]
        other = [
            f"{name} is {version}"
            for name, version in installed.items()
            if name in expected and expected[name] != version
        ]
        return [f"{name} is missing" for name in missing] + other


PYDVL = Peer("pyDVL", ("pyDVL[influence]", "scikit-learn"))
KRONFLUENCE = Peer("Kronfluence", ("kronfluence",))


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
