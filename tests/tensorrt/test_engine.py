"""Engines: what is refused before TensorRT is loaded, what is asked of it, and what is kept of what it gives.

What TensorRT for RTX itself makes of it is in `test_engine_builds.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import engines
import onnx
import onnx_files
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from filelock import FileLock, Timeout

from shapecheck import ContractError, Geometry, ShapecheckError, presets, read_contract
from shapecheck.cli import main
from shapecheck.tensorrt import build as tensorrt_build
from shapecheck.tensorrt import process, profile_formats
from shapecheck.tensorrt.build import build_engine, locate_in_cache
from shapecheck.tensorrt.profiles import Profile, Range, profile_of
from shapecheck.tensorrt.record import BuildOptions, BuildRequest, Engine, read_engine

TINY = Range(Geometry(2, 17, 25), Geometry(2, 17, 25), Geometry(2, 17, 25))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """SD1.5's four levels without attention: nine slots, three halvings. The plan of it, and its contract."""
    return engines.drawn(tmp_path_factory.mktemp("deep") / "deep.onnx", onnx_files.DEEP)


@pytest.fixture
def scripted(monkeypatch):
    """A stand-in for TensorRT, which tells what it was asked."""
    script = engines.ScriptedTensorRT()
    monkeypatch.setattr(tensorrt_build, "EngineProcess", script)
    return script


@pytest.fixture
def no_tensorrt(monkeypatch):
    def refuse(*_):
        raise AssertionError("TensorRT was asked although something was wrong")

    monkeypatch.setattr(tensorrt_build, "EngineProcess", refuse)


ASKED = ("--sizes", "72x64:200x136:328x264", "--batch", "1:2:3", "--target", "rtx", "--compute-capability", "8.9")


def shapecheck(*arguments):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


@pytest.mark.usefixtures("scripted")
def test_what_is_built_is_told_and_what_is_found_too(deep, tmp_path):
    path = tmp_path / "unet.plan"
    told = shapecheck("build", deep[0], "-o", path, *ASKED).stdout
    assert told.startswith(f"{path}\n")
    for text in (
        "inputs     3 base inputs, 9 slots",
        "profile 0  72×64 … 200×136 … 328×264 pixels, batch 1 … 2 … 3",
        "precision  float32",
        "built by   TensorRT for RTX 1.7.1",
        "for GPU    8.9",
        f"contract   {deep[1].digest}",
    ):
        assert text in told
    assert told.endswith("\nBUILT: in 0 s\n")
    assert shapecheck("build", deep[0], "-o", path, *ASKED).stdout.endswith("\nFOUND: unchanged since it was built\n")
    assert "is an engine already" in shapecheck("build", path, "-o", tmp_path / "x.plan", *ASKED).stderr


def test_the_contract_travels_with_an_engine_that_tensorrt_built(tmp_path):
    path, contract = engines.built(tmp_path, onnx_files.DEEP)
    record = read_engine(path)
    assert read_contract(path) == record.request.contract == contract
    assert record.request.profiles == (profile_of(contract, engines.SIZES),)
    assert record.size == path.stat().st_size
    assert contract.digest.encode() in path.read_bytes()  # TensorRT's own name of the network
    assert Engine.from_json(record.to_json()) == record


@pytest.mark.usefixtures("scripted")
def test_a_file_of_no_known_model_is_built_by_its_own_table_and_that_is_said(tmp_path):
    file, _ = engines.drawn(tmp_path / "xl.onnx", onnx_files.XL)
    result = shapecheck("build", without_contract(file), "-o", tmp_path / "xl.plan", *ASKED)
    assert result.exit_code == 0
    told = " ".join(result.stdout.split())
    assert "model unknown of no named model" in told
    assert "note: no model was named and no preset fits: the contract is the file's own table" in told


