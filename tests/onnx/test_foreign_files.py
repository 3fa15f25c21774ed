"""Healthy files as other people export them: `check` calls none broken, and says what they take and what is special."""

from __future__ import annotations

from pathlib import Path

import foreign_files as foreign
import onnx_files
import onnx_ir as ir
import pytest
from foreign_files import KINDS, Edit, Export

from shapecheck.onnx.check import check
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.records import FileCheck

QUICK = ("slots as of 2023", "ONNX Runtime all")
"""Both of one export."""


def later(*names: str) -> list:
    """Those that PyTorch's newer exporter makes take as long as all others: of these a few are enough for every day."""
    slow = [name for name in names if name.startswith("dynamo")][3:]
    return [pytest.param(name, marks=pytest.mark.nightly if name in slow else pytest.mark.full) for name in names]


def check_kind(folder: Path, name: str, *, named: bool = True) -> FileCheck:
    library = name.split()[0]
    if library in ("onnxslim", "onnxsim"):
        pytest.importorskip(library)
    contract = foreign.observe(KINDS[name].export.model) if named else None
    return check(OnnxFile(foreign.make_file(folder / "foreign.onnx", name)), contract)


def check_edited(folder: Path, *edits: Edit, export: Export | None = None) -> FileCheck:
    export = export or Export()
    path = foreign.make(folder / "foreign.onnx", foreign.Kind(export, edits))
    return check(OnnxFile(path), foreign.observe(export.model))


@pytest.mark.parametrize("name", [*QUICK, *later(*(name for name in KINDS if name not in QUICK))])
def test_a_healthy_file_is_fine_and_its_limits_are_told(name, tmp_path):
    kind, checked = KINDS[name], check_kind(tmp_path, name)
    assert (checked.mismatches, checked.unchecked) == ((), "")
    assert checked.limits.divisor == kind.divisor
    assert {*checked.limits.fixed} == {*kind.fixed}


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.export.model != "controlnet"])
def test_a_healthy_file_is_fine_without_its_model(name, tmp_path):
    checked = check_kind(tmp_path, name, named=False)
    assert checked.mismatches == ()


@pytest.mark.parametrize(
    "make",
    [foreign.flatten, *(pytest.param(make, marks=pytest.mark.full) for make in (foreign.negate_all, foreign.sum_of_three))],
)
def test_a_sum_that_is_written_otherwise_shows_its_slots_all_the_same(make, tmp_path):
    checked = check_edited(tmp_path, foreign.summed(make))
    whole, half = "h×w", "ceil(h/2)×ceil(w/2)"
    skips = [f"batch×8×{whole}", f"batch×8×{whole}", f"batch×8×{half}", f"batch×16×{half}", f"batch×16×{half}"]
    assert [slot.skip for slot in checked.slots] == skips


def test_a_residual_that_is_subtracted_is_a_fault_however_it_is_written(tmp_path):
    def subtract(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
        negative = ir.node("Neg", [residual])
        return [negative, ir.node("Add", [skip, negative.outputs[0]])]

    checked = check_edited(tmp_path, foreign.summed(subtract))
    assert {mismatch.kind for mismatch in checked.mismatches} == {"values"}
    assert checked.mismatches[0].observed == "subtracted from its skip"


@pytest.mark.parametrize(
    "make",
    [foreign.channels_last, *(pytest.param(make, marks=pytest.mark.full) for make in (foreign.subtract, foreign.reorder))],
)
def test_exchanged_slots_are_seen_in_a_rewritten_graph(make, tmp_path):
    pair = ("down_block_residual_01", "down_block_residual_03")
    checked = check_edited(tmp_path, onnx_files.exchange(*pair), foreign.summed(make))
    assert {(mismatch.where, mismatch.kind) for mismatch in checked.mismatches} >= {(name, "order") for name in pair}


def test_an_order_that_the_graph_does_not_show_is_unknown(tmp_path):
    checked = check_edited(tmp_path, foreign.summed(foreign.reorder))
    assert any("their order is unknown here, and `shapecheck parity` decides it by values" in note for note in checked.notes)
    assert not any("unknown here" in note for note in check_edited(tmp_path, foreign.summed(foreign.subtract)).notes)


@pytest.mark.full
def test_a_strength_in_the_constants_is_told(tmp_path):
    factor = foreign.through(("Mul", (foreign.number(0.7),), {}))
    assert (
        "a strength of 0.7 is baked in: every residual is multiplied by it before it is added"
        in check_edited(tmp_path, factor).notes
    )
    assert not any("baked" in note for note in check_edited(tmp_path, foreign.through(("Mul", (foreign.number(1),), {}))).notes)


def test_a_controlnet_of_foreign_names_is_taken_in_the_order_of_its_outputs(tmp_path):
    export = Export("controlnet", strength=0.7)
    checked = check_edited(tmp_path, foreign.name_slots("out{}"), export=export)
    assert checked.mismatches == ()
    assert "the strength (conditioning_scale) is baked in as 0.7: scale the residuals after it" in checked.notes
    assert any(note.startswith("the outputs' names follow no known scheme") for note in checked.notes)

    def exchange(model: ir.Model) -> None:
        outputs = model.graph.outputs
        outputs[0], outputs[2] = outputs[2], outputs[0]

    checked = check_edited(tmp_path, foreign.name_slots("out{}"), exchange, export=export)
    assert [(mismatch.where, mismatch.kind) for mismatch in checked.mismatches] == [("out2", "size"), ("out0", "size")]


def test_a_controlnet_inside_is_said_to_be_there(tmp_path):
    edit = foreign.rename(controlnet_cond="controlnet_conds", conditioning_scale="conditioning_scales")
    checked = check_edited(tmp_path, edit, export=Export(inside=True))
    assert (checked.mismatches, checked.unchecked, checked.makes_residuals) == ((), "", True)
    assert checked.notes[0] == (
        "the residuals are made inside: the graph holds a ControlNet (controlnet_conds, conditioning_scales), "
        "so that none can be exchanged"
    )
