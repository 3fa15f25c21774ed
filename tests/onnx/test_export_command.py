"""`shapecheck export` as a user meets it: what it says, its exit status, and what it leaves behind when it fails."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import engines
import exports
import onnx_files
import parity_faults
import pytest
import small
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from shapecheck import Geometry, ShapecheckError, export, presets
from shapecheck.cli import main
from shapecheck.observe.subject import resolve_subject
from shapecheck.onnx import export as exporter
from shapecheck.onnx import export_report as report
from shapecheck.onnx.records import Agreement, Exported
from shapecheck.parity import export_check
from shapecheck.parity.export_check import verify_export

CHECKPOINT = "diffusion_pytorch_model.safetensors"
SAMPLE = Exported(
    Path("u.onnx"), presets.contract("sd15"), "none", "", (Path("u.onnx"), Path("u.onnx.data")), "float32", 20, "shapecheck"
)


def run(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model folder, for reading."""
    folder = tmp_path_factory.mktemp("saved")
    small.unet(**exports.LEAST).save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A model folder of the test's own."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def linked():
    """A file that points into its checkpoint, the model folder around it."""
    return exports.exported_once(small.unet(**small.SHALLOW))


def names(folder):
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.full
def test_it_says_what_it_wrote_and_how_far_from_pytorch_it_is(folder):
    result = run(folder, "-o", folder / "unet.onnx", "--verify")
    assert result.exit_code == 0, result.output
    assert result.stderr == "verifying: up to 1.0 GB of memory, PyTorch and ONNX Runtime one after the other\n"
    assert "3 slots, named as by shapecheck" in result.stdout
    assert "linked, where they lie: unet/diffusion_pytorch_model.safetensors" in result.stdout
    assert "all open; followed without weights at latents of 17×33, 65×97, 24×40, 19×30, batch 2 and 3\n" in result.stdout
    assert "numbers" not in result.stdout
    assert result.stdout.count("of its largest value") == 2
    assert result.stdout.endswith("EXPORTED: PyTorch and ONNX Runtime agree\n")


def test_json_says_the_same_to_machines():
    copied = replace(SAMPLE, weights="copy")
    found = (
        Agreement("out_sample", Geometry(2, 17, 25), 3e-7, 1e-5),
        Agreement("out_sample", Geometry(1, 8, 9), math.nan, 1e-5),
    )
    told = json.loads(report.render_json(copied, found))
    assert told["files"] == ["u.onnx", "u.onnx.data"]
    assert (told["weights"], told["reason"], told["slots"], told["verified"]) == ("copy", None, 13, False)
    assert [each["difference"] for each in told["agreements"]] == [3e-7, None]
    assert json.loads(report.render_json(copied))["verified"] is None


@pytest.mark.full
def test_weights_that_are_not_the_models_are_found_by_verifying(linked, tmp_path):
    folder = shutil.copytree(linked.path.parent, tmp_path / "model")
    checkpoint = folder / "unet" / CHECKPOINT
    kernel = small.unet(**small.SHALLOW).conv_in.weight.detach().numpy().tobytes()
    content = checkpoint.read_bytes()
    assert content.count(kernel) == 1
    checkpoint.write_bytes(content.replace(kernel, kernel[:-4] + torch.tensor(1.5).numpy().tobytes()))
    assert not any(each.agrees for each in verify_export(replace(linked, path=folder / "unet.onnx"), linked.path.parent))


def test_not_a_number_is_no_agreement():
    each = Agreement("out_sample", Geometry(1, 8, 8), float("nan"), 1e-5)
    assert not each.agrees
    assert replace(each, difference=1e-5).agrees


def test_a_disagreement_ends_in_status_1(monkeypatch):
    found = (Agreement("out_sample", Geometry(1, 8, 8), 0.5, 1e-5), Agreement("out_sample", Geometry(2, 9, 8), 0.0, 1e-5))
    monkeypatch.setattr(exporter, "export", lambda *given, **options: SAMPLE)
    monkeypatch.setattr(export_check, "verify_export", lambda *given, **options: found)
    result = run("model", "-o", "unet.onnx", "--verify")
    assert result.exit_code == 1
    assert result.stdout.endswith("EXPORTED, and DISAGREES with PyTorch\n")


