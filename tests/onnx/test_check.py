"""`check`: what is right is found right, and every planted fault is told, each by its own finding."""

from __future__ import annotations

import json
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_files as files
import onnx_ir as ir
import openings
import pytest
import small
import torch
from click.testing import CliRunner
from diffusers import ControlNetModel
from onnx_files import check

from shapecheck import Contract, Geometry, Mismatch, ShapecheckError, presets, probe
from shapecheck.artefact import resolve_contract
from shapecheck.cli import main
from shapecheck.contract import Dim, show
from shapecheck.contract.naming import SCHEMES, find_scheme
from shapecheck.contract.size_request import SizeRequest
from shapecheck.observe.controlnet_fit import find_misfits
from shapecheck.observe.probe import probe_controlnet
from shapecheck.onnx import check_report as report
from shapecheck.onnx.file import CONTRACT_KEY, OnnxFile
from shapecheck.onnx.records import FileCheck
from shapecheck.onnx.shapes import infer_shapes_at, parameters_to_inputs

File = tuple[Path, Contract]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def odd(folder) -> File:
    """SDXL's topology, traced by torch at an odd size: right at every size."""
    return files.exported(folder / "odd.onnx", files.XL, latent=(17, 25))


@pytest.fixture(scope="module")
def even(folder) -> File:
    """The same, traced at an even size, as everybody does."""
    return files.exported(folder / "even.onnx", files.XL, latent=(16, 24))


@pytest.fixture(scope="module")
def drawn(folder) -> File:
    """A plan of SDXL's topology: a graph of few nodes with its inputs, skips and names."""
    with torch.device("meta"):
        contract = probe(small.unet(**files.XL))
    return files.plan(folder / "plan.onnx", contract), contract


@pytest.fixture
def inside(drawn, tmp_path) -> Path:
    """The same with its contract inside."""
    return files.plan(tmp_path / "inside.onnx", drawn[1], inside=True)


@pytest.fixture
def plant(drawn, tmp_path):
    """Check the plan with edits made to it, against its model."""
    return lambda *edits: check(files.planted(drawn[0], tmp_path / "planted.onnx", *edits), drawn[1])


def told(checked: FileCheck) -> list[tuple[str, str]]:
    return [(each.where, each.kind) for each in checked.mismatches]


def only(checked: FileCheck) -> Mismatch:
    (found,) = checked.mismatches
    return found


# what is right


def test_a_file_of_others_traced_at_an_odd_size_is_fine_too(odd):
    path, contract = odd
    for checked, basis in ((check(path, contract), "given"), (check(path), "none")):
        assert (checked.mismatches, checked.basis) == ((), basis)
        assert [each.skip for each in checked.slots] == [show(slot.skip) for slot in contract.slots]
        pairs = zip(checked.slots, contract.slots, strict=True)
        assert all(each.producer.startswith(slot.producer) for each, slot in pairs)


def test_the_plan_that_faults_are_planted_in_is_fine(drawn):
    assert check(*drawn).mismatches == ()


@pytest.mark.parametrize(
    "name",
    [
        "sd15",
        "sdxl",
        "koala-700m",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("sd21-base", "lcm-dreamshaper-v7")),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("kandinsky-2.2", "sd-x4-upscaler")),
    ],
)
def test_the_preset_that_fits_is_found(name, tmp_path):
    checked = check(files.plan(tmp_path / "plan.onnx", presets.contract(name)))
    assert (checked.basis, checked.mismatches) == ("preset", ())
    assert name in json.loads(report.render_json(checked))["presets"]


# planted faults, each with its finding


def test_an_unconsumed_slot(plant):
    found = only(plant(files.unconsume("down_block_residual_03")))
    assert (found.where, found.kind, found.observed) == ("down_block_residual_03", "unused", "added to nothing")
    assert found.unet_module == "down_blocks.1.resnets.0"


def test_an_unconsumed_slot_of_a_real_file_is_seen_without_any_contract(odd, tmp_path):
    checked = check(files.planted(odd[0], tmp_path / "x.onnx", files.unconsume("down_block_residual_03")))
    assert (checked.basis, told(checked)) == ("none", [("down_block_residual_03", "unused")])


def test_a_slot_that_is_not_there(plant):
    def drop(model: ir.Model) -> None:
        model.graph.inputs.remove(next(value for value in model.graph.inputs if value.name == "down_block_residual_03"))

    found = only(plant(files.unconsume("down_block_residual_03"), drop))
    assert (found.where, found.kind, found.expected) == ("down_block_residual_03", "missing", "batch×16×ceil(h/2)×ceil(w/2)")


def test_a_broadcast_slot(plant):
    found = only(plant(files.declare("mid_block_residual", 1, 16, 1, 1)))
    assert (found.where, found.kind, found.observed) == ("mid_block_residual", "broadcast", "1×16×1×1")


def test_wrong_channels(plant):
    found = only(plant(files.declare("down_block_residual_02", "batch", 1, "ceil(h/2)", "ceil(w/2)")))
    assert (found.where, found.kind) == ("down_block_residual_02", "channels")
    found = only(plant(files.declare("sample", "batch", 9, "h", "w"), files.widen_first(9)))
    assert (found.where, found.kind, found.observed) == ("sample", "channels", "batch×9×h×w")


def test_slots_exchanged_between_strides(plant):
    checked = plant(files.exchange("down_block_residual_01", "down_block_residual_03"))
    assert told(checked) == [("down_block_residual_01", "order"), ("down_block_residual_03", "order")]
    assert checked.mismatches[0].cause == "this is the place of down_block_residual_03"


def test_slots_exchanged_where_no_shape_shows_it(plant):
    checked = plant(files.exchange("down_block_residual_00", "down_block_residual_01"))
    assert told(checked) == [("down_block_residual_00", "order"), ("down_block_residual_01", "order")]


def test_two_slots_of_one_skip_may_change_places(tmp_path):
    koala = presets.contract("koala-700m")
    edit = files.exchange("down_block_residual_05", "mid_block_residual")
    path = files.planted(files.plan(tmp_path / "plan.onnx", koala), tmp_path / "x.onnx", edit)
    assert check(path, koala).mismatches == ()


