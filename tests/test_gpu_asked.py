"""A backend that was asked for and cannot run is a failure, with the doctor's reason; one that nobody asked for is a skip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shapecheck import doctor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trt():
    known = doctor.backend("trt")
    if known.runs:
        pytest.skip("TensorRT runs here: the tests of test_gpu.py are run, not refused")
    return known


@pytest.mark.parametrize(("asked", "status", "outcome"), [((), 0, "skipped"), (("--shapecheck-backends", "trt"), 1, "error")])
def test_what_cannot_run_fails_only_where_it_was_asked_for(trt, asked, status, outcome):
    one = "tests/test_gpu.py::test_what_was_built_is_what_its_record_says"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n0", "-rsE", "-p", "no:cacheprovider", one, *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout
    assert f"1 {outcome}" in done.stdout
    assert f"trt cannot run here: {trt.reason}"[:60] in done.stdout
