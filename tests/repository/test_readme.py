"""Every command, output and snippet of the README is run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import engines
import headers
import onnx_files
import pytest
import real_pipelines
import small
from click.testing import CliRunner
from PIL import Image

from shapecheck import parse_ranges, presets, profile_of
from shapecheck.cli import main
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Profile

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
OUTPUTS = re.findall(r"<!-- output: shapecheck ([^|>]*?)(?: \| ((?:from|to) \w+))? -->\n```text\n(.*?)```", TEXT, re.DOTALL)
EVERY_SNIPPET = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SNIPPETS = [each for each in EVERY_SNIPPET if "def test_" not in each]
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [block for block in BLOCKS if block.startswith("shapecheck ")]


PYTEST = [block for block in BLOCKS if block.startswith("python -m pytest ")]
SLOW = (
    *("export sd15", "check unet.plan", "parity", "probe sd15 --controlnet"),
    *("shapecheck export", "shapecheck probe sdxl", "shapecheck profile", "shapecheck parity", "shapecheck demo"),
)
"""Outputs and blocks of commands that take more than a second, by how they begin."""
SLOW_CALLS = ("export(", "probe(", "accelerate(", "build_engine(")
"""What a snippet calls that takes seconds."""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def prepare(text: str) -> None:
    """Make the models that commands name."""
    if "Pipeline.from_pretrained" in text:
        prepare_pipeline()
        return
    if "my-model" in text or "unet.plan" in text:
        small.unet(**small.TINY).save_pretrained("my-model/unet")
    if "v1-5-pruned" in text:
        for file, preset, prefix in (
            ("v1-5-pruned", "sd15", "model.diffusion_model."),
            ("control_v11p_sd15_canny", "controlnet-sd15", "control_model."),
        ):
            headers.write(Path(f"{file}.safetensors"), headers.original(headers.module(preset), prefix))
    if "exchanged.onnx" in text:
        healthy, _ = engines.exported(Path("healthy.onnx"), small.TINY)
        swap = onnx_files.exchange("down_block_residual_00", "down_block_residual_01")
        onnx_files.planted(healthy, Path("exchanged.onnx"), swap)
    if ("my-model/unet.onnx" in text or "unet.plan" in text) and "export" not in text:
        prepare_engine(text)
    if "from_json(Path" in text:
        Path("sdxl.contract.json").write_text(presets.contract("sdxl").to_json(), encoding="utf-8")
    if "my-controlnet" in text:
        small.controlnet(small.unet(**small.TINY)).save_pretrained("my-controlnet")
    if "theirs.onnx" in text:
        plan = onnx_files.plan(Path("plan.onnx"), presets.contract("sdxl"))
        onnx_files.planted(
            plan,
            Path("theirs.onnx"),
            onnx_files.bake("text_embeds", sized_by="time_ids"),
            onnx_files.drop("text_embeds"),
            onnx_files.exchange("down_block_residual_04", "down_block_residual_06"),
            onnx_files.unconsume("mid_block_residual"),
        )


def prepare_pipeline() -> None:
    """A whole pipeline, a ControlNet and a picture."""
    parts = real_pipelines.build_parts("sd15")
    real_pipelines.PIPELINES["text"](parts).save_pretrained("my-model")
    parts.controlnet.save_pretrained("my-controlnet")
    picture = (real_pipelines.rings(real_pipelines.HEIGHT, real_pipelines.WIDTH)[0] * 255).astype("uint8")
    Image.fromarray(picture).save("depth.png")


def prepare_engine(text: str) -> None:
    """An ONNX file, profiles that somebody edited, and where it is checked the engine."""
    file, contract = engines.exported(Path("my-model/unet.onnx"), small.TINY)
    (sizes,) = parse_ranges(["384x384:512x512:904x768"], ["1:2:4"])
    good = profile_of(contract, sizes)
    kept = [each for each in good.inputs if each.name != "down_block_residual_01"]
    wrong = [replace(each, max=(4, 8, 96, 96)) if each.name == "mid_block_residual" else each for each in kept]
    Path("edited.json").write_text(profile_formats.dumps([Profile(tuple(wrong))], contract.digest), encoding="utf-8")
    if text.startswith("check"):
        build_engine(file, "unet.plan", profiles=[sizes], options=engines.RTX)


def globbed(word: str) -> list[str]:
    """What a shell makes of a word."""
    return [str(each) for each in Path().glob(word)] if "*" in word else [word]


def said(command: str) -> str:
    """What a command prints."""
    result = CliRunner().invoke(main, shlex.split(command))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return "\n".join(line.rstrip() for line in result.stdout.splitlines())


def settled(text: str) -> str:
    """The text less what moves with the release of a library."""
    if text.startswith("Parity of"):  # its numbers move with the machine, and lines break where they end
        text = re.sub(r"(?m)^(with|versions) .*$", "", text)
        return re.sub(r"-?\d+\.\d+(e[-+]\d+)?|\[[\d, ]+\]|\d+ of \d+ values", "NUMBER", " ".join(text.split()))
    return re.sub(r"(?m)^observed with.*$", "", re.sub(r"\.py:\d+", ".py:LINE", text)).strip()


def test_there_is_something_to_run():
    assert (len(OUTPUTS), len(SNIPPETS), len(COMMANDS), len(PYTEST), len(EVERY_SNIPPET)) == (11, 9, 7, 1, 10)


@pytest.mark.parametrize(
    ("command", "part", "shown"),
    [pytest.param(*each, id=each[0], marks=[pytest.mark.full] * each[0].startswith(SLOW)) for each in OUTPUTS],
)
def test_an_output_is_what_the_command_says(command, part, shown, update_reports):
    prepare(command)
    text = said(command)
    where, _, word = part.partition(" ")
    text = text[text.index(word) :] if where == "from" else text[: text.index(word)] if where == "to" else text
    if update_reports:
        marker = f"<!-- output: shapecheck {command}{f' | {part}' if part else ''} -->\n```text\n"
        head, _, tail = README.read_text(encoding="utf-8").partition(marker)
        README.write_text(f"{head}{marker}{text}\n{tail[tail.index('```') :]}", encoding="utf-8")
    else:
        assert settled(shown) == settled(text)


@pytest.mark.parametrize(
    "block",
    [pytest.param(each, id=each.splitlines()[0], marks=[pytest.mark.full] * each.startswith(SLOW)) for each in COMMANDS],
)
def test_commands_run_one_after_the_other(block):
    prepare(block)
    for line in block.splitlines():
        before = len(list(Path().iterdir()))
        result = CliRunner().invoke(main, [found for each in shlex.split(line)[1:] for found in globbed(each)])
        assert result.exit_code == 0, result.output
        assert result.stdout or len(list(Path().iterdir())) > before


@pytest.mark.parametrize(
    ("snippet", "values"),
    [
        pytest.param(snippet, values, id=str(at), marks=[pytest.mark.full] * any(call in snippet for call in SLOW_CALLS))
        for at, (snippet, values) in enumerate(zip(SNIPPETS, (0, 2, 1, 1, 1, 0, 1, 3, 0), strict=True))
    ],
)
def test_a_snippet_runs_and_says_what_its_comments_say(snippet, values):
    prepare(snippet)
    scope: dict[str, object] = {}
    exec(compile(snippet, "<snippet>", "exec"), scope)
    said = re.findall(r"(?m)^(.+?)  # (\([^)]*\)|'[^']*')", snippet)
    assert len(said) == values
    for expression, value in said:
        assert eval(expression, scope) == ast.literal_eval(value)


@pytest.mark.full
def test_what_is_said_of_pytest():
    (command,), (snippet,) = PYTEST, set(EVERY_SNIPPET) - set(SNIPPETS)
    prepare(command)
    Path("test_engine.py").write_text(snippet, encoding="utf-8")
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "test_engine.py ." in done.stdout
    assert "shapecheck" in done.stdout
    assert {each.name for each in Path("parity").iterdir()} == {"parity.json", "parity.md", "parity.html"}


def test_the_two_commands_are_what_ci_runs():
    ci = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    installs = [block.strip() for block in BLOCKS if "pip install" in block]
    assert len(installs) == 2
    for command in installs:
        assert command in ci
