"""Parity of healthy files as other people export them."""

from __future__ import annotations

import foreign_files as foreign
import onnx
import pytest
from foreign_files import KINDS

from shapecheck import ShapecheckError
from shapecheck.onnx.file import CONTRACT_KEY
from shapecheck.parity.plan import plan_outputs
from shapecheck.parity.request import ParityRequest
from shapecheck.parity.run import ParityRun

TYPES = ("float16 inside float32", "controlnet of strength 0.7 and other names")
"""What is run otherwise than it is given."""
SPECIAL = {
    "text and sizes in one": "",
    "text and sizes in one, plain": "",
    "text and sizes in one of another name": "",
    "timestep int64 scalar": "takes whole timesteps (int64); one timestep for all rows of a batch",
    "timestep int64, of another name": "takes whole timesteps (int64)",
    "float16": "takes timesteps in float16, in which whole ones are exact and fractions are not",
    "strength 0.8": "a strength of 0.8 is baked in: it is compared with PyTorch at that strength",
    "an unused image": "",
    "one more output, before": "",
    "TensorRT's demo": "",
    "float16, ONNX Runtime all": "takes timesteps in float16, in which whole ones are exact and fractions are not",
}
"""What is given otherwise than the contract says, and the note on it."""
REST = [name for name, kind in KINDS.items() if name not in (*TYPES, *SPECIAL, *foreign.UNRUNNABLE) and not kind.export.inside]


def compare(name: str, folder, **options):
    path = foreign.make_file(folder / "foreign.onnx", name)
    return ParityRun(ParityRequest(foreign.make_model(KINDS[name].export.model), path), **options).report()


@pytest.mark.parametrize("name", [pytest.param(TYPES[0], marks=pytest.mark.full), TYPES[1]])
def test_a_file_of_other_types_or_of_one_strength_agrees(name, tmp_path):
    report = compare(name, tmp_path, plan=plan_outputs, explain=False)
    (side,) = report.sides
    assert (side.failed, report.passes) == ((), True)
    told = {"float16": "it is compared as a file in float16", "controlnet": "a strength of 0.7 is baked into it"}
    assert told[name.split()[0]] in side.notes[0]


@pytest.mark.full
@pytest.mark.parametrize(("name", "note"), SPECIAL.items())
def test_a_file_of_other_inputs_is_given_what_it_takes(name, note, tmp_path):
    (side,) = compare(name, tmp_path, explain=False).sides
    assert ([result for result in side.results if result.status != "passed"], "; ".join(side.notes)) == ([], note)


@pytest.mark.full
def test_text_and_sizes_in_one_that_are_exchanged_are_seen(tmp_path):
    def exchange(model):
        y = next(value for value in model.graph.inputs if value.name == "y")
        foreign.roll_columns(model, y, 1)

    path = foreign.make(tmp_path / "foreign.onnx", foreign.Kind(foreign.Export("xl"), (foreign.join_conditions(), exchange)))
    (side,) = ParityRun(ParityRequest(foreign.make_model("xl"), path), explain=False).report().sides
    assert {result.check.kind for result in side.failed} >= {"case"}


@pytest.mark.full
def test_a_strength_that_a_contract_inside_does_not_promise_is_a_fault(tmp_path):
    path = foreign.make_file(tmp_path / "foreign.onnx", "strength 0.8")
    model = onnx.load(path)
    model.metadata_props.add(key=CONTRACT_KEY, value=foreign.observe("sd").to_json())
    onnx.save(model, path)
    (side,) = ParityRun(ParityRequest(foreign.make_model("sd"), path)).report().sides
    assert {result.check.where for result in side.failed} > {"down_block_residual_00", "mid_block_residual"}
    assert sum("acts as if 0.800 of it were given" in result.reason for result in side.failed) == 5


@pytest.mark.parametrize("words", [pytest.param(words, marks=pytest.mark.full) for words in foreign.REFUSED])
def test_a_file_of_another_form_cannot_be_compared(words, tmp_path):
    path = foreign.make(tmp_path / "foreign.onnx", foreign.Kind(foreign.Export(), (foreign.REFUSED[words],)))
    with pytest.raises(ShapecheckError, match=f"is no UNet with slots, and cannot be compared with one: .*{words}"):
        ParityRun(ParityRequest(foreign.make_model("sd"), path))


@pytest.mark.nightly
@pytest.mark.parametrize("name", REST)
def test_a_healthy_file_agrees(name, tmp_path):
    (side,) = compare(name, tmp_path).sides
    assert side.failed == ()


def test_a_file_that_holds_its_controlnet_cannot_be_compared(tmp_path):
    with pytest.raises(ShapecheckError, match=r"makes its residuals inside: it holds a ControlNet \(controlnet_cond\)"):
        compare("controlnet inside", tmp_path)
