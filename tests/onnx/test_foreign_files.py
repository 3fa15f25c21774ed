"""Healthy files as other people export them: `check` calls none broken, and says what they take and what is special."""

from __future__ import annotations

from pathlib import Path

import foreign_files as foreign
import onnx_files
import onnx_ir as ir
import pytest
from foreign_files import KINDS, Edit, Export

from shapecheck.onnx.check import check
from shapecheck.onnx.check_report import list_findings
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.records import FileCheck

QUICK = ("slots as of 2023", "ONNX Runtime all")
"""Both of one export."""


def later(*names: str) -> list:
    """Those that PyTorch's newer exporter makes take as long as all others: of these a few are enough for every day."""
    slow = [name for name in names if name.startswith("dynamo")][3:]
    return [pytest.param(name, marks=pytest.mark.nightly if name in slow else pytest.mark.full) for name in names]


def check_kind(folder: Path, name: str, *, named: bool = True) -> FileCheck:
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


@pytest.mark.parametrize(
    ("form", "limits"),
    [
        ("int64", ("whole timesteps (int64)",)),
        *[
            pytest.param(form, limits, marks=pytest.mark.full)
            for form, limits in {
                "int32 scalar": ("whole timesteps (int32)", "one timestep for all rows of a batch"),
                "one": ("one timestep for all rows of a batch",),
                "float16": ("timesteps in float16, in which whole ones are exact and fractions are not",),
            }.items()
        ],
    ],
)
def test_the_form_of_a_timestep_is_a_limit(form, limits, tmp_path):
    assert check_edited(tmp_path, export=Export(timestep=form)).narrower == limits


@pytest.mark.full
def test_a_timestep_that_is_rounded_behind_its_input_is_a_limit_too(tmp_path):
    told = "timesteps in float16, in which whole ones are exact and fractions are not"
    assert check_edited(tmp_path, foreign.convert_inside_to_half).narrower == (told,)


@pytest.mark.full
@pytest.mark.parametrize("name", ["y", "vector"])
def test_text_and_sizes_in_one_tensor_are_known_by_name_or_width(name, tmp_path):
    checked = check_edited(tmp_path, foreign.join_conditions(name=name), export=Export("xl"))
    assert (checked.mismatches, dict(checked.names)["text_embeds"], dict(checked.names)["time_ids"]) == ((), name, name)
    assert (f"recognised by their shapes: {name} is text_embeds and time_ids" in checked.notes) is (name != "y")


@pytest.mark.full
@pytest.mark.parametrize(("words", "edit"), foreign.REFUSED.items())
@pytest.mark.parametrize("named", [True, False])
def test_a_file_of_another_form_is_called_so_and_nothing_else(words, edit, named, tmp_path):
    path = foreign.make(tmp_path / "foreign.onnx", foreign.Kind(Export(), (edit,)))
    checked = check(OnnxFile(path), foreign.observe("sd") if named else None)
    (mismatch,) = checked.mismatches
    assert mismatch.cause.startswith(words)
    assert len(list_findings(checked)) == 1


def test_what_a_residual_goes_through_is_named(tmp_path):
    checked = check_edited(tmp_path, foreign.through(("Clip", (foreign.number(-8), foreign.number(8)), {})))
    (note,) = checked.notes
    assert note.startswith("down_block_residual_00, down_block_residual_01 and 3 more go through Clip before any sum is seen")
    assert checked.mismatches == ()


@pytest.mark.full
def test_an_input_without_effect_is_a_remark_unless_the_model_lacks_one(tmp_path):
    assert "guidance_scale: without effect" in check_edited(tmp_path, foreign.graphs.unused_input).notes[0]
    lacking = check_edited(tmp_path, foreign.name_slots("r{}"), onnx_files.unconsume("r3"))
    assert {(mismatch.where, mismatch.kind) for mismatch in lacking.mismatches} >= {("r3", "unused")}
