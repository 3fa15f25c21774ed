"""`shapecheck parity`: what it prints and writes, how it ends, and what it refuses."""

from __future__ import annotations

import functools
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
import engines
import onnx_files
import parity_faults
import pytest
import torch
from click.testing import CliRunner
from diffusers import ControlNetModel
from small import TINY, controlnet, unet

from shapecheck import doctor
from shapecheck.cli import main
from shapecheck.contract.environment import Backend, Gap
from shapecheck.verify import request as requests

THREE = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
    "layers_per_block": 1,
}
"""Without attention where an image is large."""
SIZE = ("--sizes", "72x104", "--batch", "2")
"""13 latent cells by 9."""


@dataclass(frozen=True)
class Made:
    folder: Path
    model: str
    healthy: str
    faulty: str


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A model with a healthy file, one with a slot that acts with 0.9 of its strength, and two ControlNets."""
    folder = tmp_path_factory.mktemp("made")
    model = unet(**TINY)
    model.save_pretrained(folder / "model" / "unet")
    healthy, _ = engines.exported(folder / "healthy.onnx", TINY)
    faulty = onnx_files.planted(healthy, folder / "faulty.onnx", parity_faults.scaled("down_block_residual_01", 0.9))
    controlnet(model).save_pretrained(folder / "controlnet")
    fresh = ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(8, 8, 8, 8), load_weights_from_unet=False)
    fresh.save_pretrained(folder / "untrained")
    other = unet(**THREE)
    controlnet(other).save_pretrained(folder / "of-another")
    return Made(folder, str(folder / "model"), str(healthy), str(faulty))


@pytest.fixture(autouse=True)
def computed_once(monkeypatch):
    """The same run in another form is the same run."""
    monkeypatch.setattr(requests, "study_of", _computed)


_study_of = functools.cache(requests.study_of)


def _computed(request, progress=None):
    return _study_of(request)


def parity(*arguments: str):
    return CliRunner().invoke(main, ["parity", *arguments])


def refused(*arguments: str) -> str:
    """The one message on stderr of what could not be done."""
    result = parity(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_healthy_file_is_parity_and_status_0(made):
    result = parity(made.model, "--onnx", made.healthy, *SIZE)
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert text.startswith("Parity of model/unet\n")
    assert re.search(r"^PARITY: \d+ checks on ort$", text, re.MULTILINE)
    assert re.search(r"^sizes +batch 2, latent 13×9$", text, re.MULTILINE)
    assert re.search(r"^ran +CPUExecutionProvider on cpu, float32$", text, re.MULTILINE)
    assert len(re.findall(r"^down_block_residual_0\d .* passed$", text, re.MULTILINE)) == 2
    assert result.stderr == ""


def test_a_slot_of_part_of_its_strength_is_broken_and_status_1_in_every_form(made, tmp_path):
    asked = (made.model, "--onnx", made.faulty, *SIZE)
    result = parity(*asked, "--format", "json", "--report", str(tmp_path / "a" / "report"))
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert (record["shapecheck_parity"], record["verdict"], record["model"]) == (1, "broken", "model/unet")
    (side,) = record["sides"]
    assert [each["where"] for each in side["results"] if (each["kind"], each["status"]) == ("slot", "failed")] == [
        "down_block_residual_01"
    ]
    (reason,) = {each["reason"] for each in side["results"] if each["where"] == "down_block_residual_01"}
    assert reason == "down_block_residual_01 acts as if 0.900 of it were given"
    report = tmp_path / "a" / "report"
    assert {"parity.json", "parity.md", "parity.html"} <= {each.name for each in report.iterdir()}
    assert without_seconds(json.loads((report / "parity.json").read_text(encoding="utf-8"))) == without_seconds(record)
    assert (report / "parity.md").read_text(encoding="utf-8").startswith("# Parity of ")
    assert "polygraphy" in side["divergence"]["command"]


def without_seconds(record):
    if isinstance(record, dict):
        return {key: without_seconds(value) for key, value in record.items() if key != "seconds"}
    return [without_seconds(each) for each in record] if isinstance(record, list) else record


@pytest.mark.parametrize(
    ("form", "begins", "holds"),
    [
        ("human", "Parity of ", "\nBROKEN: ort: "),
        ("markdown", "# Parity of ", "\n**BROKEN: ort: "),
        ("html", "<!doctype html>", "down_block_residual_01 acts as if 0.900 of it were given"),
    ],
)
def test_each_form_says_the_same_and_goes_into_a_file(made, tmp_path, form, begins, holds):
    file = tmp_path / f"told.{form}"
    result = parity(made.model, "--onnx", made.faulty, *SIZE, "--format", form, "-o", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    text = file.read_text(encoding="utf-8")
    assert text.lower().startswith(begins.lower())
    assert holds in text
    assert list(tmp_path.iterdir()) == [file]


def test_sizes_in_pixels_are_told_as_latents_with_an_odd_one_between(made):
    asked = ("--sizes", "48x40:56x64:88x72", "--batch", "1:1:2", "--tokens", "5:7:9", "--backends", "torch", "--seed", "7")
    result = parity(made.model, *asked, "--format", "json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    told = [(each["batch"], each["height"], each["width"], each["tokens"]) for each in record["geometries"]]
    assert told[:3] == [(1, 5, 6, 5), (1, 8, 7, 7), (2, 9, 11, 9)]
    (between,) = told[3:]
    assert 5 < between[1] < 9 and between[1] % 2 and 6 < between[2] < 11 and between[2] % 2
    assert (record["seed"], record["sides"][0]["backend"]) == (7, "torch")


def test_a_real_controlnet_gives_the_residuals(made):
    asked = ("--onnx", made.healthy, *SIZE, "--controlnet", str(made.folder / "controlnet"))
    result = parity(made.model, *asked)
    assert result.exit_code == 0, result.output
    assert "PARITY: " in result.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("untrained", "every residual is zero, so nothing would be proven"),
        ("of-another", "of-another does not fit the model: "),
        ("nowhere", "nowhere"),
        ("model", "model"),
    ],
)
def test_a_controlnet_that_proves_nothing_is_refused(made, name, message):
    told = refused(made.model, "--onnx", made.healthy, *SIZE, "--controlnet", str(made.folder / name), "--offline")
    assert told.startswith("error: ")
    assert message in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--onnx", "{healthy}", "--batch", "2"], "error: --batch and --tokens go with --sizes\n"),
        (["--onnx", "{healthy}", "--tokens", "7"], "error: --batch and --tokens go with --sizes\n"),
        (["--onnx", "{healthy}", "--times-own", "0"], "error: --times-own must be more than 0, got 0.0\n"),
        (["--onnx", "{healthy}", "--times-own", "nan"], "error: --times-own must be more than 0, got nan\n"),
        (["--onnx", "{healthy}", "--sizes", "70x104"], "70x104 pixels: the width 70 is no multiple of 8"),
        (["--onnx", "{healthy}", "--sizes", "72x104:64x64:72x104"], "is no range: give the smallest first"),
        (["--onnx", "{healthy}", "--sizes", "72"], "'72' is no size; expected WxH in pixels"),
        (["--onnx", "{healthy}", "--sizes", "72x104", "--batch", "0"], "--batch: '0' is no whole number from 1 on"),
        (["--onnx", "{healthy}", "--backends", "ort,cuda"], "no backend is called 'cuda'; known: "),
        (["--onnx", "{healthy}", "--backends", "trt"], "trt runs engines: give one with --engine"),
        (["--backends", "ort"], "ort runs ONNX files: give one with --onnx"),
        (["--onnx", "nowhere.onnx"], "cannot read nowhere.onnx: No such file or directory"),
        (["--engine", "nowhere.plan"], "nowhere.plan"),
        ([], "nothing to compare the model with: give --onnx FILE.onnx, --engine PLAN, or --backends torch"),
        (["--onnx", "{healthy}", "-o", "no/such/folder.txt"], "cannot write no/such/folder.txt: No such file or directory"),
        (["--onnx", "{healthy}", "--report", "{healthy}/in"], "cannot write into {healthy}/in: Not a directory"),
    ],
)
def test_what_cannot_be_compared_is_status_2_and_one_message(made, arguments, message):
    told = refused(made.model, *(each.format(healthy=made.healthy) for each in arguments))
    assert told.startswith("error: ")
    assert message.format(healthy=made.healthy) in told


@pytest.mark.parametrize(("model", "message"), [("sd15", "no weights for "), ("controlnet", "is a ControlNet; parity is of")])
def test_a_model_that_cannot_be_run_is_refused(made, model, message, monkeypatch):
    monkeypatch.chdir(made.folder)
    told = refused(f"./{model}" if model == "controlnet" else model, "--onnx", made.healthy, "--offline")
    assert message in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="ort-cuda may run here")
def test_a_backend_that_cannot_run_here_is_broken_and_not_status_2(made, monkeypatch):
    monkeypatch.setattr(doctor, "backend", lambda name: Backend(name, False, "", (Gap("planted reason", "planted cure"),)))
    result = parity(made.model, "--onnx", made.healthy, *SIZE, "--backends", "ort-cuda")
    assert result.exit_code == 1, result.output
    text = " ".join(result.stdout.split())
    assert "BROKEN: ort-cuda: could not run" in text
    assert "ort-cuda cannot run here: planted reason; planted cure" in text
    assert "reference none: no backend could run" in text


# The help


@pytest.fixture
def examples() -> list[list[str]]:
    command = main.commands["parity"]
    told = command.get_help(click.Context(command, info_name="parity"))
    return [shlex.split(line)[2:] for line in told.splitlines() if line.strip().startswith("shapecheck parity ")]


def test_the_help_s_examples_can_be_run(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet(**THREE).save_pretrained(tmp_path / "sd15" / "unet")
    engines.exported(tmp_path / "sd15" / "unet.onnx", THREE)
    first, second, third = examples
    assert parity(*first).exit_code == 0
    result = parity(*second)
    assert result.exit_code == 0, result.output
    for size in ("batch 1, latent 24×40", "batch 2, latent 64×64", "batch 4, latent 96×96"):
        assert re.search(rf"^(sizes)? +{size}$", result.stdout, re.MULTILINE), result.stdout
    assert (tmp_path / "parity" / "parity.html").is_file()
    told = refused(*third)  # there is no engine without a GPU: the command is understood, and the record looked for
    assert "unet.plan" in told or "my-controlnet" in told


def test_the_help_says_how_it_ends():
    text = " ".join(parity("--help").stdout.split())
    assert (
        "Exit status 0 for PARITY, 1 for BROKEN, a backend that cannot run included, 2 where nothing could be compared" in text
    )
    assert "[default: ort for --onnx, trt or rtx for --engine]" in text
