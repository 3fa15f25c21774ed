"""A backend that was asked for and cannot run is a failure, with the doctor's reason; one that nobody asked for is a skip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shapecheck import ShapecheckError, doctor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trt():
    known = doctor.backend("trt")
    if known.runs:
        pytest.skip("TensorRT runs here: the tests of test_gpu.py are run, not refused")
    return known


def test_what_cannot_run_fails_where_it_was_asked_for(trt):
    one = "tests/test_gpu.py::test_what_was_built_is_what_its_record_says"
    asked = ["-m", "gpu", "-n0", "-rE", "-p", "no:cacheprovider", one, "--shapecheck-backends", "trt"]
    done = subprocess.run([sys.executable, "-m", "pytest", *asked], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "1 error" in done.stdout
    assert f"trt cannot run here: {trt.reason}" in done.stdout


def test_and_is_skipped_where_nobody_asked(trt, require_backend):
    with pytest.raises(pytest.skip.Exception, match="trt cannot run here: "):
        require_backend("trt")
    require_backend("ort")
    with pytest.raises(ShapecheckError, match="no backend is called 'trtt'"):
        require_backend("trtt")