def test_other_projects_names_stay_in_the_engine(tmp_path, deep, scripted):
    ours = [slot.name for slot in deep[1].slots]
    theirs = dict(zip(ours, [*(f"input_control_{at:02}" for at in range(len(ours) - 1)), "input_control_middle"], strict=True))
    onnx_files.planted(deep[0], tmp_path / "theirs.onnx", onnx_files.rename(**theirs))
    result = shapecheck("profile", tmp_path / "theirs.onnx", "--sizes", "200x136", "--format", "json")
    (profile,), _ = profile_formats.loads(result.stdout)
    assert profile.bounds("input_control_middle").max == (1, 16, 3, 4)
    (tmp_path / "profile.json").write_text(result.stdout, encoding="utf-8")
    named = ("--profile", tmp_path / "profile.json", "--target", "rtx", "--compute-capability", "8.9")
    assert shapecheck("build", tmp_path / "theirs.onnx", "-o", tmp_path / "theirs.plan", *named).exit_code == 0
    assert [bounds["name"] for bounds in scripted.jobs[0]["profiles"][0]][3:] == list(theirs.values())
    record = read_engine(tmp_path / "theirs.plan")
    assert record.request.engine_names["mid_block_residual"] == "input_control_middle"
    assert record.request.profiles[0].bounds("mid_block_residual").max == (1, 16, 3, 4)


def edited(profile: Profile, name: str, **changes) -> Profile:
    return Profile(tuple(replace(each, **changes) if each.name == name else each for each in profile.inputs))


def planted(contract) -> dict[str, tuple[Profile, str, str]]:
    good = profile_of(contract, engines.SIZES)
    assert good.bounds("mid_block_residual").max == (3, 16, 5, 6)
    assert good.bounds("down_block_residual_03").max == (3, 8, 17, 21)
    short = Profile(tuple(each for each in good.inputs if each.name != "down_block_residual_05"))
    halves = Profile(tuple(replace(each, dtype="float16") for each in good.inputs))
    return {
        "a slot missing": (short, "down_block_residual_05", "missing"),
        "mid's max disagrees": (edited(good, "mid_block_residual", max=(3, 16, 5, 7)), "mid_block_residual", "rounding"),
        "min above opt": (edited(good, "down_block_residual_03", min=(1, 8, 10, 5)), "down_block_residual_03", "range"),
        "wrong channels": (
            edited(good, "down_block_residual_03", min=(1, 16, 4, 5), opt=(2, 16, 9, 13), max=(3, 16, 17, 21)),
            "down_block_residual_03",
            "channels",
        ),
        "wrong stride": (
            edited(good, "down_block_residual_03", min=(1, 8, 8, 9), opt=(2, 8, 17, 25), max=(3, 8, 33, 41)),
            "down_block_residual_03",
            "size",
        ),
        "half precision": (halves, "sample", "dtype"),
    }


FAULTS = ("a slot missing", "mid's max disagrees", "min above opt", "wrong channels", "wrong stride", "half precision")


@pytest.mark.usefixtures("no_tensorrt")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_before_tensorrt_is_loaded(fault, deep, tmp_path):
    profile, where, kind = planted(deep[1])[fault]
    (tmp_path / "profile.json").write_text(profile_formats.dumps([profile], deep[1].digest), encoding="utf-8")
    command = ("build", deep[0], "-o", tmp_path / "unet.plan", "--profile", tmp_path / "profile.json", "--target", "rtx")
    result = shapecheck(*command)
    assert result.exit_code == 1
    assert f"\nREFUSED: {deep[0]}: graph, profile and contract do not agree: " in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [where, kind] in [row[:2] for row in rows]
    found = json.loads(shapecheck(*command, "--format", "json").stdout)["mismatches"]
    assert {each["where"] for each in found} == ({where} if fault != "half precision" else set(deep[1].input_rules))
    assert not (tmp_path / "unet.plan").exists()


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """A real file of two levels that was traced at an even size, and is right at even ones only."""
    return engines.exported(tmp_path_factory.mktemp("even") / "even.onnx", onnx_files.XL, latent=(16, 24))[0]


@pytest.mark.usefixtures("no_tensorrt")
def test_a_range_the_graph_cannot_serve_is_refused_with_the_size(even, tmp_path):
    result = shapecheck("build", even, "-o", tmp_path / "unet.plan", "--sizes", "64x64:128x192:256x320", "--target", "rtx")
    assert result.exit_code == 1
    assert "cannot work at 88×72 pixels" in result.stdout and "Told at batch 1, latent 9×11." in result.stdout
    assert "REFUSED" in result.stdout


def test_a_file_traced_at_an_even_size_serves_one_that_never_changes(even):
    assert shapecheck("profile", even, "--sizes", "128x192").exit_code == 0
    assert shapecheck("profile", even, "--sizes", "128x200").exit_code == 1


