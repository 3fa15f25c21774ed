"""`shapecheck parity`: what it prints and writes, how it ends, and what it refuses."""

from __future__ import annotations

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
from click.testing import CliRunner
from diffusers import ControlNetModel
from parity_samples import SAMPLES
from recorded_runs import RecordedStudy
from small import TINY, controlnet, unet

from shapecheck import doctor
from shapecheck.cli import main
from shapecheck.doctor.environment import Backend, Gap
from shapecheck.parity import request as requests
from shapecheck.parity.request import ParityRequest

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


@pytest.fixture
def recorded(monkeypatch):
    """Let the command find a run that is over, and return the requests that it was asked to carry out."""

    def record(sample: str) -> list[ParityRequest]:
        asked = []

        def create_run(request, progress=None):
            asked.append(request)
            return RecordedStudy(SAMPLES[sample]())

        monkeypatch.setattr(requests, "create_run", create_run)
        return asked

    return record


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


def test_a_controlnet_s_file_is_compared_residual_by_residual(made, tmp_path):
    net = ControlNetModel.from_pretrained(made.folder / "controlnet")
    file = onnx_files.controlnet_written(tmp_path / "net.onnx", net, latent=(17, 25))
    result = parity(str(made.folder / "controlnet"), "--onnx", str(file), *SIZE, "--report", str(tmp_path / "report"))
    assert result.exit_code == 0, result.output
    assert re.search(r"^PARITY: \d+ checks on ort, 1 of them not judged$", result.stdout, re.MULTILINE)  # it ignores its image
    assert (
        len(re.findall(r"^batch 2, latent 13×9, (?:down|mid)_block_residual\w* .* passed$", result.stdout, re.MULTILINE)) == 3
    )
    page = (tmp_path / "report" / "parity.html").read_text(encoding="utf-8")
    assert "This is a ControlNet: its residuals are the outputs below." in page


def test_a_slot_of_part_of_its_strength_is_broken_and_status_1(made, tmp_path):
    report = tmp_path / "a" / "report"
    result = parity(made.model, "--onnx", made.faulty, *SIZE, "--format", "json", "--report", str(report))
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert (record["shapecheck_parity"], record["verdict"], record["model"]) == (1, "broken", "model/unet")
    (side,) = record["sides"]
    (slot,) = [each for each in side["results"] if (each["kind"], each["status"]) == ("slot", "failed")]
    assert slot["where"] == "down_block_residual_01"
    assert slot["reason"] == "down_block_residual_01 acts as if 0.900 of it were given"
    assert {"parity.json", "parity.md", "parity.html"} <= {each.name for each in report.iterdir()}
    assert "polygraphy" in side["divergence"]["command"]


@pytest.mark.parametrize(
    ("form", "begins", "holds"),
    [
        ("human", "Parity of ", "\nBROKEN: ort: "),
        ("json", "{", '"verdict": "broken"'),
        ("markdown", "# Parity of ", "\n**BROKEN: ort: "),
        ("html", "<!doctype html>", "acts at 0.5 of its strength: it is added after the scale, not before"),
    ],
)
def test_each_form_says_the_same_and_goes_into_a_file(recorded, tmp_path, form, begins, holds):
    recorded("broken")
    file, report = tmp_path / f"told.{form}", tmp_path / "a" / "report"
    result = parity("sd15", "--onnx", "unet.onnx", "--format", form, "-o", str(file), "--report", str(report))
    assert (result.exit_code, result.stdout) == (1, "")
    text = file.read_text(encoding="utf-8")
    assert text.lower().startswith(begins.lower())
    assert holds in text
    assert set(tmp_path.iterdir()) == {file, tmp_path / "a"}
    written = {"json": "parity.json", "markdown": "parity.md", "html": "parity.html"}
    assert {each.name for each in report.iterdir()} == set(written.values())
    if form in written:
        assert (report / written[form]).read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("sample", "status", "holds"),
    [("two-backends", 0, "\nPARITY: 50 checks on ort, trt\n"), ("could-not-run", 1, "\nBROKEN: trt: could not run ")],
)
def test_how_it_ends_is_the_verdict(recorded, sample, status, holds):
    recorded(sample)
    result = parity("sd15", "--onnx", "unet.onnx")
    assert result.exit_code == status
    assert holds in result.stdout


