"""`shapecheck check` of engines really built by TensorRT for RTX, where no driver can load them: the record tells."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import engines
import onnx
import onnx_files
import openings
import pytest
import small
from click.testing import CliRunner

from shapecheck import Geometry, ShapecheckError
from shapecheck.cli import main
from shapecheck.contract.json_codec import decode
from shapecheck.contract.size_request import SizeRequest
from shapecheck.models.safetensors import checkpoint_files, read_table
from shapecheck.models.weights import digest
from shapecheck.observe.controlnet_fit import find_misfits
from shapecheck.onnx.file import OnnxFile
from shapecheck.tensorrt import check as tensorrt_check
from shapecheck.tensorrt.engine_tensors import DeclaredEngine, DeclaredTensor, compare_engine
from shapecheck.tensorrt.profiles import Range, profile_of
from shapecheck.tensorrt.record import EngineCheck, read_engine
from shapecheck.tensorrt.size_ranges import format_range


def check_engine(path: Path, *args: object, **options: object) -> EngineCheck:
    """Check the engine at a path, its record read afresh."""
    return tensorrt_check.check_engine(path, read_engine(path), *args, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of an engine of nine slots, its ONNX file, and a ControlNet that fits it."""
    folder = tmp_path_factory.mktemp("engine")
    _, contract = engines.built(folder, onnx_files.DEEP)
    small.controlnet(small.unet(**onnx_files.DEEP)).save_pretrained(folder / "controlnet")
    assert len(contract.slots) == 9
    return folder


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    """No engine can be loaded, on a machine with a GPU neither."""
    monkeypatch.setattr("shapecheck.tensorrt.build.has_driver", lambda: False)


@pytest.fixture
def copied(made, tmp_path):
    """The engine and its record, to be changed."""
    for name in ("unet.plan", "unet.plan.shapecheck.json", "unet.onnx"):
        shutil.copy(made / name, tmp_path / name)
    return tmp_path


def check(*arguments):
    result = CliRunner().invoke(main, ["check", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def test_an_engine_is_told_from_its_record_where_tensorrt_cannot_load_it(made):
    result = check(made / "unet.plan")
    assert result.exit_code == 0
    told = " ".join(result.stdout.split())
    assert "FINE: engine and record belong together" in told
    assert "read from the record beside it; the engine was not loaded: no NVIDIA GPU and driver here" in told
    assert "profile 0 72×64 … 200×136 … 328×264 pixels, batch 1 … 2 … 3" in told


@pytest.mark.parametrize(
    ("asked", "status", "texts"),
    [
        (("--size", "200x136"), 0, ["SIZE: 200×136 pixels (batch 2, latent 17×25) fits profile 0"]),
        (("--latent", "33x41", "--batch", "3"), 0, ["fits profile 0"]),
        (
            ("--size", "336x264"),
            1,
            [
                "SIZE: 336×264 pixels (batch 2, latent 33×42) fits no profile",
                "profile 0: width 42, expected 9 to 41",
                "the nearest that fits: 328×264 pixels (batch 2, latent 33×41)",
                "or build for it: --sizes 72x64:200x136:336x264 --batch 1:2:3",
            ],
        ),
        (
            ("--latent", "7x9", "--batch", "4"),
            1,
            ["profile 0: batch 4, expected 1 to 3; height 7, expected 8 to 33"],
        ),
    ],
)
def test_a_size_fits_a_profile_or_is_told_what_would(made, asked, status, texts):
    result = check(made / "unet.plan", *asked)
    assert result.exit_code == status
    for text in texts:
        assert text in result.stdout


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (("--batch", "2"), 0),
        (("--batch", "1:2:3"), 0),
        (("--batch", "1:2:4"), 1),
        (("--tokens", "77"), 0),
        (("--tokens", "154"), 1),
        (("--sizes", "72x64:200x136:328x264"), 0),
        (("--sizes", "72x64:200x136:336x264"), 1),
        (("--multiple-of", "64"), 2),
    ],
)
def test_each_axis_may_be_requested_alone(made, asked, status):
    result = check(made / "unet.plan", *asked)
    assert result.exit_code == status, result.output


