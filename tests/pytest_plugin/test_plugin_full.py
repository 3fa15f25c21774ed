"""A user's repository acted out: the built wheel, an empty folder, one command, and a message that says which slot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import engines
import onnx_files
import parity_faults
import pytest
from small import SHALLOW, unet

from shapecheck import doctor

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
SMALL = ("--shapecheck-sizes=72x104", "--shapecheck-batch=2")


@dataclass(frozen=True)
class Installed:
    """An environment of a user: what this one has, and shapecheck from the wheel."""

    python: Path

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON"))}
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=folder,
            env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    folder = tmp_path_factory.mktemp("user")
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    subprocess.run(
        [*pip, "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)], check=True, capture_output=True, text=True
    )
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Installed(folder / "venv" / "bin" / "python")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model, the file made of it, and one with a slot that acts with 0.9 of its strength."""
    folder = tmp_path_factory.mktemp("made")
    unet(**SHALLOW).save_pretrained(folder / "model" / "unet")
    healthy, _ = engines.exported(folder / "healthy.onnx", SHALLOW)
    onnx_files.planted(healthy, folder / "faulty.onnx", parity_faults.scaled("down_block_residual_02", 0.9))
    return folder


def options(made: Path, onnx: str) -> tuple[str, ...]:
    return f"--shapecheck-model={made / 'model'}", f"--shapecheck-onnx={made / onnx}", *SMALL


def test_what_is_installed_is_the_wheel(installed, tmp_path):
    code = "import shapecheck, shapecheck.pytest_plugin, torch; print(shapecheck.__file__, torch.__file__, sep='\\n')"
    ours, theirs = installed.run(tmp_path, "-c", code).stdout.split()
    assert Path(ours).is_relative_to(installed.python.parent.parent)
    assert not Path(theirs).is_relative_to(installed.python.parent.parent)
    assert not Path(ours).is_relative_to(ROOT)


def test_in_an_empty_folder_one_command_names_the_slot(installed, made, tmp_path):
    done = installed.run(tmp_path, "-m", "pytest", *options(made, "faulty.onnx"), "--shapecheck-report=report")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "down_block_residual_02 acts as if 0.900 of it were given" in done.stdout
    failed = re.findall(r"^FAILED shapecheck::ort/slot\[(\w+)\]", done.stdout, re.MULTILINE)
    assert failed == ["down_block_residual_02"]
    assert "Traceback" not in done.stdout + done.stderr
    assert "report: report/parity.html" in done.stdout
    assert (tmp_path / "report" / "parity.html").stat().st_size > 10_000
    assert {each.name for each in tmp_path.iterdir()} == {"report", ".pytest_cache"}


def test_a_repository_with_tests_and_options_of_its_own_is_gated_too(installed, made, tmp_path):
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = --strict-markers --strict-config\nfilterwarnings = error\ntestpaths = tests\n", encoding="utf-8"
    )
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--backends', default='none')\n", encoding="utf-8"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_mine.py").write_text(
        """
def test_options(pytestconfig):
    assert pytestconfig.getoption("--backends") == "mine"
    assert pytestconfig.getoption("--shapecheck-backends") == "ort"


def test_contract(shapecheck_contract):
    assert len(shapecheck_contract.slots) == 5
""",
        encoding="utf-8",
    )
    asked = ("--backends", "mine", "--shapecheck-backends", "ort")
    done = installed.run(tmp_path, "-m", "pytest", "-v", *options(made, "healthy.onnx"), *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    for test in ("test_options", "test_contract"):
        assert re.search(rf"^tests/test_mine.py::{test} PASSED", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^shapecheck::ort/slot\[\w+\] PASSED", done.stdout, re.MULTILINE)) == 5
    assert "backend ort: onnxruntime" in done.stdout
    without = installed.run(tmp_path, "-m", "pytest", "--backends", "mine", "-k", "contract", "-rs")
    assert without.returncode == 0
    assert "no --shapecheck-model" in without.stdout


def test_several_processes_share_the_items_and_tell_the_same(installed, made, tmp_path):
    shared = ("-n", "2", "--dist", "loadfile", "--shapecheck-report", "report")
    done = installed.run(tmp_path, "-m", "pytest", "-rf", *options(made, "faulty.onnx"), *shared)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = re.findall(r"^FAILED shapecheck::ort/slot\[(\w+)\]", done.stdout, re.MULTILINE)
    assert failed == ["down_block_residual_02"]
    assert "report: report/parity.html" in done.stdout
    assert "ort: CPUExecutionProvider on cpu" in done.stdout
    assert '"verdict": "broken"' in (tmp_path / "report" / "parity.json").read_text(encoding="utf-8")


def test_several_processes_refuse_what_no_process_can_read(installed, made, tmp_path):
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass\n", encoding="utf-8")
    done = installed.run(tmp_path, "-m", "pytest", "-n", "2", *options(made, "nowhere.onnx"))
    assert done.returncode == 4, done.stdout + done.stderr
    (message,) = re.findall(r"^ERROR: (.*)$", done.stdout + done.stderr, re.MULTILINE)
    assert message == f"cannot read {made / 'nowhere.onnx'}: No such file or directory"
    assert "INTERNALERROR" not in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert "passed" not in done.stdout


def test_this_repository_is_not_tested_where_a_backend_that_was_asked_for_cannot_run():
    known = doctor.backend("trt")
    if known.runs:
        pytest.skip("TensorRT runs here: the tests of test_gpu.py are run, not refused")
    asked = ("-n0", "-p", "no:cacheprovider", "tests/contract/test_naming.py", "--shapecheck-backends", "ort,trt")
    done = Installed(Path(sys.executable)).run(ROOT, "-m", "pytest", *asked)
    assert done.returncode == 1, done.stdout
    assert f"trt cannot run here: {known.reason}" in done.stdout + done.stderr
    assert "passed" not in done.stdout
