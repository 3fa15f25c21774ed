"""What this repository's own tests share; the options are those of shapecheck's plugin."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from artefacts import FOLDER

for _variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
    os.environ.pop(_variable, None)  # a test that means one of them sets it

collect_ignore_glob = ["tests/bench/*"]  # programs to be run by hand, which import each other
_PROBES = {"sd15", "sd15-with-two-controlnets", "sd15-with-t2iadapter", "sd15-with-sd21-controlnet"}
"""A UNet alone, with ControlNets, with an adapter, and with a ControlNet that does not fit."""
_DEFAULT, _FULL = 3, 60
"""Seconds after which a test is in the wrong layer on most machines."""


def pytest_configure(config: pytest.Config) -> None:
    """The folder of what is made once a run; it goes when the process that began the run ends."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = folder = tempfile.mkdtemp(prefix="shapecheck-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop(FOLDER, None))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Probes of SD1.5 by default, one of a kind and all claims, which share what they observe; the others are marked `full`."""
    for item in items:
        if item.path.suffix == ".toml" and item.path.stem not in _PROBES and not item.path.stem.startswith("mapping-"):
            item.add_marker("full")


def pytest_collection_finish() -> None:
    """Leave what is imported out of the garbage collector's walks: a parity run collects three times, half of its seconds."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests that take longer than their layer allows. Nothing fails: the machine may be busy."""
    seconds: Counter[str] = Counter()
    allowed = {}
    for report in (each for reports in terminalreporter.stats.values() for each in reports if hasattr(each, "duration")):
        seconds[report.nodeid] += report.duration
        allowed[report.nodeid] = 0 if "nightly" in report.keywords else _FULL if "full" in report.keywords else _DEFAULT
    late = [(node, spent) for node, spent in seconds.most_common() if allowed[node] and spent > allowed[node]]
    if late:
        terminalreporter.section(f"longer than {_DEFAULT} s, or {_FULL} s if full: see tests/README.md", sep="-")
        for node, spent in late[:10]:
            terminalreporter.write_line(f"{spent:6.1f} s  {node}")


@pytest.fixture
def update_reports(request: pytest.FixtureRequest) -> bool:
    """Whether what is said today is accepted as what has to be said."""
    return bool(request.config.getoption("--shapecheck-update"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch in one thread: small models are no faster in two, and another worker has the other core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