def test_a_controlnet_fits_or_every_place_is_named(made):
    fits = check(made / "unet.plan", "--controlnet", made / "controlnet")
    assert fits.exit_code == 0
    assert f"CONTROLNET: {made / 'controlnet'} fits" in fits.stdout
    wrong = check(made / "unet.plan", "--controlnet", "sd15", "--format", "json")
    assert wrong.exit_code == 1
    record = json.loads(wrong.stdout)
    assert (record["verdict"], len(record["controlnet_mismatches"])) == ("does not fit", 14)


def test_weights_are_told_apart(made, tmp_path):
    same = check(made / "unet.plan", "--weights", made / "unet.onnx")
    assert same.exit_code == 0
    assert f"WEIGHTS: built from {made / 'unet.onnx'} (the very file)" in same.stdout
    model = onnx.load(made / "unet.onnx")
    weight = next(each for each in model.graph.initializer if each.name.endswith("conv_in.weight"))
    weight.raw_data = bytes(len(weight.raw_data))
    onnx.save(model, tmp_path / "unet.onnx")
    other = check(made / "unet.plan", "--weights", tmp_path / "unet.onnx")
    assert other.exit_code == 1
    assert f"WEIGHTS: not built from {tmp_path / 'unet.onnx'} (other weights: sha256:" in other.stdout
    assert "DOES NOT FIT: " in other.stdout and "FINE" not in other.stdout
    assert read_engine(made / "unet.plan").request.weights != digest({})
    changed = onnx.load(made / "unet.onnx")
    changed.producer_name = "another"
    onnx.save(changed, tmp_path / "same.onnx")
    renamed = check(made / "unet.plan", "--weights", f"{tmp_path}/./same.onnx")
    assert (renamed.exit_code, "./same.onnx (the same weights, in another ONNX file)" in renamed.stdout) == (0, True)
    unknown = check(made / "unet.plan", "--weights", made / "controlnet")
    assert unknown.exit_code == 2
    assert "does not say from which checkpoint; give the ONNX file instead" in unknown.stderr


def test_a_record_and_the_file_it_is_held_to_are_read_once(copied):
    with openings.counted() as counter:
        result = check(copied / "unet.plan", "--latent", "17x25", "--weights", copied / "unet.onnx")
    assert (result.exit_code, "(the very file)" in result.stdout) == (0, True)
    assert (counter["unet.plan.shapecheck.json"], counter["parsed"]) == (1, 1)
    assert counter["unet.onnx"] == 2  # to parse it, and to hash its bytes


def test_a_checkpoint_is_believed_by_its_bytes(made, tmp_path):
    small.unet(**onnx_files.DEEP).save_pretrained(tmp_path / "unet")
    stored = read_table(checkpoint_files(tmp_path / "unet"))
    engine = read_engine(made / "unet.plan")
    for weights, checkpoint, same, told in (
        (digest(stored), "", True, "bit by bit"),
        ("sha256:x", digest(stored), False, "its weights were changed before it was built"),
        ("sha256:x", "sha256:y", False, "other weights: sha256:"),
    ):
        one = engines.recorded(tmp_path / "one.plan", replace(engine.request, weights=weights, checkpoint=checkpoint))
        found = check_engine(one, weights=str(tmp_path), offline=True).weights
        assert (found.same, told in found.told) == (same, True)
    half = replace(engine.request.contract, inputs=tuple(replace(e, dtype="float16") for e in engine.request.contract.inputs))
    changed = replace(engine.request, contract=half, weights="sha256:x", checkpoint=digest(stored))
    found = check_engine(engines.recorded(tmp_path / "half.plan", changed), weights=str(tmp_path), offline=True).weights
    assert (found.same, "by the word of the ONNX file" in found.told) == (True, True)