def test_exchanged_slots_are_seen_in_a_real_file_without_module_names(odd, tmp_path):
    edits = (files.exchange("down_block_residual_00", "down_block_residual_01"), files.forget_names)
    checked = check(files.planted(odd[0], tmp_path / "x.onnx", *edits))
    assert told(checked) == [("down_block_residual_00", "order"), ("down_block_residual_01", "order")]
    assert not any(each.producer for each in checked.slots)


def test_a_residual_in_the_place_of_a_dropped_one(plant):
    checked = plant(files.move("down_block_residual_00", to="down_block_residual_01"))
    assert told(checked) == [("down_block_residual_00", "order"), ("down_block_residual_01", "missing")]
    assert checked.mismatches[0].cause == "this is the place of down_block_residual_01"


def test_a_residual_that_is_added_twice(plant):
    found = only(plant(files.add_again("down_block_residual_00")))
    assert (found.where, found.kind, found.expected) == ("down_block_residual_00", "order", "added once")


def test_skips_of_another_size_than_the_contract_says(drawn):
    path, contract = drawn
    other = files.without_halving(contract)
    found = [each for each in check(path, other).mismatches if each.kind == "size"]
    assert [each.where for each in found] == [slot.name for slot in contract.slots if slot.stride > 1]
    assert found[0].observed == (2, 8, 9, 32)


def test_a_file_traced_at_an_even_size_is_fine_with_its_limit(even):
    path, contract = even
    for checked in (check(path, contract), check(path)):
        assert (checked.mismatches, checked.unchecked) == ((), "")
        assert checked.narrower == ("heights and widths that are multiples of 2 cells (16 pixels)",)
        text = report.render_text(checked)
        limit = "FINE: 5 slots and 5 base inputs; takes heights and widths that are multiples of 2 cells (16 pixels)\n"
        assert text.endswith(limit)
        assert "fails at 17×63: Concat /model/up_blocks.1/Concat: sizes 17 and 18 meet on axis 2" in " ".join(text.split())


@pytest.mark.full
def test_it_is_broken_where_more_was_requested(even):
    path, contract = even
    for multiple, kinds in ((1, ["sizes"]), (2, []), (4, [])):
        checked = check(path, contract, SizeRequest((), multiple))
        assert [found.kind for found in checked.mismatches] == kinds
    assert "--multiple-of 16" in report.advise(check(path, contract, SizeRequest((), 1)))
    everything = SizeRequest(({"h": (16, 24, 40), "w": (16, 24, 40), "batch": (1, 2, 4), "tokens": (7, 77, 154)},))
    found = only(check(path, contract, everything))
    assert (found.observed, found.geometry) == ("does not work at 1 of 4 sizes", Geometry(3, 29, 29, 80))
    assert found.cause.startswith("it works at multiples of 2 cells; Concat")
    assert check(path, contract, replace(everything, multiple=2)).mismatches == ()


@pytest.mark.full
def test_traced_at_a_multiple_of_eight(folder):
    """SD1.5's strides."""
    checked = check(*files.exported(folder / "eight.onnx", files.DEEP, latent=(16, 24)))
    assert (checked.mismatches, checked.limits.divisor) == ((), 8)
    assert "Concat /model/up_blocks.1/Concat: sizes 5 and 6 meet on axis 2" in checked.limits.reason


def test_where_one_size_is_asked_for_only_that_has_to_work(even):
    path, contract = even
    assert check(path, contract, SizeRequest.at(Geometry(1, 24, 40))).mismatches == ()
    found = only(check(path, contract, SizeRequest.at(Geometry(1, 24, 41))))
    assert (found.kind, found.geometry) == ("sizes", Geometry(1, 24, 41))


def test_a_static_file_is_fine_and_says_which_size_it_is_for(drawn, tmp_path):
    numbers = {"batch": 2, "h": 17, "w": 25, "tokens": 7, "ceil(h/2)": 9, "ceil(w/2)": 13}
    path = files.planted(drawn[0], tmp_path / "x.onnx", files.fix(numbers))
    checked = check(path, drawn[1])
    assert (checked.mismatches, checked.unchecked) == ((), "")
    assert checked.narrower == ("batch 2", "latent 17×25 (200×136 pixels)", "7 text tokens")
    assert check(path, drawn[1], SizeRequest.at(Geometry(2, 17, 25, 7))).mismatches == ()
    wrong = only(check(path, drawn[1], SizeRequest.at(Geometry(2, 17, 26, 7))))
    assert (wrong.observed, wrong.cause) == ("does not work", "the file fixes w=25")
    for symbol, size in (("batch", 2), ("tokens", 7)):
        for requested in (size, size + 1):
            found = check(path, drawn[1], SizeRequest(({symbol: (requested,) * 3},))).mismatches
            assert [each.cause for each in found] == [f"the file fixes {symbol}={size}"] * (requested != size)


@pytest.mark.parametrize(
    ("numbers", "limits"),
    [
        ({"batch": 2}, ("batch 2",)),
        ({"h": 17, "ceil(h/2)": 9}, ("height 17 (136 pixels)",)),
        ({"tokens": 77}, ("77 text tokens",)),
    ],
)
def test_each_axis_may_be_fixed_alone(numbers, limits, drawn, tmp_path):
    checked = check(files.planted(drawn[0], tmp_path / "x.onnx", files.fix(numbers)), drawn[1])
    assert (checked.mismatches, checked.unchecked, checked.narrower) == ((), "", limits)


def test_residuals_alone_may_fix_the_size(drawn, tmp_path):
    names = [slot.name for slot in drawn[1].slots]
    shapes = drawn[1].shapes(Geometry(2, 17, 25))
    path = files.planted(drawn[0], tmp_path / "x.onnx", *[files.declare(name, *shapes[name]) for name in names])
    checked = check(path, drawn[1])
    assert (checked.mismatches, checked.narrower) == ((), ("batch 2", "latent 17×25 (200×136 pixels)"))


def test_a_batch_that_the_trace_froze_is_a_limit(plant, drawn, tmp_path):
    checked = plant(files.freeze(2, 1, 1, 1))
    assert (checked.mismatches, checked.narrower) == ((), ("batch 2 (not 1, 3, 4)",))
    path = tmp_path / "planted.onnx"
    for batch, kinds in ((2, []), (4, ["sizes"])):
        found = check(path, drawn[1], SizeRequest(({"batch": (batch,) * 3},))).mismatches
        assert [each.kind for each in found] == kinds