@pytest.mark.parametrize("options", [("--weights", "none"), ("--dtype", "bfloat16")])
def test_what_cannot_be_verified_is_refused_before_the_export(folder, options):
    result = run(folder, "-o", folder / "unet.onnx", "--verify", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --verify ")
    assert names(folder) == ["unet"]


@pytest.fixture(scope="module")
def compared(saved):
    """Return what is found of a file made by torch's older exporter of the saved model, after an edit."""

    def compare(path, *edits, model=saved, factor=10):
        if edits:
            onnx_files.planted(path, path, *edits)
        job = {"model": str(model), "onnx": str(path), "factor": factor, "sizes": [(2, 17, 25, 7), (1, 24, 16, 7)]}
        return [Agreement(*found) for found in export_check.compare_outputs(job | {"variant": None, "offline": True})]

    return compare


def test_every_output_is_compared_at_every_size(compared, tmp_path):
    path, _ = engines.exported(tmp_path / "unet.onnx", exports.LEAST)
    found = compared(path)
    assert [(each.output, each.geometry) for each in found] == [
        ("out_sample", Geometry(2, 17, 25, 7)),
        ("out_sample", Geometry(1, 24, 16, 7)),
    ]
    assert all(0 < each.difference <= 2e-6 and each.agrees for each in found)
    assert all(each.allowed == pytest.approx(1e-5) for each in found)
    net = small.controlnet(small.unet(**small.TINY))
    net.save_pretrained(tmp_path / "net")
    found = compared(onnx_files.controlnet_written(tmp_path / "net.onnx", net, latent=(17, 25)), model=tmp_path / "net")
    assert [each.output for each in found] == ["down_block_residual_00", "down_block_residual_01", "mid_block_residual"] * 2
    assert all(each.agrees for each in found)


def test_numbers_that_differ_are_none_or_cannot_be_had_do_not_agree(compared, tmp_path):
    path, _ = engines.exported(tmp_path / "unet.onnx", exports.LEAST)
    found = compared(path, parity_faults.scaled("down_block_residual_01", 0.99))
    assert all(1e-5 < each.difference < 0.1 and not each.agrees for each in found)
    found = compared(path, parity_faults.not_a_number(2, 4))
    assert all(math.isnan(each.difference) and not each.agrees for each in found)
    fixed, _ = engines.exported(tmp_path / "fixed.onnx", exports.LEAST)
    with pytest.raises(ShapecheckError, match="ONNX Runtime cannot run this call: "):
        compared(fixed, parity_faults.transposed("down_block_residual_01"))


@pytest.mark.parametrize(
    ("status", "words", "told"),
    [
        (-9, "warning\ncomputing", r"^verifying: the process was killed \(computing\); it needs about 4\.9 GB of memory\. "),
        (1, "a warning\nONNX Runtime cannot load it\n", "^verifying: ONNX Runtime cannot load it$"),
        (2, "", "^verifying: no reason given$"),
    ],
)
def test_a_process_that_dies_is_told_with_the_memory_it_needs(monkeypatch, status, words, told):
    ended = subprocess.CompletedProcess([], status, "", words)
    monkeypatch.setattr(export_check.subprocess, "run", lambda *command, **options: ended)
    with pytest.raises(ShapecheckError, match=told):
        verify_export(replace(SAMPLE, weights="copy"), "model")


@pytest.mark.full
def test_a_controlnet_of_zeros_cannot_be_verified(tmp_path):
    net = small.controlnet(small.unet(**small.TINY))
    done = exports.exported_once(net)
    for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.zeros_(convolution.weight)
    net.save_pretrained(tmp_path / "net")
    zero = r"zero everywhere at batch 2, .*, in float32, so nothing can be compared; an untrained ControlNet"
    with pytest.raises(ShapecheckError, match=zero):
        verify_export(done, str(tmp_path / "net"))


def header(length, table):
    text = json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def entry(start, end, shape=(1,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-4])


def endless_header(file):
    file.write_bytes(header(2**62, {}))


def overlapping(file):
    file.write_bytes(header(None, {"a": entry(0, 4), "b": entry(2, 6)}) + bytes(8))


def beyond_the_end(file):
    file.write_bytes(header(None, {"a": entry(0, 2**40, (2**38,))}) + bytes(8))


def pickled(file):
    file.unlink()
    file.with_suffix(".bin").write_bytes(b"\x80\x04cos\nsystem\n")


def escaping_shard(file):
    index = file.parent / f"{file.name}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}}))


def other_architecture(file):
    config = file.parent / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 20}))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (cut_short, "is not a valid .safetensors file"),
        (endless_header, "expected a header of 2 to 100000000"),
        (overlapping, "tensor b at byte"),
        (beyond_the_end, "ends at byte"),
        (pickled, "its weights are pickled, which shapecheck never opens"),
        (escaping_shard, "escapes the folder"),
        (other_architecture, "attn2.to_k.weight is 8×12, expected 8×20"),
    ],
)
def test_a_damaged_or_hostile_checkpoint_is_refused_in_a_message(folder, fault, told):
    fault(folder / "unet" / CHECKPOINT)
    result = run(folder, "-o", folder / "unet.onnx")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert told in result.stderr
    assert names(folder) == ["unet"]


