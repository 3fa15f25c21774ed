"""What `parity` says at its defaults of faulty files and of healthy ones: each fault is caught and named, and nothing else.

`SHAPECHECK_TEST_SEEDS=20 pytest -m nightly tests/parity/test_faulty_files.py -s` tries each with twenty seeds and prints a line
for each; `python tests/support/faulty_files.py` does the same and goes on after the first that is missed.
"""

from __future__ import annotations

import os

import pytest
from faulty_files import FAULTS, HEALTHY, PRECISIONS, Workshop, describe, judge

SEEDS = range(int(os.environ.get("SHAPECHECK_TEST_SEEDS", "1")))
SAMPLE = {
    "all sums clipped at 8": "float16",
    "text clipped at 6 in deep": "float32",
    "tokens cut at 77 in deep": "float16",
    "rows after the third without control": "float32",
    "timestep clamped at 240": "float32",
    "timestep clamped at 910": "float16",
    "sample halved above 1,000 cells": "float32",
}
"""Each shows in one way of ordinary use alone."""
MISSED: set[str] = set()
UNNAMED = {
    *("scaled time_ids", "clipped time_ids", "ControlNet's image clipped at 0.5"),
    *("text of later rows lost in deep", "text of later rows lost in attention"),
}
"""Caught, but not named: the sines of a size are too far from linear for the trials of a share or a bound; in float16 the wrong
rows stand out too little from rounding, and of the loud perturbation of a ControlNet's image nothing is left."""
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("faulty"))


def judged(workshop, fault, dtype, seed):
    told = workshop.try_fault(fault, dtype, seed)
    outcome = judge(fault, dtype, told)
    print(f"{outcome:9} {fault}, {dtype}, seed {seed}: {describe(told)}", flush=True)
    return outcome


def is_passed(workshop, kind, dtype, seed):
    told = workshop.try_healthy(kind, dtype, seed)
    print(f"{'FALSE ALARM' if told.caught else 'passed':11} {kind}, {dtype}, seed {seed}: {describe(told)}", flush=True)
    return not told.caught


@pytest.mark.full
@pytest.mark.parametrize(("fault", "dtype"), SAMPLE.items())
def test_a_fault_of_ordinary_use_is_named(workshop, fault, dtype):
    assert judged(workshop, fault, dtype, 0) == "named"


@pytest.mark.full
def test_the_file_without_those_faults_passes(workshop):
    assert is_passed(workshop, "deep", "float32", 0)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_caught_and_all_but_a_few_are_named(workshop, fault, dtype):
    allowed = {"named", "too fine", "not named" if fault in UNNAMED else ""}
    assert {seed: outcome for seed in SEEDS if (outcome := judged(workshop, fault, dtype, seed)) not in allowed} == {}


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", HEALTHY)
def test_no_healthy_file_is_accused(workshop, kind, dtype):
    assert [seed for seed in SEEDS if not is_passed(workshop, kind, dtype, seed)] == []