def test_a_size_that_the_trace_froze_is_a_limit(plant):
    checked = plant(files.freeze(1, 1, 64, 64))
    assert (checked.mismatches, checked.narrower) == ((), ("latent 64×64 (512×512 pixels)",))


def test_an_output_of_another_size_than_the_sample(plant):
    found = only(plant(files.double_output))
    assert (found.kind, found.observed) == ("sizes", "no size that was tried works")
    assert found.cause == "output out_sample: is 34×126 for a sample of 17×63"


def test_a_batch_fixed_in_one_input(plant):
    found = only(plant(files.declare("text_embeds", 1, 20)))
    assert (found.where, found.kind, found.cause) == ("text_embeds", "input", "its batch is fixed, and the sample's is not")


def test_a_renamed_input_is_a_fault_in_a_file_that_claims_a_contract_alone(plant, inside, tmp_path):
    found = only(check(files.planted(inside, tmp_path / "x.onnx", files.rename(text_embeds="pooled"))))
    assert (found.where, found.kind, found.expected) == ("pooled", "name", "text_embeds")
    checked = plant(files.rename(text_embeds="pooled"))
    assert (checked.mismatches, checked.notes) == ((), ("recognised by their shapes: pooled is text_embeds",))


def test_a_renamed_slot(plant):
    found = only(plant(files.rename(down_block_residual_03="extra")))
    assert (found.where, found.kind, found.expected) == ("extra", "name", "down_block_residual_03")


def test_baked_conditioning(plant):
    found = only(plant(files.bake("text_embeds", sized_by="timestep"), files.drop("text_embeds")))
    assert (found.where, found.kind, found.observed) == ("text_embeds", "baked", "no such input")
    assert "every call gets the same conditioning" in found.cause


@pytest.mark.full
def test_baked_conditioning_of_a_real_wrapper_that_forgets_an_input(folder):
    found = only(check(*files.exported(folder / "baked.onnx", files.XL, latent=(17, 25), baked=("text_embeds",))))
    assert (found.where, found.kind, found.observed) == ("text_embeds", "baked", "no such input")


def test_baked_conditioning_is_seen_without_a_model_where_a_preset_fits(tmp_path):
    path = files.plan(tmp_path / "sdxl.onnx", presets.contract("sdxl"))
    checked = check(
        files.planted(path, tmp_path / "x.onnx", files.bake("text_embeds", sized_by="timestep"), files.drop("text_embeds"))
    )
    assert (checked.basis, told(checked)) == ("preset", [("text_embeds", "baked")])


def test_an_input_that_is_there_and_changes_nothing(plant):
    found = only(plant(files.bake("text_embeds")))
    assert (found.where, found.kind) == ("text_embeds", "unused")
    assert found.cause.startswith("baked")


def test_names_of_sizes_alone_break_nothing_and_are_noted(plant, drawn):
    for name in ("mid_h", None):
        checked = plant(files.declare("mid_block_residual", "batch", 16, name, "ceil(w/2)"))
        assert checked.mismatches == ()
        shown = f"`{name}`" if name else "unnamed"
        (note,) = [note for note in checked.notes if "TensorRT ties sizes by equal names only" in note]
        assert f"(ceil(h/2) has `ceil(h/2)`, {shown}; 1 size in all)" in note
    unnamed = [files.declare(slot.name, None, slot.channels, None, None) for slot in drawn[1].slots]
    checked = plant(*unnamed)
    assert (checked.mismatches, checked.narrower) == ((), ())


def test_one_name_for_two_sizes_breaks_nothing_and_is_noted(plant):
    checked = plant(files.declare("mid_block_residual", "batch", 16, "h", "ceil(w/2)"))
    assert checked.mismatches == ()
    assert any("`h` is h in sample, ceil(h/2) in mid_block_residual" in note for note in checked.notes)


@pytest.mark.parametrize(
    "text", ["h/2", "2*s77", "(s77 + 1)//2", "9999999999999999999999*h", "0*h", "floor(h/65536)", "-1", "", "w", "°" * 300]
)
def test_no_expression_of_sizes_ends_in_a_traceback(text, plant, drawn, tmp_path):
    edits = [
        files.declare(name, text, 4 if name == "sample" else 8, text, text) for name in ("sample", "down_block_residual_00")
    ]
    assert plant(*edits).mismatches == ()
    assert check(tmp_path / "planted.onnx").unchecked == ""
    plant(files.declare("text_embeds", text, text))


def test_a_rounding_that_a_file_never_shows_is_unknown_and_no_traceback(even):
    path, contract = even
    unknown = replace(
        contract,
        slots=tuple(
            replace(slot, skip=(*slot.skip[:2], *(Dim(dim.symbol, 1, ("exact",) * len(dim.halvings)) for dim in slot.skip[2:])))
            for slot in contract.slots
        ),
    )
    assert check(path, unknown).mismatches == ()


def test_a_timestep_of_whole_numbers(plant):
    checked = plant(files.retype("timestep", ir.DataType.INT64))
    assert (checked.mismatches, checked.narrower) == ((), ("whole timesteps (int64)",))


def test_a_timestep_of_whole_numbers_in_a_file_that_promises_another(inside, tmp_path):
    file = files.planted(inside, tmp_path / "x.onnx", files.retype("timestep", ir.DataType.INT64))
    found = only(check(file))
    assert (found.where, found.kind, found.observed, found.expected) == ("timestep", "dtype", "int64", "float32")


def test_an_input_nobody_asked_for(plant):
    found = only(plant(files.scale("mid_block_residual")))
    assert (found.where, found.kind) == ("conditioning_scale", "surplus")


def test_the_table_of_another_family(drawn, inside):
    with torch.device("meta"):
        deep = probe(small.unet(**files.DEEP))
    kinds = dict(told(check(drawn[0], deep)))
    assert kinds["text_embeds"] == "surplus"
    assert kinds["down_block_residual_07"] == "missing"
    assert kinds["down_block_residual_03"] == "channels"
    assert "order" not in kinds.values()
    checked = check(inside, presets.contract("sd15"))
    assert len(checked.mismatches) > len(drawn[1].slots)
    assert "the contract inside the file is another one: live UNet2DConditionModel" in checked.notes