def test_what_is_asked_for_reaches_the_run(recorded, tmp_path):
    asked = recorded("healthy")
    told = ("--backends", "ort, trt", "--controlnet", "c", "--seed", "7", "--times-own", "2.5", "--reference", "float32")
    files = ("--onnx", "a.onnx", "--engine", "b.plan", "--report", str(tmp_path / "rep"))
    sizes = ("--sizes", "48x40", "--sizes", "72x104", "--batch", "1:1:2", "--tokens", "5:7:9", "--multiple-of", "8")
    assert parity("sd15", *told, *files, *sizes, "--variant", "fp16", "--offline").exit_code == 0
    assert asked == [
        ParityRequest(
            "sd15",
            onnx="a.onnx",
            engine="b.plan",
            backends=("ort", "trt"),
            controlnet="c",
            sizes=("48x40", "72x104"),
            batch=("1:1:2",),
            tokens="5:7:9",
            multiple_of=8,
            seed=7,
            times_own=2.5,
            reference="float32",
            variant="fp16",
            offline=True,
            folder=tmp_path / "rep",
        )
    ]


def test_sizes_in_pixels_become_latents_with_an_odd_one_between(made):
    request = ParityRequest(
        made.model, backends=("torch",), sizes=("48x40:56x64:88x72",), batch=("1:1:2",), tokens="5:7:9", seed=7
    )
    run = requests.create_run(request)
    calls = [plan.cases[0] for plan in run.plans["torch"] if plan.check.kind == "case"]
    sizes = list(dict.fromkeys(call.geometry for call in calls))
    assert [(each.batch, each.height, each.width, each.tokens) for each in sizes[:3]] == [
        (1, 5, 6, 5),
        (1, 8, 7, 7),
        (2, 9, 11, 9),
    ]
    (between,) = sizes[3:]
    assert 5 < between.height < 9 and between.height % 2 and 6 < between.width < 11 and between.width % 2
    assert run.request.seed == 7


def list_sizes(request: ParityRequest, backend: str) -> set[tuple[int, int, int, int]]:
    cases = [case for plan in requests.create_run(request).plans[backend] for case in plan.cases]
    return {(case.geometry.batch, case.geometry.height, case.geometry.width, case.geometry.tokens) for case in cases}


def test_each_axis_may_be_requested_alone(made):
    for request, expected in (
        ({"batch": ("4",)}, {(4, 9, 17, 154), (4, 8, 14, 77), (4, 24, 40, 77), (4, 32, 40, 77)}),
        ({"batch": ("1:2:4",)}, {(1, 9, 17, 154), (2, 8, 14, 77), (4, 24, 40, 77), (1, 32, 40, 77)}),
        ({"tokens": "154"}, {(2, 9, 17, 154), (6, 8, 14, 154), (1, 24, 40, 154), (1, 32, 40, 154)}),
        ({"multiple_of": 64}, {(2, 16, 24, 154), (6, 8, 16, 77), (1, 24, 40, 77), (1, 32, 40, 77)}),
        ({"sizes": ("72x104",)}, {(1, 13, 9, 77)}),
        ({"batch": ("4",), "tokens": "7", "multiple_of": 64}, {(4, 16, 24, 7), (4, 8, 16, 7), (4, 24, 40, 7), (4, 32, 40, 7)}),
    ):
        found = list_sizes(ParityRequest(made.model, backends=("torch",), **request), "torch")
        assert found == expected, request


@pytest.fixture(scope="module")
def narrow(made) -> str:
    """A file for one size alone."""
    numbers = {"batch": 2, "h": 17, "w": 25, "tokens": 77, "ceil(h/2)": 9, "ceil(w/2)": 13}
    path = made.folder / "narrow.onnx"
    return str(onnx_files.planted(Path(made.healthy), path, onnx_files.fix(numbers)))


def test_a_narrow_file_has_parity_within_its_limits(made, narrow):
    result = parity(made.model, "--onnx", narrow)
    assert result.exit_code == 0, result.output
    assert "note: takes batch 2; latent 17×25 (200×136 pixels); 77 text tokens\n" in result.stdout
    assert list_sizes(ParityRequest(made.model, onnx=narrow), "ort") == {(2, 17, 25, 77)}