def test_an_engine_without_slots_takes_no_controlnet_and_is_not_the_model_with_them(made, tmp_path):
    request = read_engine(made / "unet.plan").request
    contract = request.contract
    off = replace(contract, slots=())
    (found,) = find_misfits(off, [str(made / "controlnet")], progress=print)
    assert (found.kind, "exported with --no-control" in found.cause) == ("missing", True)
    inputs = tuple(pair for pair in request.names if pair[0] in off.input_rules)
    without = replace(request, contract=off, names=inputs, profiles=(profile_of(off, engines.SIZES),))
    plan = engines.recorded(tmp_path / "off.plan", without)
    assert check_engine(plan).mismatches == check_engine(plan, off).mismatches == ()
    found = check_engine(plan, contract).mismatches
    assert [(each.where, each.kind) for each in found] == [(slot.name, "missing") for slot in contract.slots]
    with pytest.raises(ShapecheckError, match="this file is itself a ControlNet"):
        find_misfits(replace(contract, role="controlnet"), ["sd15"], progress=print)


def test_the_profile_told_is_the_one_a_session_takes_and_tokens_count(made, tmp_path):
    request = read_engine(made / "unet.plan").request
    contract = request.contract
    wide = Range(Geometry(1, 8, 8), Geometry(2, 16, 40), Geometry(3, 40, 48))
    square = Range(Geometry(1, 8, 8), Geometry(2, 16, 16), Geometry(3, 40, 48))
    both = replace(request, profiles=(profile_of(contract, wide), profile_of(contract, square)))
    asked = Geometry(2, 16, 16)
    assert check_engine(engines.recorded(tmp_path / "two.plan", both), requested=SizeRequest.at(asked)).fit.profile == 1
    long = Range(*(replace(each, tokens=154) for each in square.geometries))
    one = engines.recorded(tmp_path / "one.plan", replace(request, profiles=(profile_of(contract, long),)))
    open_tokens = SizeRequest(({"batch": (2, 2, 2), "h": (16, 16, 16), "w": (16, 16, 16)},))
    assert check_engine(one, requested=open_tokens).fit.profile == 0
    assert check_engine(one, requested=SizeRequest(({"tokens": (154, 154, 154)},))).fit.profile == 0
    refused = check_engine(one, requested=SizeRequest.at(asked)).fit
    assert (refused.profile, refused.reasons) == (None, ("profile 0: tokens 77, expected 154",))
    assert "--tokens 77:154:154" in format_range(refused.rebuilt)


def test_another_model_is_told_slot_by_slot(made):
    result = check(made / "unet.plan", "--model", "sd15", "--format", "json")
    assert result.exit_code == 1
    found = {(each["where"], each["kind"]) for each in json.loads(result.stdout)["mismatches"]}
    assert {
        ("encoder_hidden_states", "input"),
        ("mid_block_residual", "channels"),
        ("down_block_residual_11", "missing"),
    } <= found


def test_an_exchanged_or_cut_engine_is_noticed(copied):
    plan = copied / "unet.plan"
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1])
    result = check(plan)
    assert result.exit_code == 1
    assert f"{len(whole) - 1} bytes" in result.stdout and "BROKEN: 1 fault" in result.stdout
    plan.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "another engine, or one cut short" in " ".join(check(plan).stdout.split())


def test_an_engine_without_or_with_a_damaged_record_is_refused(copied):
    record = copied / "unet.plan.shapecheck.json"
    record.write_text(record.read_text(encoding="utf-8").replace('"gpu": "8.9"', '"gpu": "9.0"'), encoding="utf-8")
    result = check(copied / "unet.plan")
    assert result.exit_code == 2
    assert "unet.plan.shapecheck.json: an edited engine's record" in result.stderr
    record.unlink()
    result = check(copied / "unet.plan")
    assert result.exit_code == 2
    assert (
        "has no unet.plan.shapecheck.json beside it" in result.stderr
        and "copy both together, or say which model" in result.stderr
    )
    (copied / "unet.plan").unlink()
    assert f"cannot read {copied / 'unet.plan'}: No such file" in check(copied / "unet.plan").stderr