# other people's names


@pytest.mark.parametrize("key", [naming.key for naming in SCHEMES])
def test_naming_schemes(key, plant, drawn):
    ours = [slot.name for slot in drawn[1].slots]
    names = dict(zip(ours, find_scheme(key).names(len(ours) - 1), strict=True))
    checked = plant(files.rename(**names))
    assert checked.mismatches == ()
    assert checked.naming == key
    assert [(each.slot, each.name) for each in checked.slots] == list(names.items())


def test_faults_are_told_under_the_file_s_own_names(plant, drawn):
    ours = [slot.name for slot in drawn[1].slots]
    names = dict(zip(ours, find_scheme("streamdiffusion").names(len(ours) - 1), strict=True))
    checked = plant(files.rename(**names), files.unconsume("input_control_02"), files.drop("input_control_02"))
    assert told(checked) == [("input_control_02", "missing")]


def test_unknown_names_are_found_by_graph_walk(plant, drawn):
    names = {slot.name: f"ctrl_{letter}" for slot, letter in zip(drawn[1].slots, "edcba", strict=True)}
    checked = plant(files.rename(**names))
    assert checked.mismatches == ()
    assert checked.naming == ""
    assert [(each.slot, each.name) for each in checked.slots] == list(names.items())
    assert any("follow no known scheme" in note for note in checked.notes)


def test_a_walk_goes_through_casts_and_scales(plant, drawn):
    names = {slot.name: f"ctrl_{letter}" for slot, letter in zip(drawn[1].slots, "abcde", strict=True)}
    edits = (files.scale("mid_block_residual"), files.retype("mid_block_residual", ir.DataType.FLOAT16))
    checked = plant(*edits, files.rename(**names))
    assert told(checked) == [("conditioning_scale", "surplus")]
    assert checked.slots[-1].name == "ctrl_e"


def test_sizes_may_be_read_off_a_residual(odd, tmp_path):
    checked = check(files.planted(odd[0], tmp_path / "x.onnx", files.measure_residuals), odd[1])
    assert (checked.mismatches, checked.narrower) == ((), ())


def test_comfyui_names_of_the_base_inputs(plant):
    names = {"sample": "x", "timestep": "timesteps", "encoder_hidden_states": "context", "text_embeds": "y"}
    alone = (files.bake("time_ids", sized_by="timestep"), files.drop("time_ids"), files.rename(**names))
    found = only(plant(*alone))
    assert (found.where, found.kind, found.cause) == ("y", "input", "it stands for text_embeds and time_ids")
    # 20 numbers of the text and six sizes, plain or eight cosines and sines for each
    for width in (26, 68):
        assert plant(*alone, files.declare("y", "batch", width)).mismatches == ()


# ControlNets


@pytest.fixture(scope="module")
def controlnet(folder) -> File:
    with torch.device("meta"):
        contract = probe_controlnet(ControlNetModel.from_unet(small.unet(**files.XL), load_weights_from_unet=False))
    return files.plan(folder / "controlnet.onnx", contract, inside=True), contract


def test_a_controlnet_is_held_to_its_own_contract(controlnet, drawn):
    path = controlnet[0]
    checked = check(path)
    assert (checked.basis, checked.mismatches) == ("inside", ())
    assert report.render_text(checked).endswith("FINE: 5 outputs and 7 base inputs\n")
    assert check(path, drawn[1]).mismatches == ()
    assert ("down_block_residual_07", "missing") in told(check(path, presets.contract("sd15")))


def test_a_controlnet_that_is_not_what_its_contract_says(controlnet, tmp_path):
    path, _ = controlnet

    def exchange(model: ir.Model) -> None:
        outputs = model.graph.outputs
        outputs[0].name, outputs[2].name = outputs[2].name, outputs[0].name

    checked = check(files.planted(path, tmp_path / "x.onnx", exchange))
    assert told(checked) == [("down_block_residual_00", "size"), ("down_block_residual_02", "size")]
    checked = check(files.planted(path, tmp_path / "x.onnx", files.rename(conditioning_scale="strength")))
    assert told(checked) == [("strength", "name")]


def test_a_controlnet_s_outputs_may_be_named_by_any_scheme(controlnet, drawn, tmp_path):
    path, contract = controlnet
    names = dict(zip([slot.name for slot in contract.slots], find_scheme("streamdiffusion").names(4), strict=True))

    def rename(model: ir.Model) -> None:
        for value in model.graph.outputs:
            value.name = names[value.name]

    def drop_last(model: ir.Model) -> None:
        model.graph.outputs.pop()

    renamed = files.planted(path, tmp_path / "x.onnx", rename)
    for checked in (check(renamed), check(renamed, drawn[1])):
        assert (checked.mismatches, checked.naming, checked.unchecked) == ((), "streamdiffusion", "")
    checked = check(files.planted(renamed, tmp_path / "y.onnx", drop_last))
    assert told(checked) == [("input_control_middle", "missing")]


def test_a_controlnet_s_outputs_may_come_in_any_order(controlnet, tmp_path):
    checked = check(files.planted(controlnet[0], tmp_path / "x.onnx", lambda model: model.graph.outputs.reverse()))
    assert (checked.mismatches, checked.narrower) == ((), ())


def test_a_controlnet_that_hides_its_sizes_or_works_at_none_is_not_fine(controlnet, drawn, tmp_path):
    path, contract = controlnet
    for held in (contract, drawn[1]):
        hidden = check(files.planted(path, tmp_path / "x.onnx", files.foreign("Conv")), held)
        assert (hidden.mismatches, hidden.unchecked[:35]) == ((), "sizes could not be followed through")
        wrong = check(files.planted(path, tmp_path / "y.onnx", files.freeze(1, 1, 2, 2)), held)
        assert ("sample", "sizes") in told(wrong)


def test_a_controlnet_of_others_needs_a_model(tmp_path, controlnet):
    def forget(model: ir.Model) -> None:
        model.metadata_props.clear()

    path = files.planted(controlnet[0], tmp_path / "net.onnx", forget)
    with pytest.raises(ShapecheckError, match=r"net\.onnx is a ControlNet \(5 outputs\) and holds no contract; name the UNet"):
        check(path)


