"""A backend that was asked for and cannot run is a failure, with the doctor's reason; one that nobody asked for is a skip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shapecheck import doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trt():
    known = doctor.backend("trt")
    if known.runs:
        pytest.skip("TensorRT runs here: the tests of test_gpu.py are run, not refused")
    return known


@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        ("ort,trt", 1, "trt cannot run here: "),
        ("trtt", 4, "--shapecheck-backends: no backend is called 'trtt'; known: "),
    ],
)
def test_a_run_that_asks_for_what_cannot_run_fails_whatever_it_would_run(trt, asked, status, told):
    command = ["-m", "pytest", "-n0", "-p", "no:cacheprovider", "tests/contract/test_naming.py", "--shapecheck-backends", asked]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout
    assert told + ("" if status == 4 else trt.reason) in done.stdout + done.stderr
    assert "passed" not in done.stdout


def test_what_nobody_asked_for_is_skipped(trt, shapecheck_require):
    with pytest.raises(pytest.skip.Exception, match="trt cannot run here: "):
        shapecheck_require("trt")
    shapecheck_require("ort")
