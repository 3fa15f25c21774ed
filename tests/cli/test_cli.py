"""The command line as a user meets it: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import click
import oracle
import pytest
import small
from click.testing import CliRunner

from shapecheck import Contract, Geometry, presets
from shapecheck.cli import main, models
from shapecheck.models import lookup
from shapecheck.observe import report

TINY = small.SMALL | small.TINY
SHALLOW = small.SMALL | small.SHALLOW
FAMOUS = "The size of tensor a (320) must match the size of tensor b (640) at non-singleton dimension 1"


def shapecheck(*arguments: str):
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def write_config(tmp_path):
    """Writes the config.json of a UNet, or of a ControlNet, and gives its path."""

    def write(config=TINY, kind="UNet2DConditionModel", folder="model", **changes) -> str:
        path = tmp_path / folder / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"_class_name": kind} | config | changes), encoding="utf-8")
        return str(path)

    return write


CONTROLNET = {
    name: value for name, value in TINY.items() if name not in ("sample_size", "up_block_types")
} | {"conditioning_embedding_out_channels": (8, 8, 8, 8)}  # fmt: skip
"""The config of the ControlNet for the tiny UNet."""


def test_help_says_what_it_does_and_how_it_exits():
    for arguments in (["--help"], ["-h"], ["probe", "--help"], ["presets", "-h"]):
        result = shapecheck(*arguments)
        assert result.exit_code == 0
        assert "Usage:" in result.stdout
    assert "0 fine, 1 the contract is broken, 2 it could not run" in shapecheck("-h").stdout
    assert "shapecheck probe sd15" in shapecheck("probe", "-h").stdout
    assert "`expect` is for tests" in " ".join(shapecheck("probe", "-h").stdout.split())


def test_json_is_a_contract_that_loads():
    result = shapecheck("probe", "bk-sdm-tiny", "--latent", "13x21", "--batch", "2", "--format", "json")
    assert result.exit_code == 0
    assert Contract.from_json(result.stdout) == presets.contract("bk-sdm-tiny")
    record = json.loads(result.stdout)["report"]
    assert record["verdict"] == "unet alone"
    assert record["families"] == ["bk-sdm-tiny"]
    assert record["shapes"]["down_block_residual_04"] == [2, 640, 4, 6]


@pytest.mark.full
def test_families_with_the_same_contract_are_all_told():
    result = shapecheck("probe", "sd21-base", "--latent", "13x21", "--batch", "2", "--format", "json")
    assert Contract.from_json(result.stdout) == presets.contract("sd21-base")
    record = json.loads(result.stdout)["report"]
    assert record["verdict"] == "agree"
    assert record["families"] == ["sd-turbo", "sd21", "sd21-base"]
    assert record["shapes"]["down_block_residual_06"] == [2, 640, 4, 6]


def test_a_mismatch_is_exit_status_1_in_every_format(tmp_path, write_config):
    unet = write_config()
    net = write_config(CONTROLNET, "ControlNetModel", "net", cross_attention_dim=16)
    file = tmp_path / "reports" / "report.json"
    file.parent.mkdir()
    result = shapecheck("probe", unet, "--controlnet", net, "--format", "json", "-o", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["report"]["verdict"] == "mismatch"
    (found,) = record["report"]["mismatches"]
    assert (found["where"], found["kind"]) == ("encoder_hidden_states", "input")
    assert list(file.parent.iterdir()) == [file]
    assert shapecheck("probe", unet, "--controlnet", net, "--format", "markdown").exit_code == 1


@pytest.mark.full
def test_a_controlnet_of_another_family_is_told_with_its_family():
    result = shapecheck("probe", "sd15", "--controlnet", "sd-turbo", "--format", "json")
    (found,) = json.loads(result.stdout)["report"]["mismatches"]
    assert "this ControlNet was made for SD2.1" in found["cause"]


def test_the_size_is_shown_and_observed(write_config):
    result = shapecheck("probe", write_config(SHALLOW), "--size", "904X512", "--batch", "3")  # the X in either case
    assert result.exit_code == 0
    assert "AGREE: 5 slots, both sides observed" in result.stdout
    assert "batch 3, latent 64×113 (904×512 pixels)" in result.stdout
    assert "3×16×32×57" in result.stdout


def test_the_upscaler_has_its_own_pixels():
    """Refused before anything is observed, and shown of what was observed once."""
    refused = shapecheck("probe", "sd-x4-upscaler", "--size", "514x512")
    assert "514x512 pixels: width 514 is not a multiple of 4" in refused.stderr
    text = report.render_text(presets.contract("sd-x4-upscaler"), (), Geometry(1, 128, 129), form="human")
    assert "latent 128×129 (516×512 pixels)" in text
    assert "class_labels" in text


@pytest.mark.full
def test_the_upscaler_is_observed_at_its_own_pixels():
    result = shapecheck("probe", "sd-x4-upscaler", "--size", "516x512")
    assert result.exit_code == 0
    assert "latent 128×129 (516×512 pixels)" in result.stdout
    assert "class_labels" in result.stdout


def test_two_controlnets_are_told_as_summed(write_config):
    net = write_config(CONTROLNET, "ControlNetModel", "net")
    result = shapecheck("probe", write_config(), "--controlnet", net, "--controlnet", net)
    assert result.exit_code == 0
    assert "hand-over      the residuals of 2 ControlNets are summed" in result.stdout


def test_an_unverified_preset_says_so():
    (note,) = lookup.find("koala-700m", "unet").notes
    assert note.startswith("preset koala-700m is unverified: `shapecheck presets` says where")
    text = report.render_text(presets.contract("koala-700m"), (), Geometry(1, 64, 64), form="human")
    assert note in " ".join(text.split())
    assert "UNET ALONE: 7 slots" in text
    assert max(map(len, text[text.index("note:") :].splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sd15", "--size", "510x512"], "510x512 pixels: width 510 is not a multiple of 8"),
        (["sd15", "--size", "512"], "'512' is not a size; expected WxH in pixels"),
        (["sd15", "--size="], "'' is not a size; expected WxH in pixels"),
        (["sd15", "--latent="], "'' is not a size; expected HxW in latent cells"),
        (["sd15", "--batch", "65537"], "--batch must be a whole number from 1 to 65536, got 65537"),
        (["sd15", "--size", "1000000x8"], "is not a size"),
        (["sd15", "--latent", "0x64"], "'0x64' is not a size; expected HxW in latent cells"),
        (["sd15", "--size", "512x512", "--latent", "64x64"], "give one of them"),
        (["sd15", "--controlnet", "sd16"], "did you mean sd21 or sd15"),
        (["sd15", "-o", "no/such/folder/report.txt"], "cannot write no/such/folder/report.txt: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_exit_status_2_and_one_message(arguments, message):
    result = shapecheck("probe", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_a_latent_that_the_unet_refuses_is_exit_status_2(write_config):
    kandinsky = {
        "block_out_channels": (8, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "addition_embed_type": "image",
        "encoder_hid_dim_type": "image_proj",
        "encoder_hid_dim": 20,
    }
    result = shapecheck("probe", write_config(TINY | kandinsky), "--latent", "60x63")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "refuses latents of 60×63: both must be multiples of 2" in result.stderr


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt, 130), (click.Abort, 130), (RuntimeError, 2), (OSError, 2)])
def test_nothing_but_a_mismatch_ends_in_1(monkeypatch, raised, status):
    def fail(**_):
        raise raised("planted")

    monkeypatch.setattr(models, "request_for", fail)
    result = shapecheck("probe", "sd15")
    assert result.exit_code == status
    assert ("Traceback" in result.stderr) is (status == 2)


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "shapecheck", *arguments], stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("arguments", [["presets"], ["--help"]])
def test_a_full_disk_or_a_closed_pipe_ends_in_2(arguments):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = run(*arguments, stdout=full)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*arguments, stdout=writer)
    os.close(writer)
    assert done.returncode == 2
    assert "Exception ignored" not in done.stderr


WITHOUT_ONNX = """
import sys
sys.modules |= dict.fromkeys(("onnx", "onnx_ir", "onnxscript"))  # None: importing it raises
from shapecheck.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("is_saved", [False, True])
def test_profiles_of_a_preset_or_a_saved_contract_need_no_onnx(is_saved, tmp_path):
    saved = tmp_path / "contract.json"
    saved.write_text(presets.contract("sd15").to_json(), encoding="utf-8")
    command = [sys.executable, "-c", WITHOUT_ONNX, "profile", saved if is_saved else "sd15", "--sizes", "512x512"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1×1280×8×8" in done.stdout


def test_a_closed_stdout_ends_in_2():
    done = subprocess.run(["/bin/sh", "-c", f"{sys.executable} -m shapecheck presets >&-"], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: cannot write to standard output: it is closed; -o FILE writes to a file\n",
    )


def test_usage_errors_are_exit_status_2():
    for arguments in (["probe"], ["probe", "sd15", "--format", "yaml"], ["prob"], ["probe", "sd15", "--batch", "0"]):
        result = shapecheck(*arguments)
        assert result.exit_code == 2
        assert "Usage:" in result.stderr


def test_presets_are_listed_for_people_and_machines():
    text = shapecheck("presets").stdout
    assert all(name in text for name in presets.names())
    assert "unverified" in text
    records = json.loads(shapecheck("presets", "--format", "json").stdout)
    assert [record["name"] for record in records] == list(presets.names())
    assert all(record["checked"] for record in records)
    markdown = shapecheck("presets", "--format", "markdown").stdout
    assert markdown.startswith("| preset")
    for name in presets.names():
        assert f"- {name}: {presets.load(name).checked}\n" in markdown
        assert f"\n{name}: {presets.load(name).checked[:40]}" in text
    assert "config" in text.splitlines()[0]
    assert max(map(len, text.splitlines())) <= 120


def test_a_probe_file_is_carried_out(tmp_path, write_config):
    probe, unet = tmp_path / "mine.toml", write_config(SHALLOW)
    head = f'model = "{unet}"\nlatent = "13x21"\n[mapping]\n'
    probe.write_text(f"{head}down = [[8, 13, 21]]\nmid = [24, 2, 3]\n", encoding="utf-8")
    result = shapecheck("probe", str(probe))
    assert result.exit_code == 1
    assert f"The table given, on {unet}, batch 1, latent 13×21" in result.stdout
    assert "WRONG: 4 slots do not fit" in result.stdout
    for option in (["--batch", "1"], ["--size", "64x64"], ["--size="], ["--latent", "8x8"], ["--controlnet", "sd15"]):
        refused = shapecheck("probe", str(probe), *option)
        assert refused.exit_code == 2
        assert "drop --controlnet, --adapter, --size, --latent, --batch" in refused.stderr
    *downs, mid = [list(shape[1:]) for shape in oracle.shapes(SHALLOW, 1, 13, 21).values()]
    probe.write_text(f"{head}down = {downs}\nmid = {mid}\n", encoding="utf-8")
    result = shapecheck("probe", str(probe), "--format", "json")
    record = json.loads(result.stdout)
    assert (result.exit_code, record["verdict"], record["mapping"]["verdict"]) == (0, "diagnosis", "right")
    probe.write_text('model = "sd15"\ncontrolnets = "sd15"\n', encoding="utf-8")
    assert "unknown controlnets; known: adapter, batch, controlnet" in shapecheck("probe", str(probe)).stderr
    probe.write_text("model = [", encoding="utf-8")
    assert "cannot read" in shapecheck("probe", str(probe)).stderr


@pytest.mark.full
def test_the_installed_command_says_the_same_with_nothing_on_stderr():
    command = [sys.executable, "-m", "shapecheck", "probe", "sd15", "--latent", "13x21"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1×1280×4×6" in result.stdout
    assert result.stderr == ""
    assert str(Geometry(1, 13, 21)) in result.stdout


def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shapecheck.observe.request.run_probe", None)
    for output, said in (("no/such/report.txt", "No such file"), (__file__ + "/report.txt", "is not a folder")):
        result = shapecheck("probe", "sd15", "-o", output)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: cannot write {output}: ")
        assert said in result.stderr or "Not a directory" in result.stderr
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no permission to write to" in shapecheck("probe", "sd15", "-o", str(tmp_path / "report.txt")).stderr


EXPLAIN = ("explain", FAMOUS, "--model", "sd15", "-o")
"""A command that writes a report and observes nothing: all commands write through one function."""


def test_a_file_that_is_written_over_keeps_its_mode(tmp_path):
    file = tmp_path / "report.txt"
    file.touch()
    file.chmod(0o640)
    assert shapecheck(*EXPLAIN, str(file)).exit_code == 0
    assert "34 faults" in file.read_text(encoding="utf-8")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_an_output_that_is_no_file_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    assert shapecheck(*EXPLAIN, str(pipe)).exit_code == 0
    assert "34 faults" in reader.communicate(timeout=30)[0]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_an_output_through_a_symlink_reaches_its_target(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old", encoding="utf-8")
    link.symlink_to(target)
    assert shapecheck(*EXPLAIN, str(link)).exit_code == 0
    assert link.is_symlink()
    assert "34 faults" in target.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 5", "`model` must be text, got 5"),
        ('model = "sd15"\ncontrolnet = [1]', "`controlnet` must be a name or a list of names"),
        ('model = "sd15"\nsize = 5', "`size` must be text, got 5"),
        ('model = "sd15"\nstory = 5', "`story` must be text"),
        ('model = "sd15"\nbatch = 0', "`batch` must be a whole number"),
        ('model = "sd15"\nmapping = { down = [["a", 1, 2]] }', "`mapping` must have `down`"),
        ('model = "sd15"\nmapping = { mid = [1, 2, 3] }', "`mapping` must have `down`"),
        ('model = "sd15"\nbatch = 65537', "`batch` must be a whole number from 1 to 65536, got 65537"),
        ('model = "sd15"\nsize = ""', "'' is not a size"),
        ('model = "sd15"\ncontrolnet = "sd15"\nmapping = { down = [] }', "`mapping` stands in place of"),
    ],
)
def test_a_wrong_probe_file_names_the_key(tmp_path, text, message):
    probe = tmp_path / "wrong.toml"
    probe.write_text(text, encoding="utf-8")
    result = shapecheck("probe", str(probe))
    assert result.exit_code == 2
    assert f"error: {probe}: {message}" in result.stderr


@pytest.mark.full
def test_names_that_are_too_long_or_no_text_are_told(tmp_path):
    result = shapecheck("probe", "n" * 300 + ".toml")
    assert (result.exit_code, "Traceback" in result.stderr) == (2, False)
    odd = os.fsencode(tmp_path) + b"/bad\xff.json"
    with open(odd, "wb") as file:  # noqa: PTH123  # a name that is no text
        file.write(json.dumps(dict(presets.load("sd15").config)).encode())
    done = subprocess.run(
        [sys.executable, "-m", "shapecheck", "probe", odd, "-o", str(tmp_path / "out.txt")], capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"bad\udcff.json" in (tmp_path / "out.txt").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"down_block_types": ["DownBlock2D"] * 20_000, "block_out_channels": [8] * 20_000},
        {"layers_per_block": 128, "transformer_layers_per_block": 128},
        {"in_channels": 10**30},
        {"sample_size": 0},
        {"act_fn": "a\nb\u202e"},
    ],
)
def test_an_absurd_config_is_one_short_line(tmp_path, change):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dict(presets.load("sd15").config) | change), encoding="utf-8")
    result = shapecheck("probe", str(config))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert str(config) in result.stderr
    assert (result.stderr.count("\n"), len(result.stderr) < 700) == (1, True)


def test_keys_that_diffusers_ignores_are_told_on_one_line(write_config):
    result = shapecheck("probe", write_config(**{"\x1b[2Jforged\nline": 1}))
    assert result.exit_code == 0
    note = " ".join(result.stdout[result.stdout.index("note: ") :].split("\n\n")[0].split())
    assert "diffusers ignores" in note
    assert "\\x1b[2Jforged\\nline" in note