def test_whether_a_controlnet_fits_what_the_file_is_of(drawn, tmp_path):
    small.controlnet(small.unet(**files.XL)).save_pretrained(tmp_path / "net")
    small.controlnet(small.unet(**small.TINY)).save_pretrained(tmp_path / "tiny")
    assert find_misfits(drawn[1], [str(tmp_path / "net")], progress=str) == ()
    found = find_misfits(drawn[1], [str(tmp_path / "tiny")], progress=str)
    assert ("down_block_residual_03", "missing") in [(each.where, each.kind) for each in found]


@pytest.mark.nightly
def test_whether_the_controlnet_of_a_preset_fits():
    assert find_misfits(presets.contract("sd15"), ["sd15"], progress=str) == ()
    found = find_misfits(presets.contract("sd15"), ["sdxl"], progress=str)
    assert ("down_block_residual_09", "missing") in [(each.where, each.kind) for each in found]


def test_a_controlnet_cannot_be_held_to_an_unknown_unet(drawn):
    with pytest.raises(ShapecheckError, match="it is not known which UNet this file is; name it with --model"):
        find_misfits(check(drawn[0]).contract, ["sd15"], progress=str)


# shapes


def test_a_reshape_to_numbers_of_one_size_is_a_fault_at_another():
    node = onnx.helper.make_node("Reshape", ["x", "to"], ["y"], name="flat")
    to = onnx.helper.make_tensor("to", onnx.TensorProto.INT64, [2], [4, 6])
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["a", "b"]) for name in "xy")
    graph = onnx.helper.make_graph([node], "g", [x], [y], [to])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]))
    assert infer_shapes_at(model, {"x": (2, 12)}).known["y"] == (4, 6)
    assert infer_shapes_at(model, {"x": (2, 12)}).fault == ""
    assert infer_shapes_at(model, {"x": (2, 13)}).fault == "Reshape flat: 2×13 cannot be reshaped to 4×6"
    model.graph[0].name = "flat\x1b\nFINE"
    assert infer_shapes_at(model, {"x": (2, 13)}).fault.startswith(r"Reshape flat\x1b\nFINE: ")


def test_operators_nobody_knows_hide_sizes_and_that_is_told(plant):
    checked = plant(files.foreign("Conv"))
    assert checked.mismatches == ()
    assert [each.skip for each in checked.slots] == ["not seen"] * 5
    assert checked.unchecked == "sizes could not be followed through OddConv: only names and structure were checked"
    assert report.render_text(checked).endswith(f"NOT CHECKED: {checked.unchecked}\n")
    assert json.loads(report.render_json(checked))["verdict"] == "not checked"


@pytest.mark.parametrize("opset", [18, 21])
def test_shapes_are_followed_through_group_normalization(opset):
    floats = onnx.TensorProto.FLOAT
    given = [onnx.helper.make_tensor_value_info(name, floats, shape) for name, shape in (("x", ["n", 8, "h"]), ("scale", [8]))]
    nodes = [
        onnx.helper.make_node("GroupNormalization", ["x", "scale", "scale"], ["norm"], num_groups=2),
        onnx.helper.make_node("Concat", ["norm", "norm"], ["y"], axis=2),
    ]
    graph = onnx.helper.make_graph(nodes, "g", given, [onnx.helper.make_tensor_value_info("y", floats, None)])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    found = infer_shapes_at(ir.from_proto(proto), {"x": (3, 8, 5)})
    assert (found.known["norm"], found.known["y"], found.fault) == ((3, 8, 5), (3, 8, 10), "")


@pytest.mark.parametrize("what", ["sample", "output"])
def test_what_cannot_be_followed_is_never_called_fine(what, drawn, tmp_path):
    def clear(model: ir.Model) -> None:
        for value in model.graph.inputs:
            value.shape = None

    def flatten(model: ir.Model) -> None:
        model.graph.outputs[0].shape = ir.Shape(["n"])

    model = tmp_path / "contract.json"
    model.write_text(drawn[1].to_json(), encoding="utf-8")
    path = files.planted(drawn[0], tmp_path / "x.onnx", clear if what == "sample" else flatten)
    result = run(path, "--model", model)
    assert result.exit_code == 2
    assert re.search(r"\nNOT CHECKED: .*: only names and structure were checked\n$", result.stdout)
    found = run(files.planted(path, tmp_path / "y.onnx", files.unconsume("mid_block_residual")), "--model", model)
    assert found.exit_code == 1
    assert "only names and structure" in found.stdout


def test_an_output_that_is_no_image_may_come_first(plant):
    def lead(model: ir.Model) -> None:
        flat = ir.Node(
            "", "ReduceMean", [model.graph.outputs[0]], [ir.AttrInt64s("axes", [1, 2, 3]), ir.AttrInt64("keepdims", 0)]
        )
        flat.outputs[0].name, flat.outputs[0].type = "mean", ir.TensorType(ir.DataType.FLOAT)
        flat.outputs[0].shape = ir.Shape(["batch"])
        model.graph.append(flat)
        model.graph.outputs.insert(0, flat.outputs[0])

    checked = plant(lead)
    assert (checked.mismatches, checked.unchecked) == ((), "")
    assert plant(files.double_output, lead).mismatches[0].cause == "output out_sample: is 34×126 for a sample of 17×63"


def test_the_size_asked_for_is_looked_at_where_the_file_fixes_its_tokens(even, tmp_path):
    width = even[1].config["cross_attention_dim"]
    path = files.planted(even[0], tmp_path / "x.onnx", files.declare("encoder_hidden_states", "batch", 7, width))
    for width, fails in ((40, 0), (41, 1)):
        requested = SizeRequest(({"h": (24,) * 3, "w": (width,) * 3},))
        assert [each.observed for each in check(path, even[1], requested).mismatches] == ["does not work"] * fails


def test_sizes_are_compared_where_the_contract_allows_only_multiples(drawn):
    path, contract = drawn
    assert check(path, replace(contract, divisor=8)).unchecked == ""
    other = replace(files.without_halving(contract), divisor=8)
    assert ("mid_block_residual", "size") in told(check(path, other))


