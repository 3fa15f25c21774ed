"""The command line as a user meets it: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from shapecheck import Contract, Geometry, presets
from shapecheck.cli import main


def shapecheck(*arguments: str):
    return CliRunner().invoke(main, arguments)


def test_help_says_what_it_does_and_how_it_exits():
    for arguments in (["--help"], ["-h"], ["probe", "--help"], ["presets", "-h"]):
        result = shapecheck(*arguments)
        assert result.exit_code == 0
        assert "Usage:" in result.stdout
    assert "0 fine, 1 the contract is broken, 2 it could not run" in shapecheck("-h").stdout
    assert "shapecheck probe sd15" in shapecheck("probe", "-h").stdout


def test_json_is_a_contract_that_loads(tmp_path):
    result = shapecheck("probe", "sd21-base", "--latent", "13x21", "--batch", "2", "--format", "json")
    assert result.exit_code == 0
    assert Contract.from_json(result.stdout) == presets.contract("sd21-base")
    report = json.loads(result.stdout)["report"]
    assert report["verdict"] == "agree"
    assert report["families"] == ["sd-turbo", "sd21", "sd21-base"]
    assert report["shapes"]["down_block_residual_06"] == [2, 640, 4, 6]


def test_a_mismatch_is_exit_status_1_in_every_format(tmp_path):
    file = tmp_path / "report.json"
    result = shapecheck("probe", "sd15", "--controlnet", "sd-turbo", "--format", "json", "-o", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["report"]["verdict"] == "mismatch"
    (found,) = record["report"]["mismatches"]
    assert (found["where"], found["kind"]) == ("encoder_hidden_states", "input")
    assert "this ControlNet was made for SD2.1" in found["cause"]
    assert list(tmp_path.iterdir()) == [file]
    assert shapecheck("probe", "sd15", "--controlnet", "sd-turbo", "--format", "markdown").exit_code == 1


def test_the_size_is_shown_and_observed():
    result = shapecheck("probe", "sdxl", "--size", "904x512", "--batch", "3")
    assert result.exit_code == 0
    assert "batch 3, latent 64×113 (904×512 pixels)" in result.stdout
    assert "3×1280×16×29" in result.stdout


def test_the_upscaler_has_its_own_pixels():
    result = shapecheck("probe", "sd-x4-upscaler", "--size", "516x512")
    assert result.exit_code == 0
    assert "latent 128×129 (516×512 pixels)" in result.stdout
    assert "class_labels" in result.stdout


def test_two_controlnets_are_told_as_summed():
    result = shapecheck("probe", "sd15", "--controlnet", "sd15", "--controlnet", "controlnet-sd15")
    assert result.exit_code == 0
    assert "hand-over      the residuals of 2 ControlNets are summed" in result.stdout


def test_an_unverified_preset_says_so():
    assert "preset koala-700m is unverified" in shapecheck("probe", "koala-700m").stdout
    assert "UNET ALONE: 7 slots" in shapecheck("probe", "koala-700m").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sd15", "--size", "510x512"], "510x512 pixels: the width 510 is no multiple of 8"),
        (["sd15", "--size", "512"], "'512' is no size; expected WxH in pixels"),
        (["sd15", "--latent", "0x64"], "'0x64' is no size; expected HxW in latent cells"),
        (["sd15", "--size", "512x512", "--latent", "64x64"], "give one of them"),
        (["kandinsky-2.2", "--latent", "60x64"], "refuses latents of 60×64: both must be multiples of 8"),
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
    assert shapecheck("presets", "--format", "markdown").stdout.startswith("| preset")


def test_a_probe_file_is_carried_out(tmp_path):
    probe = tmp_path / "mine.toml"
    probe.write_text('model = "sd15"\nlatent = "13x21"\n[mapping]\ndown = [[320, 13, 21]]\nmid = [1280, 2, 3]\n', encoding="utf-8")
    result = shapecheck("probe", str(probe))
    assert result.exit_code == 1
    assert "preset sd15 with claimed shapes" in result.stdout
    assert "MISMATCH: 11 places" in result.stdout
    probe.write_text('model = "sd15"\ncontrolnets = "sd15"\n', encoding="utf-8")
    assert "unknown controlnets; known: batch, controlnet" in shapecheck("probe", str(probe)).stderr
    probe.write_text("model = [", encoding="utf-8")
    assert "cannot read" in shapecheck("probe", str(probe)).stderr


def test_the_installed_command_says_the_same_with_nothing_on_stderr():
    command = [sys.executable, "-m", "shapecheck", "probe", "sd15", "--latent", "13x21"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1×1280×4×6" in result.stdout
    assert result.stderr == ""
    assert str(Geometry(1, 13, 21)) in result.stdout