def test_hostile_records_end_in_one_message(copied):
    record = copied / "unet.plan.shapecheck.json"
    text = record.read_text(encoding="utf-8")
    good = json.loads(text)
    header = good["contract"]["header"]
    for change, message in (
        ({"engine": {"digest": "x", "bytes": float("inf")}}, "expected a whole number"),
        ({"options": good["options"] | {"workspace": "abc"}}, "expected a whole number"),
        ({"options": good["options"] | {"refittable": 1}}, "expected true or false"),
        ({"gpu": "\x1b[31mred"}, "cannot be printed"),
        ({"contract": good["contract"] | {"header": header | {"source": "x\nBROKEN"}}}, "cannot be printed"),
        ({"names": {"sample": "sample"}}, "does not name each input of its contract once"),
        ({"contract": good["contract"] | {"header": header | {"vae_factor": 16}}}, "an edited engine's record"),
        ({"engine": {"digest": "sha256:other", "bytes": 1}}, "an edited engine's record"),
    ):
        record.write_text(json.dumps(good | change), encoding="utf-8")
        result = check(copied / "unet.plan")
        assert (result.exit_code, message in result.stderr, "\x1b" in result.output) == (2, True, False)
    record.write_text(text, encoding="utf-8")
    assert check(copied / "unet.plan").exit_code == 0


def test_what_is_no_file_is_told(copied):
    (copied / "unet.plan").unlink()
    (copied / "unet.plan").mkdir()
    assert "unet.plan is a folder, not an engine" in check(copied / "unet.plan").stderr
    (copied / "unet.plan").rmdir()
    os.mkfifo(copied / "unet.plan")
    assert "unet.plan is a pipe or a device, not an engine" in check(copied / "unet.plan").stderr
    result = check(copied / f"{'x' * 300}.plan")
    assert (result.exit_code, "File name too long" in result.stderr) == (2, True)


def test_weights_are_asked_of_engines_alone(made):
    result = check(made / "unet.onnx", "--weights", made / "unet.onnx")
    assert result.exit_code == 2
    assert "--weights is for engines" in result.stderr


# What TensorRT would show of an engine is made up here: loading one needs a GPU.


def shown(request) -> DeclaredEngine:
    rules, dtypes = request.contract.input_rules, request.contract.input_dtypes
    profile = request.profiles[0]
    tensors = [
        DeclaredTensor(
            name, True, dtypes[name], tuple(-1 if dim.symbol else dim.scale for dim in rule), (profile.bounds(name).shapes,)
        )
        for name, rule in rules.items()
    ]
    return DeclaredEngine(
        request.contract.digest, (*tensors, DeclaredTensor("out_sample", False, "float32", (-1, 4, -1, -1), ())), 1
    )


def altered(seen: DeclaredEngine, name: str, /, **changes) -> DeclaredEngine:
    return replace(seen, tensors=tuple(replace(each, **changes) if each.name == name else each for each in seen.tensors))


def test_an_engine_that_is_not_what_its_record_says_is_told(made):
    request = read_engine(made / "unet.plan").request
    seen = shown(request)
    assert compare_engine(request, seen) == ()
    bounds = ((1, 16, 1, 2), (2, 16, 3, 4), (3, 16, 5, 7))
    cases = {
        ("engine", "the engine"): replace(seen, name="sha256:other"),
        ("engine", "the profiles"): replace(seen, profiles=2),
        ("missing", "mid_block_residual"): replace(
            seen, tensors=tuple(e for e in seen.tensors if e.name != "mid_block_residual")
        ),
        ("surplus", "more"): replace(seen, tensors=(*seen.tensors, replace(seen.tensors[0], name="more"))),
        ("dtype", "timestep"): altered(seen, "timestep", dtype="float16"),
        ("range", "mid_block_residual"): altered(seen, "mid_block_residual", bounds=(bounds,)),
        ("range", "down_block_residual_00"): altered(seen, "down_block_residual_00", shape=(3, 8, 33, 41), bounds=()),
        ("range", "sample"): altered(seen, "sample", shape=(2, 4, 17, 25), bounds=()),
        ("name", "the outputs"): altered(seen, "out_sample", name="sample_out"),
    }
    for expected, wrong in cases.items():
        assert [(each.kind, each.where) for each in compare_engine(request, wrong)] == [expected]


