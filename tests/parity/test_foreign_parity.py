"""Parity of healthy files as other people export them."""

from __future__ import annotations

import foreign_files as foreign
import pytest
from foreign_files import KINDS

from shapecheck import ShapecheckError
from shapecheck.parity.plan import plan_outputs
from shapecheck.parity.request import ParityRequest
from shapecheck.parity.run import ParityRun

TYPES = ("float16 inside float32", "controlnet of strength 0.7 and other names")
"""What is run otherwise than it is given."""
REST = [name for name, kind in KINDS.items() if name not in TYPES and not kind.export.inside]


def compare(name: str, folder, **options):
    library = name.split()[0]
    if library in ("onnxslim", "onnxsim"):
        pytest.importorskip(library)
    path = foreign.make_file(folder / "foreign.onnx", name)
    return ParityRun(ParityRequest(foreign.make_model(KINDS[name].export.model), path), **options).report()


@pytest.mark.parametrize("name", [pytest.param(TYPES[0], marks=pytest.mark.full), TYPES[1]])
def test_a_file_of_other_types_or_of_one_strength_agrees(name, tmp_path):
    report = compare(name, tmp_path, plan=plan_outputs, explain=False)
    (side,) = report.sides
    assert (side.failed, report.passes) == ((), True)
    told = {"float16": "it is compared as a file in float16", "controlnet": "a strength of 0.7 is baked into it"}
    assert told[name.split()[0]] in side.notes[0]


@pytest.mark.nightly
@pytest.mark.parametrize("name", REST)
def test_a_healthy_file_agrees(name, tmp_path):
    (side,) = compare(name, tmp_path).sides
    assert side.failed == ()


def test_a_file_that_holds_its_controlnet_cannot_be_compared(tmp_path):
    with pytest.raises(ShapecheckError, match=r"makes its residuals inside: it holds a ControlNet \(controlnet_cond\)"):
        compare("controlnet inside", tmp_path)