def test_nothing_but_an_onnx_file_is_written(folder):
    """Above all not over the checkpoint."""
    checkpoint = folder / "unet" / CHECKPOINT
    before = checkpoint.read_bytes()
    for output in (checkpoint, folder / "unet" / "config.json", folder, os.devnull):
        result = run(folder, "-o", output)
        assert result.exit_code == 2
    assert checkpoint.read_bytes() == before
    assert "the name of an ONNX file ends in .onnx" in run(folder, "-o", checkpoint).stderr


def test_weights_of_an_earlier_export_are_never_taken_for_this_ones(folder):
    (folder / "unet.onnx.data").write_bytes(b"of another model")
    result = run(folder, "-o", folder / "unet.onnx", "--weights", "none")
    assert result.exit_code == 2
    assert "unet.onnx.data exists and would be read as this model's weights" in result.stderr
    assert names(folder) == ["unet", "unet.onnx.data"]


@pytest.mark.full
def test_verifying_runs_no_code_of_the_current_folder(linked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in ("safetensors", "torch", "onnxruntime"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('code of the current folder was run')")
    found = verify_export(linked, str(linked.path.parent))
    assert [each.agrees for each in found] == [True, True]
    assert max(each.difference for each in found) <= 2e-6


def test_an_option_for_unets_is_refused_for_a_controlnet(tmp_path):
    small.controlnet(small.unet(**small.TINY)).save_pretrained(tmp_path / "net")
    result = run(tmp_path / "net", "-o", tmp_path / "net.onnx", "--no-control")
    assert result.exit_code == 2
    assert "--no-control is for UNets" in result.stderr


def test_quantized_weights_are_refused(folder):
    unet = small.unet(**exports.LEAST)
    tensors = unet.state_dict()
    tensors["conv_in.weight"] = (tensors["conv_in.weight"] * 100).to(torch.int8)
    save_file(tensors, folder / "unet" / CHECKPOINT)
    for options in ((), ("--dtype", "float16")):
        result = run(folder, "-o", folder / "unet.onnx", *options)
        assert result.exit_code == 2
        assert "is quantized (int8)" in result.stderr


@pytest.mark.full
def test_the_files_of_a_variant_are_linked_and_right(tmp_path):
    small.unet(**exports.LEAST).half().save_pretrained(tmp_path / "unet", variant="fp16")
    done = export(tmp_path, tmp_path / "unet.onnx", variant="fp16")
    assert (done.weights, done.dtype, done.files[1].name) == ("link", "float16", "diffusion_pytorch_model.fp16.safetensors")
    found = verify_export(done, tmp_path, variant="fp16")
    assert [each.agrees for each in found] == [True, True]


def test_a_live_module_needs_no_files(folder, tmp_path):
    """Loaded from half precision files, from a root with other weights in it, or from files that are gone."""
    from diffusers import UNet2DConditionModel

    live = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"")
    assert resolve_subject(live).stored is not None
    (folder / "unet" / CHECKPOINT).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    subject = resolve_subject(live)
    assert (subject.stored, subject.live is None) == (None, False)
    assert "choose one that is there: `--variant fp16`" in subject.absent


def test_a_file_says_no_more_of_a_path_than_the_models_folder(saved):
    assert resolve_subject(saved).contract("float32", control=True).header.source == f"{saved.name}/unet"


def test_an_infinite_allowance_allows_nothing():
    for difference in (math.inf, 5.0, 0.0):
        assert not Agreement("out_sample", Geometry(1, 8, 8), difference, math.inf).agrees
    assert "out_sample" in report.render_text(SAMPLE, [Agreement("out_sample", Geometry(1, 8, 8), 0.0, 0.0)])


def test_linking_from_elsewhere_is_refused_with_a_path_that_works(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    result = run(folder, "-o", tmp_path / "elsewhere" / "unet.onnx", "--weights", "link")
    assert result.exit_code == 2
    assert f"an output that works is {folder / 'unet' / 'model.onnx'}" in result.stderr
    assert names(tmp_path / "elsewhere") == []


def test_a_folder_of_a_presets_name_is_pointed_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15").mkdir()
    assert "the folder of that name is ./sd15" in run("sd15", "-o", "unet.onnx").stderr


FULL = """
import contextlib, resource, sys
from shapecheck.cli import main
for limit in map(int, sys.argv[1].split(",")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        main(sys.argv[2:])
    except SystemExit as end:
        print("status", end.code, file=sys.stderr)
"""


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="limits of a process are POSIX's")
def test_a_full_disk_leaves_nothing_and_an_earlier_export_as_it_was(tmp_path):
    """The limit on a file's size stops the ONNX file of 100 kB, and after it the weights of half a megabyte."""
    folder = tmp_path / "model"
    small.unet(**exports.LEAST | {"cross_attention_dim": 9000}).save_pretrained(folder / "unet")
    before = {"unet.onnx": b"earlier", "unet.onnx.data": b"earlier too"}
    for name, content in before.items():
        (folder / name).write_bytes(content)
    export = ["export", str(folder), "-o", str(folder / "unet.onnx"), "--weights", "copy"]
    done = subprocess.run([sys.executable, "-c", FULL, "40000,400000", *export], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error: cannot write", "status"))]
    written = [folder / "unet.onnx", folder / "unet.onnx.data"]
    assert errors == [text for path in written for text in (f"error: cannot write {path}: File too large", "status 2")]
    assert {name: (folder / name).read_bytes() for name in names(folder) if name != "unet"} == before


CRASH = """
import os, signal, sys
from shapecheck import export
def crash(step, done=0, total=0):
    if step == "copying the weights" and 0 < done == total:
        os.kill(os.getpid(), signal.SIGKILL)
export(sys.argv[1], sys.argv[2], weights="copy", progress=crash)
"""


def before_a_crash(folder):
    """Write an earlier export, and return its files."""
    (folder / "unet.onnx").write_bytes(b"earlier")
    (folder / "unet.onnx.data").write_bytes(b"earlier too")
    return folder / "unet.onnx", folder / "unet.onnx.data"


@pytest.mark.full
def test_a_crash_when_everything_is_written_but_not_yet_named_leaves_the_earlier_export(folder):
    output, data = before_a_crash(folder)
    done = subprocess.run([sys.executable, "-c", CRASH, str(folder), str(output)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (output.read_bytes(), data.read_bytes()) == (b"earlier", b"earlier too")


@pytest.mark.nightly
def test_a_crash_at_any_time_leaves_the_earlier_export_or_the_new_one(folder, tmp_path):
    """Killed later and later until an export ends before it is killed."""
    seen = set()
    for tenths in itertools.count(50, 15):
        output, data = before_a_crash(folder)
        command = [sys.executable, "-m", "shapecheck", "export", str(folder), "-o", str(output), "--weights", "copy"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(tenths / 10)
            process.kill()
        shown = {name for name in names(folder) if not name.startswith(".")}
        assert shown in ({"unet", "unet.onnx", "unet.onnx.data"}, {"unet", "unet.onnx.data"})
        state = (output.exists() and output.read_bytes() == b"earlier", data.read_bytes() == b"earlier too")
        assert state in ((True, True), (False, False))
        seen.add(state)
        if process.returncode == 0:
            break
    content = data.read_bytes()
    assert all(tensor.numpy().tobytes() in content for tensor in load_file(folder / "unet" / CHECKPOINT).values())
    assert seen == {(True, True), (False, False)}


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_told_before_the_work(folder):
    folder.chmod(0o555)
    result = run(folder, "-o", folder / "unet.onnx")
    folder.chmod(0o755)
    assert (result.exit_code, names(folder)) == (2, ["unet"])
    assert "no permission to write to" in result.stderr


@pytest.mark.parametrize(
    "call", ["from shapecheck.cli import main; main(['export', 'sd15', '-o', 'u.onnx'])", "shapecheck.export"]
)
def test_a_missing_package_is_told_with_what_installs_it(call, tmp_path):
    code = f"import sys; sys.modules['onnx_ir'] = None; import shapecheck; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "needs the package onnx_ir: pip install 'shapecheck-controlnet[onnx]'" in done.stderr
    assert ("Traceback" in done.stderr) == (call == "shapecheck.export")
