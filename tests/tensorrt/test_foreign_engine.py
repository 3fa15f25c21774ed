"""Engines that others built, beside the contract of their model: no TensorRT is asked; what it would tell is written here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from shapecheck import Geometry, presets
from shapecheck.cli import main
from shapecheck.contract import Dim, Input
from shapecheck.contract.naming import find_scheme
from shapecheck.tensorrt import check as tensorrt_check
from shapecheck.tensorrt.engine_tensors import DeclaredEngine, DeclaredTensor
from shapecheck.tensorrt.foreign_engine import match_engine
from shapecheck.tensorrt.process import EngineError
from shapecheck.tensorrt.profiles import Range

UNET = presets.contract("sd15")
SLOTS = [slot.name for slot in UNET.slots]
CONTROLNET = replace(
    UNET,
    role="controlnet",
    inputs=(
        *UNET.inputs,
        Input("controlnet_cond", (Dim("batch"), Dim(None, 3), Dim("h", 8), Dim("w", 8)), "float32", "controlnet_cond"),
        Input("conditioning_scale", (Dim(None, 1),), "float32", "conditioning_scale"),
    ),
)
SMALL = Range(Geometry(1, 32, 40), Geometry(2, 64, 72), Geometry(4, 96, 104))
LARGE = Range(Geometry(1, 97, 97), Geometry(1, 128, 136), Geometry(2, 129, 137))
STREAM = dict(zip(SLOTS, find_scheme("streamdiffusion").names(12), strict=True))


def declare(
    names: Mapping[str, str] | None = None,
    ranges: Iterable[Range] = (SMALL,),
    *,
    contract=UNET,
    order: Iterable[str] | None = None,
    dtypes: Mapping[str, str] | None = None,
    outputs: Mapping[str, tuple[int, ...]] | None = None,
) -> DeclaredEngine:
    """What TensorRT tells of an engine whose profiles are the images of these ranges."""
    rules, ranges, names = contract.input_rules, list(ranges), names or {}
    tensors = []
    for name in order or rules:
        shape = tuple(-1 if dim.symbol else dim.scale for dim in rules[name])
        bounds = tuple(tuple(geometry.shape_of(rules[name]) for geometry in each.geometries) for each in ranges)
        dtype = (dtypes or {}).get(name, "float16")
        tensors.append(DeclaredTensor(names.get(name, name), True, dtype, shape, bounds if -1 in shape else ()))
    for name, shape in (outputs or {"latent_out": (-1, 4, -1, -1)}).items():
        tensors.append(DeclaredTensor(name, False, "float16", shape, ()))
    return DeclaredEngine("Unnamed Network 0", tuple(tensors), len(ranges))


def alter(declared: DeclaredEngine, name: str, **changes) -> DeclaredEngine:
    return replace(
        declared, tensors=tuple(replace(each, **changes) if each.name == name else each for each in declared.tensors)
    )


def kinds(mismatches) -> list[tuple[str, str]]:
    return [(each.kind, each.where) for each in mismatches]


def test_an_engine_under_a_known_scheme_is_the_model_in_its_own_precision():
    found = match_engine(declare(STREAM, [SMALL, LARGE], dtypes={"timestep": "float32"}), UNET)
    assert (found.refusals, found.faults) == ((), ())
    assert found.notes == ("the slots are named as by StreamDiffusion's TensorRT UNet",)
    interface = found.interface
    assert dict(interface.names) == {name: STREAM.get(name, name) for name in UNET.input_rules}
    assert interface.contract.input_dtypes == dict.fromkeys(UNET.input_rules, "float16") | {"timestep": "float32"}
    assert interface.ranges == (SMALL, LARGE)
    assert interface.profiles[1].bounds("mid_block_residual").max == (2, 1280, 17, 18)
    assert interface.outputs == ("latent_out",)


def test_comfyuis_names_are_known():
    slots = dict(zip(SLOTS, find_scheme("comfyui").names(12), strict=True))
    names = {"sample": "x", "timestep": "timesteps", "encoder_hidden_states": "context", **slots}
    found = match_engine(declare(names), UNET)
    assert (found.refusals, found.faults, dict(found.interface.names)) == ((), (), names)


def test_numbers_in_names_of_no_scheme_tell_the_order_whatever_that_of_the_engine():
    names = {name: f"ctrl_down_{index}" for index, name in enumerate(SLOTS[:-1])} | {SLOTS[-1]: "ctrl_mid"}
    found = match_engine(declare(names, order=reversed(list(UNET.input_rules))), UNET)
    assert (found.refusals, found.faults) == ((), ())
    assert {ours: theirs for ours, theirs in found.interface.names if ours in SLOTS} == names
    assert found.unsure == ""
    assert list(dict(found.interface.names)) == list(UNET.input_rules)
    (note,) = found.notes
    assert note.startswith("recognised by shape or number: ctrl_down_0 is down_block_residual_00, ")


def test_names_that_tell_nothing_are_taken_by_shape_and_order_and_what_that_leaves_open_is_told():
    # The engine has the smallest residuals first; within a shape the order is the model's.
    groups = [SLOTS[9:], SLOTS[7:9], SLOTS[6:7], SLOTS[4:6], SLOTS[3:4], SLOTS[:3]]
    order = ["encoder_hidden_states", *(name for group in groups for name in group), "timestep", "sample"]
    names = {name: f"tensor{chr(97 + place)}" for place, name in enumerate(order)}
    found = match_engine(declare(names, order=order), UNET)
    assert (found.refusals, found.faults) == ((), ())
    assert dict(found.interface.names) == names
    unsure = found.unsure
    assert unsure.startswith("taken in the order of the engine: ") and "unknown until values decide" in unsure
    told = {name for name in SLOTS if f"{names[name]} as {name}," in unsure or f"{names[name]} as {name};" in unsure}
    assert told == {*SLOTS} - {SLOTS[3], SLOTS[6]}  # the only ones of their shapes
    assert any(f"{names['sample']} is sample" in note for note in found.notes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda seen: replace(seen, tensors=tuple(t for t in seen.tensors if t.name != "input_control_03")),
         [("missing", "down_block_residual_03")]),
        (lambda seen: replace(seen, tensors=(*seen.tensors, DeclaredTensor("kvo_cache", True, "float16", (2, 2), ()))),
         [("surplus", "kvo_cache")]),
        (lambda seen: alter(seen, "input_control_03", shape=(-1, 640, -1, -1)), [("channels", "down_block_residual_03")]),
        (lambda seen: alter(seen, "input_control_03", dtype="float32"), [("dtype", "down_block_residual_03")]),
        (lambda seen: alter(seen, "timestep", shape=(), bounds=()), [("rank", "timestep")]),
        (lambda seen: alter(seen, "encoder_hidden_states", shape=(-1, -1, 1024)), [("input", "encoder_hidden_states")]),
        (lambda seen: alter(seen, "latent_out", shape=(-1, 8, -1, -1)), [("channels", "the output")]),
    ],
)  # fmt: skip
def test_what_keeps_it_from_being_called_as_the_model_is_told(change, expected):
    assert match_engine(declare(STREAM), UNET).refusals == ()
    assert kinds(match_engine(change(declare(STREAM)), UNET).refusals) == expected


def test_a_slot_left_out_among_nameless_ones_is_one_fault():
    names = {name: f"tensor{chr(97 + place)}" for place, name in enumerate(SLOTS)}
    order = [name for name in UNET.input_rules if name != SLOTS[8]]
    found = match_engine(declare(names, order=order), UNET)
    assert kinds(found.refusals) == [("missing", SLOTS[8])]
    assert dict(found.interface.names) == {name: names.get(name, name) for name in order}


def test_an_engine_without_slots_and_one_of_a_controlnet_are_seen():
    bare = match_engine(declare(order=[base.name for base in UNET.inputs]), UNET)
    assert not bare.has_slots
    assert kinds(bare.refusals) == [("missing", name) for name in SLOTS]
    other = match_engine(declare(contract=CONTROLNET, outputs=dict.fromkeys(SLOTS, (-1, 320, -1, -1))), UNET)
    assert ("surplus", "controlnet_cond") in kinds(other.refusals) and ("name", "the outputs") in kinds(other.refusals)


def test_a_whole_number_for_the_timestep_is_a_fault_and_served():
    found = match_engine(declare(STREAM, dtypes={"timestep": "int64"}), UNET)
    assert (found.refusals, kinds(found.faults)) == ((), [("dtype", "timestep")])
    assert found.interface.contract.input_dtypes["timestep"] == "int64"


def test_a_range_that_is_not_the_samples_is_a_fault_where_it_refuses_sizes_and_a_note_where_it_takes_more():
    rule = UNET.input_rules["mid_block_residual"]
    least, usual, most = (geometry.shape_of(rule) for geometry in SMALL.geometries)
    seen = declare(STREAM)
    narrow = match_engine(alter(seen, "input_control_middle", bounds=((least, usual, (4, 1280, 12, 12)),)), UNET)
    assert (narrow.refusals, kinds(narrow.faults)) == ((), [("rounding", "mid_block_residual")])
    assert narrow.faults[0].observed == "profile 0: max 4×1280×12×12"
    assert narrow.faults[0].expected == f"max {'×'.join(map(str, most))}"
    wide = match_engine(alter(seen, "input_control_middle", bounds=(((1, 1280, 1, 1), usual, (9, 1280, 99, 99)),)), UNET)
    assert (wide.refusals, wide.faults) == ((), ())
    assert wide.notes[-1].startswith("profile 0 takes more sizes than the sample's at mid_block_residual")


def test_an_engine_of_one_size_shows_it():
    size = Geometry(2, 65, 73)
    seen = declare(STREAM, [Range(size, size, size)])
    static = tuple(replace(each, shape=each.bounds[0][1] if each.bounds else each.shape, bounds=()) for each in seen.tensors)
    found = match_engine(replace(seen, tensors=static), UNET)
    assert (found.refusals, found.faults, found.interface.ranges) == ((), (), (Range(size, size, size),))
    assert found.interface.profiles[0].bounds("mid_block_residual").min == (2, 1280, 9, 10)


def test_the_outputs_of_a_controlnet_are_put_in_the_order_of_its_slots():
    shapes = {slot.name: (-1, slot.channels, -1, -1) for slot in CONTROLNET.slots}
    backwards = match_engine(declare(contract=CONTROLNET, outputs=dict(reversed(shapes.items()))), CONTROLNET)
    assert (backwards.refusals, backwards.interface.outputs) == ((), tuple(SLOTS))
    nameless = {f"out{place}": shape for place, shape in enumerate(shapes.values())}
    assert match_engine(declare(contract=CONTROLNET, outputs=nameless), CONTROLNET).interface.outputs == tuple(nameless)
    wrong = match_engine(declare(contract=CONTROLNET, outputs=nameless | {"out4": (-1, 320, -1, -1)}), CONTROLNET)
    assert kinds(wrong.refusals) == [("channels", SLOTS[4])]
    short = match_engine(declare(contract=CONTROLNET, outputs=dict(list(nameless.items())[:9])), CONTROLNET)
    assert kinds(short.refusals) == [("name", "the outputs")]


# `shapecheck check`, with what TensorRT would tell


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """The file of an engine without a record; what is called with a declared engine makes TensorRT tell that of it."""

    def tell(declared: DeclaredEngine | Exception) -> Path:
        def read_back(path, engine, progress):
            assert engine is None
            if isinstance(declared, Exception):
                raise declared
            return declared

        monkeypatch.setattr(tensorrt_check, "read_back", read_back)
        return path

    path = tmp_path / "theirs.engine"
    path.write_bytes(b"ftrt")
    return tell


def check(*arguments):
    result = CliRunner().invoke(main, ["check", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def test_check_holds_an_engine_without_a_record_to_the_model(theirs):
    path = theirs(declare(STREAM, [SMALL, LARGE]))
    result = check(path, "--model", "sd15", "--size", "576x512")
    told = " ".join(result.stdout.split())
    assert result.exit_code == 0, result.output
    for text in (
        "read from the engine itself, by TensorRT; no record is beside it",
        "inputs 3 base inputs, 13 slots",
        "profile 1 776×776 … 1088×1024 … 1096×1032 pixels, batch 1 … 1 … 2",
        "note: the slots are named as by StreamDiffusion's TensorRT UNet",
        "FINE: the engine is called as the model is",
        "SIZE: 576×512 pixels (batch 2, latent 64×72) fits profile 0",
    ):
        assert text in told
    record = json.loads(check(path, "--model", "sd15", "--format", "json").stdout)
    assert (record["verdict"], record["key"], record["names"]["mid_block_residual"]) == ("fine", None, "input_control_middle")
    wrong = check(path, "--model", "sdxl")
    assert (wrong.exit_code, "BROKEN" in wrong.stdout, "text_embeds" in wrong.stdout) == (1, True, True)


def test_a_size_that_a_slot_refuses_fits_no_profile(theirs):
    least, usual, _ = (geometry.shape_of(UNET.input_rules["mid_block_residual"]) for geometry in SMALL.geometries)
    path = theirs(alter(declare(STREAM), "input_control_middle", bounds=((least, usual, (4, 1280, 12, 12)),)))
    result = check(path, "--model", "sd15", "--latent", "96x104")
    assert result.exit_code == 1
    assert "mid_block_residual: got 2×1280×12×13, profile 0 allows up to 4×1280×12×12" in result.stdout
    assert "or build" not in result.stdout


def test_what_cannot_be_said_of_it_ends_with_the_reason(theirs, monkeypatch):
    path = theirs(EngineError("refused", "TensorRT cannot load it here", ("Error Code 1: magicTag",)))
    refused = check(path, "--model", "sd15")
    assert (refused.exit_code, "TensorRT refuses it: Error Code 1: magicTag" in refused.stderr) == (2, True)
    assert "the ONNX file that it was built from" in refused.stderr
    nameless = check(path)
    assert (nameless.exit_code, "say which model it should be with --model" in nameless.stderr) == (2, True)
    weights = check(path, "--model", "sd15", "--weights", "unet.onnx")
    assert (weights.exit_code, "leave out --weights" in weights.stderr) == (2, True)
    monkeypatch.undo()
    monkeypatch.setattr("shapecheck.tensorrt.build.has_driver", lambda: False)
    result = check(path, "--model", "sd15")
    assert (result.exit_code, "cannot be loaded here: no NVIDIA GPU and driver here" in result.stderr) == (2, True)