def test_a_missing_input_is_told_with_the_engine_s_own_name_for_it(made):
    request = read_engine(made / "unet.plan").request
    renamed = replace(request, names=tuple((request.engine_names | {"timestep": "t"}).items()))
    found = compare_engine(renamed, shown(request))[0]
    assert (found.kind, found.where, found.observed) == ("missing", "timestep", "no such input (looked for t)")


def test_an_engine_of_one_size_is_what_its_record_says(made):
    request = read_engine(made / "unet.plan").request
    size = Geometry(2, 17, 25)
    static = replace(request, profiles=(profile_of(request.contract, Range(size, size, size)),))
    shapes = request.contract.input_shapes(size)
    tensors = tuple(replace(each, shape=shapes.get(each.name, (2, 4, 17, 25)), bounds=()) for each in shown(request).tensors)
    assert compare_engine(static, replace(shown(request), tensors=tensors)) == ()


def test_what_the_process_tells_is_read(made):
    record = {
        "name": "sha256:x",
        "profiles": 1,
        "tensors": [
            {"name": "sample", "is_input": True, "dtype": "float16", "shape": [-1, 4, 8, -1], "bounds": [[[1, 4, 8, 8]] * 3]},
            {"name": "out", "is_input": False, "dtype": "fp8", "shape": [1], "bounds": []},
        ],
    }
    seen = decode(DeclaredEngine, record)
    assert [each.dtype for each in seen.tensors] == ["float16", "fp8"]
    assert seen.profile(0).bounds("sample").max == (1, 4, 8, 8)


# Weights in other files: hostile places.


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../weights.bin", "outside of the ONNX file's folder; never opened: keep real files beside it"),
        ("/etc/passwd", "outside of the ONNX file's folder"),
        ("C:\\weights.bin", "outside of the ONNX file's folder"),
        ("", "lies in no file, outside"),
        ("link.bin", "outside of the ONNX file's folder"),
        ("none.bin", "keeps its weights in none.bin: No such file or directory"),
        ("short.bin", "short.bin does not hold all of w; is the file cut short"),
    ],
)
def test_weights_are_read_in_the_file_s_own_folder_only(location, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    (folder / "short.bin").write_bytes(bytes(15))
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "16"}.items():
        weight.external_data.add(key=key, value=value)
    value = onnx.helper.make_tensor_value_info("x", 1, [4])
    out = onnx.helper.make_tensor_value_info("y", 1, [4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [value], [out], [weight])
    (folder / "unet.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ShapecheckError, match=message):
        OnnxFile(folder / "unet.onnx").tensors  # noqa: B018


def test_weights_without_a_length_reach_to_the_end(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(24))
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="w.bin")
    weight.external_data.add(key="offset", value="8")
    out = onnx.helper.make_tensor_value_info("y", 1, [4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [out], [weight])
    (tmp_path / "unet.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (stored,) = OnnxFile(tmp_path / "unet.onnx").external_tensors.values()
    assert (stored.offset, stored.nbytes, stored.dtype, stored.shape) == (8, 16, "float32", (4,))


def test_a_contract_that_refuses_a_size_says_so(made, tmp_path):
    request = read_engine(made / "unet.plan").request
    eight = replace(request, contract=replace(request.contract, divisor=8))
    checked = check_engine(engines.recorded(tmp_path / "eight.plan", eight), requested=SizeRequest.at(Geometry(2, 17, 24)))
    assert (checked.fit.profile, checked.is_fine) == (None, False)
    assert "refuses latents of 17×24" in checked.fit.reasons[0]