@pytest.mark.usefixtures("no_tensorrt")
def test_a_file_of_profiles_says_itself_which_sizes_and_for_which_contract(deep, tmp_path):
    profile = profile_of(deep[1], TINY)
    (tmp_path / "profile.json").write_text(profile_formats.dumps([profile], deep[1].digest), encoding="utf-8")
    command = ("build", deep[0], "-o", tmp_path / "unet.plan", "--target", "rtx", "--profile")
    for option in (("--sizes", "200x136"), ("--batch", "2"), ("--tokens", "154")):
        result = shapecheck(*command, tmp_path / "profile.json", *option)
        assert (result.exit_code, "says itself which sizes" in result.stderr) == (2, True)
    sd15 = presets.contract("sd15")
    (tmp_path / "other.json").write_text(profile_formats.dumps([profile_of(sd15, TINY)], sd15.digest), encoding="utf-8")
    result = shapecheck(*command, tmp_path / "other.json")
    assert result.exit_code == 1
    assert f"REFUSED: {tmp_path / 'other.json'} was made for another contract: " in result.stdout
    for name, message in (("deep.onnx", "holds no profiles; `shapecheck profile"), ("none.json", "cannot read")):
        result = shapecheck(*command, deep[0].with_name(name))
        assert (result.exit_code, message in result.stderr) == (2, True)


@pytest.mark.usefixtures("no_tensorrt")
def test_sizes_that_no_engine_runs_at_are_refused(deep, tmp_path):
    sizes = ("--sizes", "512x512:512x512:99992x99992", "--batch", "9999")
    result = shapecheck("build", deep[0], "-o", tmp_path / "unet.plan", *sizes, "--target", "rtx")
    assert result.exit_code == 1, result.stderr
    assert "2^40 elements" in result.stdout


@pytest.mark.usefixtures("no_tensorrt")
def test_a_graph_that_is_wrong_is_not_built(deep, tmp_path):
    onnx_files.planted(deep[0], tmp_path / "bad.onnx", onnx_files.exchange("down_block_residual_01", "down_block_residual_02"))
    result = shapecheck("build", tmp_path / "bad.onnx", "-o", tmp_path / "unet.plan", *ASKED)
    assert result.exit_code == 1
    assert "BROKEN: " in result.stdout and "order" in result.stdout