def test_no_weight_is_left_that_could_be_read(odd):
    model = ir.from_proto(OnnxFile(odd[0]).proto)
    parameters_to_inputs(model.graph)
    assert max(value.const_value.size for value in model.graph.initializers.values()) <= 64
    assert "model.conv_in.weight" in {value.name for value in model.graph.inputs}


# hostile files


def test_data_outside_the_file_is_never_opened(odd, tmp_path, monkeypatch):
    """A secret that exists is named where a weight and where a size should be: neither may be touched."""
    model = onnx.load(odd[0])
    (tmp_path / "secret").write_bytes(bytes(2**16))
    tensors = sorted(model.graph.initializer, key=lambda each: -len(each.raw_data))
    for tensor in (tensors[0], tensors[-1]):
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../" * 20 + str(tmp_path / "secret"))
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    for door in ("numpy", "tobytes", "tofile", "__array__"):
        monkeypatch.setattr(ir.ExternalTensor, door, lambda self, *_: pytest.fail("external data was opened"))
    assert check(path, odd[1]).mismatches == ()


def test_a_constant_whose_data_lies_outside_is_refused(tmp_path):
    tensor = onnx.helper.make_tensor("c", onnx.TensorProto.FLOAT, [4], [0.0] * 4)
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], name="odd", value=tensor),
        onnx.helper.make_node("Relu", ["c"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [], [onnx.helper.make_tensor_value_info("y", 1, [4])])
    path = tmp_path / "x.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ShapecheckError, match=r"x\.onnx: not a sound .*: a constant keeps its data in another file"):
        check(path)


def test_a_large_tensor_that_a_small_file_asks_for_is_not_made():
    sizes = onnx.helper.make_tensor("sizes", onnx.TensorProto.INT64, [2], [2**13, 2**13])
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1, 1], [1.0])
    output = onnx.helper.make_tensor_value_info("huge", 1, ["a", "b"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Tile", ["one", "sizes"], ["huge"])], "g", [], [output], [sizes, one])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]))
    tracemalloc.start()
    try:
        assert infer_shapes_at(model, {}).known["huge"] == (2**13, 2**13)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def calls(name: str, *called: str) -> onnx.FunctionProto:
    """A function of one input and one output that calls others in a row, or nothing."""
    values = ["a", *(f"v{number}" for number in range(len(called) - 1)), "b"]
    nodes = [onnx.helper.make_node(each, [values[at]], [values[at + 1]], domain="own") for at, each in enumerate(called)]
    nodes = nodes or [onnx.helper.make_node("Relu", ["a"], ["b"])]
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in (("", 17), ("own", 1))]
    return onnx.helper.make_function("own", name, ["a"], ["b"], nodes, opsets)


@pytest.mark.parametrize("called", ["F0", ""])
@pytest.mark.parametrize("depth", [1, 40])
def test_functions_that_double_at_every_level_are_refused(called, depth, drawn, tmp_path):
    model = onnx.load(drawn[0], load_external_data=False)
    model.functions.extend(calls(f"F{level}", *[f"F{level + 1}"] * 2) for level in range(depth))
    model.functions.append(calls(f"F{depth}"))
    model.opset_import.add(domain="own", version=1)
    if called:
        model.graph.node[-1].op_type, model.graph.node[-1].domain = called, "own"
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    if depth == 1:
        assert check(path, drawn[1]).mismatches == ()
        return
    with pytest.raises(ShapecheckError, match=r"not a sound .* its functions have more than 200000 nodes when inlined"):
        check(path, drawn[1])


def test_functions_that_call_themselves_are_refused(drawn, tmp_path):
    model = onnx.load(drawn[0], load_external_data=False)
    model.functions.extend([calls("F", "G"), calls("G", "F")])
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ShapecheckError, match="its functions have more than"):
        check(path)


def test_a_residual_that_forks_and_joins_is_followed_once(tmp_path):
    shape = [1, 1, 1, 1]
    nodes, value = [], "forked"
    for level in range(60):
        sides = [f"{side}{level}" for side in "lr"]
        nodes += [onnx.helper.make_node("Mul", [value, "one"], [side]) for side in sides]
        nodes.append(onnx.helper.make_node("Mul", sides, [value := f"v{level}"]))
    nodes += [onnx.helper.make_node("Relu", ["one"], ["skip"]), onnx.helper.make_node("Add", ["skip", value], ["y"])]
    names = [name for node in nodes for name in node.output]
    given, inner, end = (
        [onnx.helper.make_tensor_value_info(name, 1, shape) for name in group] for group in (["forked", "one"], names, ["y"])
    )
    graph = onnx.helper.make_graph(nodes, "g", given, end, value_info=inner[:-1])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "x.onnx")
    forked = next(each for each in OnnxFile(tmp_path / "x.onnx").reading.inputs if each.name == "forked")
    assert [add.skip for add in forked.adds] == ["skip"]


EVIL = "evil\x1b[2J\nFINE: 13 slots\u202e\x9b"


def test_no_name_in_a_file_can_forge_a_line_of_the_report(inside, drawn, tmp_path):
    header = replace(drawn[1].header, source=EVIL, notes=(EVIL,), versions=((EVIL, EVIL),))

    def forge(model: ir.Model) -> None:
        model.producer_name, model.opset_imports["somewhere"] = EVIL, 1
        model.metadata_props[CONTRACT_KEY] = replace(drawn[1], header=header).to_json()
        skip = next(node for node in model.graph if node.op_type == "Conv")
        skip.name = skip.outputs[0].name = EVIL + "skip"
        residual = next(value for value in model.graph.inputs if value.name == "down_block_residual_01")
        residual.shape = ir.Shape([EVIL, *residual.shape[1:]])
        last = [node for node in model.graph if node.op_type == "ReduceMean"][-1]
        last.domain, last.op_type = "somewhere", EVIL

    path = files.planted(inside, tmp_path / "x.onnx", forge, files.rename(text_embeds=EVIL, down_block_residual_00=f"{EVIL}2"))
    checked = check(path)
    shown = r"evil\x1b[2J\nFINE: 13 slots\u202e\x9b"
    assert {(shown, "name"), (f"{shown}2", "name")} <= set(told(checked))
    assert checked.slots[0].skip == "batch×8×h×w"
    for text in (report.render_text(checked), report.render_text(checked, form="markdown"), "\n".join(checked.notes)):
        assert all(line.isprintable() and not line.startswith("FINE") for line in text.split("\n"))
    assert checked.unchecked.startswith(f"sizes could not be followed through {shown}: ")


