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

from shapecheck.doctor.packages import CPU
from shapecheck.doctor.probes import ask

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


def test_tensorrt_is_capped_below_what_onnx_runtime_cannot_load():
    """Both are in one extra, so one environment has to serve both; the installed ONNX Runtime says what its provider loads."""
    (capped,) = [text for text in PROJECT["optional-dependencies"]["gpu"] if text.startswith("tensorrt")]
    assert int(re.fullmatch(r"tensorrt>=10\.6,<(\d+)", capped)[1]) == int(ask(CPU).facts["linked"]) + 1


@pytest.mark.nightly
def test_the_gpu_extra_resolves_to_a_tensorrt_that_its_onnx_runtime_loads(tmp_path):
    """Without dependencies: the packages of TensorRT's libraries ask NVIDIA's index, which is not reachable everywhere."""
    (tmp_path / "gpu.in").write_text("\n".join(PROJECT["optional-dependencies"]["gpu"]), encoding="utf-8")
    for resolution in ("highest", "lowest-direct"):
        options = ("--no-deps", "--no-header", "--resolution", resolution)
        resolved = run(sys.executable, "-m", "uv", "pip", "compile", *options, tmp_path / "gpu.in")
        versions = dict(line.split("==") for line in resolved.splitlines() if "==" in line)
        assert versions["tensorrt"].partition(".")[0] == "10"
        assert "onnxruntime-gpu" in versions


def test_every_requirement_has_a_floor_in_one_place():
    """The same library is promised from the same version on, whichever extra brings it."""
    extras = PROJECT["optional-dependencies"]
    floors: dict[str, set[str]] = {}
    for requirement in [*PROJECT["dependencies"], *(each for several in extras.values() for each in several)]:
        name, floor = re.fullmatch(r"([\w-]+)(?:>=([\d.]+)(?:,<\d+)?)?", requirement).groups()
        floors.setdefault(name, set()).add(floor)
    assert {name for name, known in floors.items() if known == {None}} <= {"types-tabulate", "types-tqdm"}
    assert not {name: known for name, known in floors.items() if len(known) > 1}
