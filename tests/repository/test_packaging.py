"""The wheel: what is in it, and that contracts work where it is all that is installed."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_its_presets_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "shapecheck",
        next(name.split("/")[0] for name in names if "dist-info" in name),
    }
    assert {"shapecheck/presets/sd15.json", "shapecheck/presets/contracts/sd15.json", "shapecheck/py.typed"} <= set(names)
    assert {"shapecheck/parity/parity.html.j2", "shapecheck/parity/parity.css", "shapecheck/pytest_plugin/__init__.py"} <= set(
        names
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_contracts_work_where_nothing_else_is_installed(wheel, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    site = next((tmp_path / "bare" / "lib").glob("python*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    code = """
import importlib.util, shapecheck
from shapecheck import Contract, Geometry, presets
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("click") is None
contract = presets.contract("sdxl")
assert Contract.from_json(contract.to_json()) == contract
assert contract.shapes(Geometry(2, 65, 97))["mid_block_residual"] == (2, 1280, 17, 25)
try:
    contract.verify(([], None), Geometry(1, 8, 8))
except shapecheck.ContractError as error:
    print(len(error.mismatches))
"""
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("10\n", "")