def test_a_contract_inside_that_forges_names_is_refused(inside, drawn, tmp_path):
    def forge(model: ir.Model) -> None:
        first, *rest = drawn[1].slots
        model.metadata_props[CONTRACT_KEY] = replace(drawn[1], slots=(replace(first, producer=EVIL), *rest)).to_json()

    with pytest.raises(ShapecheckError, match=r"an edited contract: evil\\x1b\[2J\\nFINE: .* is not a name"):
        check(files.planted(inside, tmp_path / "x.onnx", forge))


def test_two_names_that_would_be_shown_alike_are_refused(drawn, tmp_path):
    rename = files.rename(text_embeds="a\x1b", time_ids=r"a\x1b")
    with pytest.raises(ShapecheckError, match=r"not a sound .* two values are called a\\x1b"):
        check(files.planted(drawn[0], tmp_path / "x.onnx", rename), drawn[1])


@pytest.mark.parametrize("size", [0, -1])
def test_no_size_at_all_is_as_good_as_no_name(size, plant):
    checked = plant(files.declare("sample", size, 4, size, size))
    assert (checked.mismatches, checked.narrower) == ((), ())
    assert checked.inputs[0].shape == "?×4×?×?"


def test_a_file_is_opened_and_parsed_once(odd, tmp_path):
    path = files.planted(odd[0], tmp_path / "once.onnx", files.exchange("down_block_residual_01", "down_block_residual_02"))
    for asked in ([], ["--latent", "17x25"], ["--size", "136x200"]):
        with openings.counted() as counter:
            assert CliRunner().invoke(main, ["check", str(path), *asked]).exit_code == 1
        assert (counter["parsed"], counter["once.onnx"]) == (1, 1)


def test_two_questions_open_it_twice_so_that_the_test_above_can_fail(odd):
    with openings.counted() as counter:
        assert OnnxFile(odd[0]).metadata == OnnxFile(odd[0]).metadata
    assert (counter["parsed"], counter[odd[0].name]) == (2, 2)


def test_the_parser_is_not_chosen_by_the_file_s_name(drawn, tmp_path):
    for name in ("x.onnxtxt", "x.json", "x.textproto"):
        path = tmp_path / name
        path.write_bytes(drawn[0].read_bytes())
        assert check(path, drawn[1]).mismatches == ()


def test_a_bug_of_ours_is_not_blamed_on_the_file(drawn, monkeypatch):
    monkeypatch.setattr("shapecheck.onnx.reading.parameters_to_inputs", lambda graph: graph.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        check(*drawn)


@pytest.mark.parametrize("share", [0, 1, 10, 50, 99])
def test_a_truncated_file_is_refused_wherever_it_is_cut(share, drawn, tmp_path):
    data = drawn[0].read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: len(data) * share // 100])
    with pytest.raises(ShapecheckError, match=r"cut\.onnx"):
        check(path)


def test_damage_anywhere_is_one_message_or_a_report(drawn, tmp_path):
    data = drawn[0].read_bytes()
    path = tmp_path / "damaged.onnx"
    for at in range(11, len(data), len(data) // 8):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            assert isinstance(check(path), FileCheck)
        except ShapecheckError as error:
            assert "damaged.onnx" in str(error)


@pytest.mark.parametrize("text", [b"Conv", b"/conv_in/Conv"])
def test_text_that_is_no_utf_8_is_refused(text, drawn, tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(drawn[0].read_bytes().replace(text, b"\xff" + text[1:]))
    with pytest.raises(ShapecheckError, match=r"x\.onnx: not a sound .* is not UTF-8 text"):
        check(path)


def test_a_graph_that_contradicts_itself_is_refused(tmp_path):
    output = onnx.helper.make_tensor_value_info("a", 1, ["n"])
    path = tmp_path / "odd.onnx"
    loop = [onnx.helper.make_node("Relu", ["b"], ["a"]), onnx.helper.make_node("Relu", ["a"], ["b"])]
    for nodes in (loop, [onnx.helper.make_node("Relu", ["nowhere"], ["a"])]):
        path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph(nodes, "odd", [], [output])).SerializeToString())
        with pytest.raises(ShapecheckError, match=r"odd\.onnx: not a sound ONNX graph"):
            check(path)


def test_a_damaged_contract_inside_needs_a_model(drawn, inside, tmp_path):
    def damage(model: ir.Model) -> None:
        model.metadata_props[CONTRACT_KEY] = drawn[1].to_json().replace("UNet2DCond", "UNet3DCond")

    path = files.planted(inside, tmp_path / "x.onnx", damage)
    with pytest.raises(ShapecheckError, match=r"an edited contract: .* name the model instead: --model"):
        check(path)
    checked = check(path, drawn[1])
    assert checked.mismatches == ()
    assert "cannot be read" in checked.notes[0]


def test_what_is_no_unet_is_said_to_be_none(tmp_path):
    image, output = (onnx.helper.make_tensor_value_info(name, 1, ["n", 3, "a", "b"]) for name in ("pixels", "out"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["pixels"], ["out"])], "g", [image], [output])
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(ShapecheckError, match=r"relu\.onnx takes no residuals \(inputs: pixels\) and fits no preset"):
        check(path)
    assert ("down_block_residual_00", "missing") in told(check(path, presets.contract("sd15")))


# what people see