@pytest.mark.usefixtures("no_tensorrt")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "unet.bin"), "the name of an engine ends in .plan, .engine, .trt"),
        ((), "say where the engine goes: -o FILE.plan, or --cache FOLDER"),
        (("-o", "unet.plan", "--cache", "."), "and not both"),
        (("-o", "none/unet.plan"), "cannot write none/unet.plan"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_told_first(options, message, deep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = shapecheck("build", deep[0], *options, "--sizes", "200x136", "--target", "rtx")
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.usefixtures("no_tensorrt")
def test_nothing_waits_for_a_pipe_and_no_file_is_written_over(deep, tmp_path):
    shutil.copy(deep[0], tmp_path / "deep.onnx")
    before = (tmp_path / "deep.onnx").read_bytes()
    os.mkfifo(tmp_path / "pipe.plan")
    os.mkfifo(tmp_path / "pipe")
    asked = ("--sizes", "200x136", "--target", "rtx")
    cases = {
        ("-o", "pipe.plan"): "it is a pipe or a device",
        ("-o", "x.plan", "--timing-cache", "pipe"): "it is a pipe or a device",
        ("-o", "x.plan", "--timing-cache", "deep.onnx"): "that file is not a timing cache, and it would be overwritten",
        ("-o", "x.plan", "--timing-cache", "x.plan"): "it would be overwritten",
        ("-o", "x.plan", "--timing-cache", "nofolder/x"): "nofolder is not a folder",
    }
    for options, message in cases.items():
        places = [each if each.startswith("-") else tmp_path / each for each in options]
        result = shapecheck("build", tmp_path / "deep.onnx", *places, *asked)
        assert result.exit_code == 2
        assert message in result.stderr or "No such file" in result.stderr
    assert (tmp_path / "deep.onnx").read_bytes() == before


@pytest.mark.usefixtures("no_tensorrt")
def test_half_precision_of_others_is_held_to_a_contract_in_its_own_precision(deep, tmp_path):
    edits = [onnx_files.retype(name, ir.DataType.FLOAT16) for name in deep[1].input_rules]
    without_contract(onnx_files.planted(deep[0], tmp_path / "half.onnx", *edits))
    (tmp_path / "deep.json").write_text(deep[1].to_json(), encoding="utf-8")
    options = ("--sizes", "200x136", "--format", "json", "--model", tmp_path / "deep.json")
    result = shapecheck("profile", tmp_path / "half.onnx", *options)
    assert result.exit_code == 0, result.output
    ((profile,), _) = profile_formats.loads(result.stdout)
    assert {each.dtype for each in profile.inputs} == {"float16"}


def without_contract(path: Path) -> Path:
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    return path


def test_a_file_without_slots_is_built_as_one_without_control(deep, tmp_path, scripted):
    names = [slot.name for slot in deep[1].slots]
    edits = [*map(onnx_files.unconsume, names), *map(onnx_files.drop, names)]
    without_contract(onnx_files.planted(deep[0], tmp_path / "off.onnx", *edits))
    (tmp_path / "deep.json").write_text(deep[1].to_json(), encoding="utf-8")
    command = ("build", tmp_path / "off.onnx", "--cache", tmp_path / "cache", *ASKED, "--model", tmp_path / "deep.json")
    assert shapecheck(*command).exit_code == 1
    assert not scripted.jobs
    result = shapecheck(*command, "--no-control")
    assert result.exit_code == 0, result.output
    assert "3 base inputs, 0 slots" in result.stdout
    assert "goes with --model" in shapecheck(*command[:-2], "--no-control").stderr


def test_a_profile_from_large_to_small_is_exit_status_2_and_names_the_size():
    result = shapecheck("profile", "sd15", "--sizes", "904x768:640x704:384x512")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --sizes '904x768:640x704:384x512' is not a range: give the smallest first")


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_a_missing_tensorrt_is_told_with_its_fix(deep, tmp_path):
    result = shapecheck("build", deep[0], "-o", tmp_path / "unet.plan", "--sizes", "200x136")
    assert result.exit_code == 2
    assert "cannot build with --target trt:\n  tensorrt is not installed: pip install '" in result.stderr
    assert "or --target rtx: TensorRT for RTX builds without a GPU" in result.stderr


def test_nodes_that_tensorrt_refuses_are_told_with_their_slots(deep, tmp_path, scripted):
    conv = node_of(deep[0], "down_blocks/1/resnets/0")
    refused = process.ParserError(conv.name, "Conv", "UNSUPPORTED_NODE: no such operator")
    scripted.failure = process.EngineError("parse", "", ("a word of before",), (refused,))
    with pytest.raises(process.EngineError) as caught:
        build_engine(deep[0], tmp_path / "unet.plan", profiles=[TINY], options=engines.RTX)
    assert str(caught.value).splitlines() == [
        f"TensorRT's parser refuses 1 of the nodes of {deep[0]}:",
        f"  Conv {conv.name} (computes down_blocks.1.resnets.0, whose output is the skip of down_block_residual_03):",
        "    UNSUPPORTED_NODE: no such operator",
    ]
    assert caught.value.errors == (refused,)
    assert list(tmp_path.iterdir()) == []


def node_of(file, part):
    """The first node of an ONNX file in whose name this occurs."""
    return next(node for node in onnx.load(file).graph.node if part in node.name)


def test_a_builder_s_error_is_told_with_the_slots_it_names(deep, tmp_path, scripted):
    conv = node_of(deep[0], "down_blocks/1/resnets/0")
    words = f"Error Code 4: down_block_residual_07: dimension 2 of profile 0 [min=1] does not fit. In node {conv.name} (conv)."
    scripted.failure = process.EngineError("build", words, ("Could not build.",))
    with pytest.raises(process.EngineError) as caught:
        build_engine(deep[0], tmp_path / "unet.plan", profiles=[TINY], options=engines.RTX)
    assert str(caught.value).splitlines() == [
        f"TensorRT could not build {deep[0]}:",
        "  Could not build.",
        f"  {words}",
        "  down_block_residual_07: down_block_residual_07, which is added to the output of down_blocks.3.resnets.0",
        f"  {conv.name}: computes down_blocks.1.resnets.0, whose output is the skip of down_block_residual_03",
    ]
    assert list(tmp_path.iterdir()) == []


def test_what_tensorrt_says_while_it_builds_is_kept_and_sizes_it_cannot_run_at_are_refused(deep, tmp_path, scripted):
    asked = {"profiles": [TINY], "options": engines.RTX}
    scripted.words = ("a weight was rounded",)
    assert build_engine(deep[0], tmp_path / "unet.plan", **asked).notes == scripted.words
    scripted.words = ("profile 0 is not self-consistent",)
    with pytest.raises(process.EngineError, match="TensorRT built for sizes that it cannot run at"):
        build_engine(deep[0], tmp_path / "other.plan", **asked)
    assert not (tmp_path / "other.plan").exists()


def test_requests_that_differ_in_anything_have_keys_and_places_of_their_own(deep, tmp_path, scripted):
    request = build_engine(deep[0], tmp_path / "unet.plan", profiles=[engines.SIZES], options=engines.RTX).engine.request
    others = [
        replace(request, weights="sha256:other"),
        replace(request, onnx="sha256:other"),
        replace(request, profiles=(profile_of(deep[1], TINY),)),
        replace(request, profiles=request.profiles * 2),
        replace(request, contract=replace(deep[1], slots=())),
        replace(request, options=replace(request.options, refittable=True)),
        replace(request, options=replace(request.options, tf32=False)),
        replace(request, options=replace(request.options, optimization_level=2)),
        replace(request, tensorrt="1.8.0"),
        replace(request, gpu="8.6"),
    ]
    keys = {each.key for each in (request, *others)}
    assert len(keys) == len(others) + 1
    assert len({locate_in_cache(tmp_path, deep[0], each) for each in (request, *others)}) == len(keys)


def test_the_cache_tells_weights_and_sizes_apart_and_mends_what_was_changed(deep, tmp_path, scripted):
    cache = tmp_path / "cache"

    def build(file, sizes=TINY):
        return build_engine(file, cache=cache, profiles=[sizes], options=engines.RTX)

    first = build(deep[0])
    assert build(deep[0]).found
    model = onnx.load(deep[0])
    weight = next(each for each in model.graph.initializer if each.name.endswith("conv_in.weight"))
    weight.raw_data = bytes([1]) * len(weight.raw_data)
    onnx.save(model, tmp_path / "deep.onnx")
    other = build(tmp_path / "deep.onnx")
    assert not other.found and other.path != first.path
    assert not build(deep[0], engines.SIZES).found
    first.path.write_bytes(first.path.read_bytes()[:-1] + b"?")
    assert not build(deep[0]).found
    assert len([each for each in cache.iterdir() if each.suffix == ".plan"]) == 3
    assert len(scripted.jobs) == 4
    long = shutil.copy(deep[0], tmp_path / f"{'x' * 230}.onnx")
    assert build(Path(long)).path.stem.startswith("x" * 100 + "-")


@pytest.mark.usefixtures("scripted")
def test_what_a_killed_process_left_long_ago_is_swept(deep, tmp_path):
    for name, age in (("old", 4 * 24 * 3600), ("new", 3600)):
        (tmp_path / f".shapecheck.{name}.partial").write_bytes(b"half")
        os.utime(tmp_path / f".shapecheck.{name}.partial", (time.time() - age,) * 2)
    build_engine(deep[0], tmp_path / "unet.plan", profiles=TINY, options=engines.RTX)
    assert [each.name for each in tmp_path.glob(".shapecheck.*.partial")] == [".shapecheck.new.partial"]


@pytest.mark.usefixtures("scripted")
def test_no_other_build_comes_between_an_engine_and_its_record(deep, tmp_path, monkeypatch):
    replaced: list[str] = []
    real = Path.replace

    def observed(self, target):
        with pytest.raises(Timeout), FileLock(tmp_path / ".shapecheck.lock", timeout=0):
            pass
        replaced.append(target.name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", observed)
    build_engine(deep[0], tmp_path / "unet.plan", profiles=TINY, options=engines.RTX)
    assert replaced == ["unet.plan", "unet.plan.shapecheck.json"]
    with FileLock(tmp_path / ".shapecheck.lock", timeout=0):
        pass  # free again


@pytest.mark.usefixtures("scripted")
def test_a_link_is_written_through_and_the_record_lies_beside_the_file(deep, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.plan").symlink_to(tmp_path / "real" / "unet.plan")
    build_engine(deep[0], tmp_path / "link.plan", profiles=TINY, options=engines.RTX)
    assert sorted(path.name for path in (tmp_path / "real").glob("unet*")) == ["unet.plan", "unet.plan.shapecheck.json"]
    assert read_engine(tmp_path / "link.plan") == read_engine(tmp_path / "real" / "unet.plan")


def test_what_is_no_profile_is_told(deep, tmp_path):
    with pytest.raises(ShapecheckError, match="expected Profile or Range, got str; parse_ranges makes them"):
        build_engine(deep[0], tmp_path / "unet.plan", profiles=["512x512"], options=engines.RTX)
    with pytest.raises(ShapecheckError, match="65 profiles; an engine has at most 64 here"):
        build_engine(deep[0], tmp_path / "unet.plan", profiles=[TINY] * 65, options=engines.RTX)


@pytest.mark.usefixtures("scripted")
def test_a_record_is_readable_whatever_a_path_is_called(deep, tmp_path):
    odd = replace(deep[1], header=replace(deep[1].header, source="モデル\u3000一/\nx"))
    done = build_engine(deep[0], tmp_path / "unet.plan", profiles=TINY, contract=odd, options=engines.RTX)
    assert read_engine(done.path).request.contract == deep[1]


def test_what_tensorrt_reads_otherwise_is_refused(deep, tmp_path, scripted):
    def build(alter):
        scripted.alter = alter
        return build_engine(deep[0], tmp_path / "unet.plan", profiles=[TINY], options=engines.RTX, force=True)

    def rename_output(parsed):
        parsed["outputs"] = [{"name": "other"}]

    def widen_a_slot(parsed):
        parsed["inputs"][5] |= {"dims": ["batch", 8, "h", "w"]}

    assert not build(lambda parsed: None).found
    with pytest.raises(ContractError, match=r"the outputs: name: got other, expected out_sample"):
        build(rename_output)
    with pytest.raises(ContractError, match=r"(?s)reads a different graph from .*mid_block_residual.*missing"):
        build(lambda parsed: parsed["inputs"].pop())
    told = r"down_block_residual_02: symbol: got an axis named h, expected ceil\(h/2\); h is h elsewhere"
    with pytest.raises(ContractError, match=told):
        build(widen_a_slot)


def test_a_file_that_changes_while_it_is_built_makes_no_engine(deep, tmp_path, scripted):
    file = Path(shutil.copy(deep[0], tmp_path / "deep.onnx"))
    scripted.alter = lambda parsed: file.write_bytes(file.read_bytes() + b"\x10\x01")
    with pytest.raises(ShapecheckError, match=r"deep\.onnx changed while the engine was built: build it again"):
        build_engine(file, tmp_path / "unet.plan", profiles=[TINY], options=engines.RTX)
    assert list(tmp_path.glob("unet.plan*")) == []


def test_a_profile_with_a_short_shape_is_refused(deep, tmp_path):
    short = edited(profile_of(deep[1], TINY), "sample", max=(2, 4, 17))
    with pytest.raises(ContractError, match=r"sample: rank: got .*, expected three shapes of as many axes"):
        build_engine(deep[0], tmp_path / "unet.plan", profiles=[short], options=engines.RTX)


@pytest.mark.usefixtures("scripted")
def test_a_request_is_told_apart_from_an_edited_one(deep, tmp_path):
    build_engine(deep[0], tmp_path / "unet.plan", profiles=[TINY], options=engines.RTX)
    text = (tmp_path / "unet.plan.shapecheck.json").read_text(encoding="utf-8")
    for old, new in (('"refittable": false', '"refittable": true'), ('"gpu": "8.9"', '"gpu": "8.6"')):
        assert old in text
        with pytest.raises(ShapecheckError, match="an edited engine's record: its checksum is not that of its contents"):
            Engine.from_json(text.replace(old, new))
    for bad in ("", "{}", "[]", text[:-40], text.replace('"names"', '"nomes"'), text.replace('"rtx"', '"cpu"')):
        with pytest.raises(ShapecheckError, match="engine's record"):
            Engine.from_json(bad)
    assert isinstance(Engine.from_json(text).request, BuildRequest)
    assert Engine.from_json(text).request.options == BuildOptions("rtx", compute_capabilities=("8.9",))
