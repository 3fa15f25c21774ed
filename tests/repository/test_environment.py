"""The environment the tests run in: what constraints.txt pins is what is installed."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PINS = dict(re.findall(r"(?m)^([\w.-]+)==([\w.]+)$", CONSTRAINTS.read_text(encoding="utf-8")))


def test_the_versions_that_decide_results_are_pinned():
    assert {"torch", "diffusers", "huggingface_hub", "onnxruntime-gpu", "numpy", "pytest", "hypothesis", "ruff", "mypy"} <= set(
        PINS
    )


def test_onnx_runtime_is_one_package_and_runs_on_the_cpu():
    import onnxruntime

    with pytest.raises(PackageNotFoundError):
        version("onnxruntime")  # both own one folder: beside each other neither can be trusted
    assert "CPUExecutionProvider" in onnxruntime.get_available_providers()