def run(*arguments: object):
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def test_the_command_tells_and_exits_as_it_found(drawn, tmp_path):
    model = tmp_path / "contract.json"
    model.write_text(drawn[1].to_json(), encoding="utf-8")
    result = run(drawn[0], "--model", model)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(r"held to +the contract of live UNet2DConditionModel\n", result.stdout)
    assert result.stdout.endswith("\nFINE: 5 slots and 5 base inputs\n")
    result = run(drawn[0], "--model", model, "--size", "328x200")
    assert result.stdout.endswith("FINE: 5 slots and 5 base inputs at batch 1, latent 25×41\n")
    broken = run(files.planted(drawn[0], tmp_path / "x.onnx", files.unconsume("mid_block_residual")), "--model", model)
    assert broken.exit_code == 1
    assert re.search(r"mid_block_residual +unused +added to nothing +added to the output of mid_block", broken.stdout)
    assert broken.stdout.endswith("\nBROKEN: 1 fault: mid_block_residual is without effect on the output\n")


def test_pixels_are_counted_as_the_contract_inside_says(drawn, tmp_path):
    contract = replace(drawn[1], header=replace(drawn[1].header, vae_factor=4))
    result = run(files.plan(tmp_path / "x.onnx", contract, inside=True), "--size", "164x100")
    assert result.stdout.endswith("FINE: 5 slots and 5 base inputs at batch 1, latent 25×41\n")


def test_markdown_and_json_say_the_same(drawn, inside, tmp_path):
    path = files.planted(inside, tmp_path / "x.onnx", files.rename(text_embeds="pooled"))
    model = tmp_path / "contract.json"
    model.write_text(drawn[1].to_json(), encoding="utf-8")
    text = run(path, "--model", model, "--format", "markdown").stdout
    assert text.startswith(f"# {path}\n\n**BROKEN: 1 fault: pooled is named otherwise**\n\n")
    assert "\n| pooled  | name   | pooled         | text_embeds" in text
    output = tmp_path / "report.json"
    result = run(path, "--model", model, "--format", "json", "-o", output)
    assert (result.exit_code, result.stdout) == (1, "")
    record = json.loads(output.read_text(encoding="utf-8"))
    assert (record["verdict"], record["basis"], record["limits"], record["requested"]) == ("broken", "given", [], [])
    tried = {"latents": [[17, 63], [27, 53], [37, 43], [47, 33]], "batches": [1, 2, 3, 4], "tokens": [11, 77, 154]}
    assert record["sizes"] == {"divisor": 1, "fixed": {}, **tried}
    assert [each["kind"] for each in record["mismatches"]] == ["name"]
    assert [each["slot"] for each in record["slots"]] == [slot.name for slot in drawn[1].slots]


@pytest.mark.parametrize(
    ("edits", "first"),
    [
        ((files.exchange("down_block_residual_00", "down_block_residual_01"), files.unconsume("mid_block_residual")),
         ("2 faults: down_block_residual_00 and down_block_residual_01 are exchanged; "
          "mid_block_residual is without effect on the output")),
        ([edit for index in range(3) for edit in (files.unconsume(f"down_block_residual_0{index}"),)],
         "1 fault: down_block_residual_00, down_block_residual_01 and 1 more are without effect on the output"),
    ],
)  # fmt: skip
def test_a_symptom_and_its_consequences_are_one_finding(edits, first, plant):
    checked = plant(*edits)
    title, verdict, following, *_ = report.render_text(checked).split("\n\n")
    assert (title, verdict) == (checked.path, f"BROKEN: {first}")
    assert following.startswith("next: ")


def test_another_model_s_file_is_one_finding(drawn):
    with torch.device("meta"):
        deep = probe(small.unet(**files.DEEP))
    first = report.list_findings(check(drawn[0], deep))[0]
    assert first == "most slots are not those of live UNet2DConditionModel: it is probably another model's file"


def test_the_report_tells_of_controlnets_apart_from_the_file(drawn):
    checked = check(*drawn)
    misfit = Mismatch("channels", "mid_block_residual", (1, 8, 9, 9), (1, 16, 9, 9))
    text = report.render_text(checked, controlnets=["mine"], misfits=[misfit])
    assert text.endswith("FINE: 5 slots and 5 base inputs\nCONTROLNET: mine does not fit: 1 place\n")
    assert json.loads(report.render_json(checked, controlnets=["mine"], misfits=[misfit]))["verdict"] == "broken"
    assert report.render_text(checked, controlnets=["mine"]).endswith("CONTROLNET: mine fits\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.onnx"], "cannot read no.onnx: No such file"),
        (["."], ". is not a regular file"),
        ([__file__], "is not an ONNX model"),
        (["{drawn}", "--model", "sd16"], "did you mean"),
        (["{drawn}", "--model", "no.onnx"], "cannot read no.onnx: No such file"),
        (["{drawn}", "--model", "{drawn}"], "plan.onnx holds no contract"),
        (["{drawn}", "--size", "8"], "'8' is not a size"),
        (["{drawn}", "--size", "63x64"], "width 63 is not a multiple of 8"),
        (["{drawn}", "--size", "64x64", "--latent", "8x8"], "give one of them"),
        (["{drawn}", "-o", "no/such/folder/report.txt"], "cannot write no/such/folder/report.txt"),
    ],
)
def test_what_cannot_be_done_is_exit_status_2_and_one_message(arguments, message, drawn):
    result = run(*(each.format(drawn=drawn[0]) for each in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_a_model_is_a_preset_a_file_with_a_contract_or_observed(drawn, inside, tmp_path):
    assert resolve_contract("sd15", progress=str) == presets.contract("sd15")
    assert resolve_contract(str(inside), progress=str) == drawn[1]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(drawn[1].config.to_json()), encoding="utf-8")
    assert resolve_contract(str(config), progress=str) == drawn[1]


def test_onnx_runtimes_own_format_is_called_so(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x18\0\0\0ORTM" + bytes(64))
    with pytest.raises(ShapecheckError, match="is in ONNX Runtime's own format, which holds no ONNX graph; give the ONNX file"):
        check(path)


@pytest.mark.parametrize(("dims", "inputs"), [((2, 9, 24), ["x", "x", "x"]), ((2, 9, 4, 3, 6), ["x"])])
def test_attention_of_onnx_runtime_is_as_large_as_its_query(dims, inputs):
    node = onnx.helper.make_node("MultiHeadAttention", inputs, ["y"], domain="com.microsoft", num_heads=4)
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in (("x", dims), ("y", None))
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "attention", [x], [y]), opset_imports=opsets)
    assert infer_shapes_at(ir.from_proto(model), {"x": dims}).known["y"] == (2, 9, 24)