@pytest.mark.parametrize(
    "asked",
    [
        ("--batch", "1"),
        *(pytest.param(asked, marks=pytest.mark.full) for asked in (("--tokens", "154"), ("--multiple-of", "64"))),
        ("--sizes", "72x104"),
    ],
)
def test_it_is_broken_against_what_it_does_not_take(made, narrow, asked):
    broken = parity(made.model, "--onnx", narrow, *asked)
    assert (broken.exit_code, "contract: sample: sizes: got does not work" in broken.stdout) == (1, True), broken.output
    checked = CliRunner().invoke(main, ["check", narrow, "--model", made.model, *asked])
    assert (checked.exit_code, "does not work" in checked.stdout) == (1, True), checked.output
    assert CliRunner().invoke(main, ["check", made.healthy, "--model", made.model, *asked]).exit_code == 0


@pytest.mark.full
def test_a_real_controlnet_gives_the_residuals(made):
    asked = ("--onnx", made.healthy, *SIZE, "--controlnet", str(made.folder / "controlnet"))
    result = parity(made.model, *asked)
    assert result.exit_code == 0, result.output
    assert "PARITY: " in result.stdout


def test_a_controlnet_with_weights_is_tried_before_anything_is_computed(made):
    request = ParityRequest(made.model, onnx=made.healthy, sizes=("72x104",), controlnet=str(made.folder / "controlnet"))
    assert requests.create_run(request).checks


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
        (["--onnx", "{healthy}", "--multiple-of", "12"], "--multiple-of 12 is not a multiple of 8 (pixels per latent cell)"),
        (["--onnx", "{healthy}", "--sizes", "72x104", "--multiple-of", "64"], "both must be multiples of 64 (--multiple-of)"),
        (["--onnx", "{healthy}", "--times-own", "0"], "error: --times-own must be more than 0, got 0.0\n"),
        (["--onnx", "{healthy}", "--times-own", "nan"], "error: --times-own must be more than 0, got nan\n"),
        (["--onnx", "{healthy}", "--sizes", "70x104"], "70x104 pixels: width 70 is not a multiple of 8"),
        (["--onnx", "{healthy}", "--sizes", "72x104:64x64:72x104"], "is not a range: give the smallest first"),
        (["--onnx", "{healthy}", "--sizes", "72"], "'72' is not a size; expected WxH in pixels"),
        (["--onnx", "{healthy}", "--sizes", "72x104", "--batch", "0"], "--batch: '0' is not a whole number of at least 1"),
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


@pytest.mark.parametrize(
    ("model", "message"),
    [("sd15", "no weights for "), ("controlnet", "controlnet a ControlNet: give the model it was made of")],
)
def test_a_model_that_cannot_be_run_is_refused(made, model, message, monkeypatch):
    monkeypatch.chdir(made.folder)
    told = refused(f"./{model}" if model == "controlnet" else model, "--onnx", made.healthy, "--offline")
    assert message in told


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


@pytest.mark.full
def test_the_help_s_examples_can_be_run(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet(**THREE).save_pretrained(tmp_path / "sd15" / "unet")
    engines.exported(tmp_path / "sd15" / "unet.onnx", THREE)
    first, second, third, fourth = examples
    assert parity(*first).exit_code == 0
    result = parity(*second)
    assert result.exit_code == 0, result.output
    for size in ("batch 1, latent 24×40", "batch 2, latent 64×64", "batch 4, latent 96×96"):
        assert re.search(rf"^(sizes)? +{size}$", result.stdout, re.MULTILINE), result.stdout
    assert (tmp_path / "parity" / "parity.html").is_file()
    assert "theirs.onnx" in refused(*third)
    told = refused(*fourth)  # there is no engine without a GPU: the command is understood, and the record looked for
    assert "unet.plan" in told or "my-controlnet" in told


def test_the_help_says_how_it_ends():
    text = " ".join(parity("--help").stdout.split())
    assert "Exit status 0 for PARITY, 1 for BROKEN, a backend that cannot run included, 2 if nothing could be compared" in text
    assert "[default: ort for --onnx, trt or rtx for --engine]" in text
