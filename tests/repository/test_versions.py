"""The suite with the oldest versions that pyproject.toml promises, and with the newest there are, each in its environment.

What constraints.txt pins is what CI runs. Golden texts are of those versions: tests that hold to one are left out here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from artefacts import FOLDER

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = (
    "tests/cli/test_golden.py",  # click's help texts
    "tests/observe/test_reports.py",  # digests hold every key of a config, and reports the lines of diffusers
    "tests/repository",
    "probes",
)
"""What is held to a text that moves with the releases of libraries."""


@pytest.mark.nightly
@pytest.mark.parametrize("resolution", ["lowest-direct", "highest"])
def test_the_suite_passes_with_other_versions(tmp_path, resolution):
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "uv", "venv", "--python", sys.executable, tmp_path / "venv")
    run(sys.executable, "-m", "uv", "pip", "install", "--python", python, "--resolution", resolution, f"{ROOT}[test]")
    print(run(sys.executable, "-m", "uv", "pip", "list", "--python", python))
    left_out = [f"--ignore={ROOT / path}" for path in PINNED]
    print(run(python, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-W", "ignore", *left_out, ROOT / "tests"))


def run(*command: object) -> str:
    """Return what a command prints; AssertionError where it fails. Nothing that this environment made is found by the other."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON", FOLDER))}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_requirement_has_a_floor_in_one_place():
    """The same library is promised from the same version on, whichever extra brings it."""
    extras = PROJECT["optional-dependencies"]
    floors: dict[str, set[str]] = {}
    for requirement in [*PROJECT["dependencies"], *(each for several in extras.values() for each in several)]:
        name, floor = re.fullmatch(r"([\w-]+)(?:>=([\d.]+))?", requirement).groups()
        floors.setdefault(name, set()).add(floor)
    assert {name for name, known in floors.items() if known == {None}} <= {"types-tabulate", "types-tqdm"}
    assert not {name: known for name, known in floors.items() if len(known) > 1}
