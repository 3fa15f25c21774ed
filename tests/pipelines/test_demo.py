"""`shapecheck demo`: what it draws, writes and says. The exporter is torch's older one, but for one test."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import chromium
import engines
import numpy as np
import onnx_files
import pytest
import real_pipelines
import small
import torch
from click.testing import CliRunner, Result
from diffusers import DiffusionPipeline
from PIL import Image

import shapecheck
from shapecheck import ContractError, ShapecheckError, doctor
from shapecheck.cli import main
from shapecheck.onnx import export as exporter
from shapecheck.pipelines import candidates, kept_contracts, pictures
from shapecheck.pipelines import demo as drawing
from shapecheck.pipelines.demo_record import Change, Demo, Picture
from shapecheck.pipelines.demo_report import render_json, render_page, render_text
from shapecheck.pipelines.tiny_pipeline import build_controlnet

PICTURES = ["pytorch.png", "ort.png", "difference.png", "depth.png", "without.png", "effect.png"]
SIZE = (104, 72)
SHORT = ("--size", "104x72", "--steps", "2")


pytestmark = pytest.mark.usefixtures("one_thread")


def observe(*_):
    """Return the contract that is observed once a run, when the file is made."""
    return shapecheck.read_contract(real_pipelines.export_unet("shallow"))


def build_shallow():
    """Return a pipeline of two levels in place of SD1.5's four, which the README's demo has."""
    return real_pipelines.PIPELINES["controlnet"](real_pipelines.take_parts("shallow"))


def runs(_backend):
    """Doctor asks a process of its own."""
    return SimpleNamespace(runs=True)


EXPORT = (exporter, "export", engines.exported_quickly)
QUICK = (EXPORT, (doctor, "backend", runs), (kept_contracts, "probe", observe), (drawing, "build_tiny_pipeline", build_shallow))
"""Stand-ins for what other tests are of."""


@contextmanager
def patched(*changes):
    with pytest.MonkeyPatch.context() as patch:
        for place, name, value in changes:
            patch.setattr(place, name, value)
        yield


def demo(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["demo", *arguments])


@dataclass(frozen=True)
class Shown:
    folder: Path
    result: Result


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Shown:
    """The command, run once."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with patched(*QUICK):
        result = demo("--out", str(folder), *SHORT)
    assert result.exit_code == 0, result.output
    return Shown(folder, result)


@pytest.fixture
def again(shown, tmp_path):
    """A folder in which the exported file is found."""
    for path in shown.folder.glob("*.onnx*"):
        shutil.copy(path, tmp_path)
    return tmp_path


# what a run leaves


def test_all_files_are_there_and_the_pictures_are_of_that_size(shown):
    names = {path.name for path in shown.folder.iterdir()}
    ((artefact,), (contract,)) = (shown.folder.glob(pattern) for pattern in ("*.onnx", "contract-*.json"))
    assert names == {
        *PICTURES,
        "index.html",
        "demo.json",
        "demo.md",
        artefact.name,
        f"{artefact.name}.data",
        contract.name,
        ".shapecheck.lock",
    }
    seen = {}
    for name in PICTURES:
        with Image.open(shown.folder / name) as opened:
            assert (opened.format, opened.mode, opened.size) == ("PNG", "RGB", SIZE)
            seen[name] = np.asarray(opened).astype(int)
    assert seen["pytorch.png"].std() > 10
    assert np.abs(seen["pytorch.png"] - seen["ort.png"]).max() <= 1
    assert np.abs(seen["pytorch.png"] - seen["without.png"]).max() > 10
    assert seen["depth.png"].max() == 255
    assert seen["difference.png"].max() > 25  # amplified


def test_the_json_says_what_the_pictures_say(shown):
    read = json.loads((shown.folder / "demo.json").read_text(encoding="utf-8"))
    assert (read["shapecheck_demo"], read["verdict"], read["passes"]) == (1, "parity", True)
    assert read["difference"]["largest"] <= 0.05
    assert read["control"]["largest"] > read["control"]["mean"] > 10
    assert (read["size_px"], read["steps"], read["slots"], read["allowed"]) == ([104, 72], 2, 5, 1.0)
    assert (shown.folder / read["artefact"]).is_file()
    assert [picture["file"] for picture in read["pictures"]] == PICTURES
    assert read["times_faster"] == read["torch_seconds"] / read["backend_seconds"]
    assert {"torch", "diffusers", "transformers"} <= read["versions"].keys()


def test_the_text_begins_with_the_verdict(shown):
    title, verdict, *_ = shown.result.stdout.split("\n\n")
    assert title == "Demo: ONNX Runtime on the CPU in the place of PyTorch's UNet"
    words = " ".join(verdict.split())
    number = r"[\d.e-]+"
    assert re.fullmatch(
        rf"PARITY: ort draws PyTorch's picture, at most {number} of 255 apart; the ControlNet changes it by up to \d+", words
    )
    assert "these are textures, no chairs" in shown.result.stdout
    assert shown.result.stderr == ""
    markdown = (shown.folder / "demo.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[.*?\]\((.*?)\)", markdown) == PICTURES


def test_a_backend_without_its_slots_ends_in_status_1(again):
    """Planted: a file whose slots are taken and never added."""
    (path,) = again.glob("*.onnx")
    onnx_files.planted(path, path, *(onnx_files.unconsume(slot.name) for slot in observe().slots))
    with patched(*QUICK):
        result = demo("--out", str(again), *SHORT, "--format", "json")
    assert result.exit_code == ContractError.exit_status
    read = json.loads(result.stdout)
    assert (read["verdict"], read["passes"]) == ("broken", False)
    assert read["difference"]["largest"] == pytest.approx(read["control"]["largest"], abs=0.1)
    assert "does not draw PyTorch" in (again / "index.html").read_text(encoding="utf-8")


@pytest.mark.full
def test_a_controlnet_that_does_nothing_ends_in_status_1(again):
    """Planted: its zero convolutions are zero, as in one that was never trained."""
    pipe = build_shallow()
    pipe.controlnet = build_controlnet(pipe.unet, 1)
    for convolution in (*pipe.controlnet.controlnet_down_blocks, pipe.controlnet.controlnet_mid_block):
        convolution.weight.zero_()
        convolution.bias.zero_()
    with patched(*QUICK, (drawing, "build_tiny_pipeline", lambda: pipe)):
        result = demo("--out", str(again), *SHORT)
    assert result.exit_code == ContractError.exit_status
    assert "BROKEN: the ControlNet changes PyTorch's picture by 0 of 255" in " ".join(result.stdout.split())


# real checkpoints


@pytest.fixture(scope="module", params=[pytest.param("shallow", marks=pytest.mark.full), "shallow-xl"])
def saved(request, tmp_path_factory) -> tuple[str, Path]:
    """A pipeline and a ControlNet in folders."""
    folder, parts = tmp_path_factory.mktemp(request.param), real_pipelines.take_parts(request.param)
    real_pipelines.PIPELINES["xl-text" if parts.kind == "sdxl" else "text"](parts).save_pretrained(folder / "model")
    parts.controlnet.save_pretrained(folder / "controlnet")
    return parts.kind, folder


def show(folder: Path, out: Path, *more: str, controlnet: Path | None = None) -> Result:
    """What the command makes of a saved pipeline and its ControlNet, or another."""
    named = ("--model", str(folder / "model"), "--controlnet", str(controlnet or folder / "controlnet"))
    return demo("--out", str(out), *named, "--offline", *more)


def test_checkpoints_are_loaded_as_the_pipeline_they_are_of(saved, tmp_path):
    """A GPU is pretended up to where the pipeline has been moved there."""
    kind, folder = saved
    seen = []

    def take_pipeline(pipe, _folder, backend, *, sizes, **_):
        assert seen == ["cuda", torch.float16]
        seen.extend([backend, *sizes, pipe])
        raise ShapecheckError("it went this far")

    with patched(
        (torch.cuda, "is_available", lambda: True),
        (DiffusionPipeline, "to", lambda _pipe, *where: seen.extend(where)),
        (drawing, "accelerate", take_pipeline),
    ):
        result = show(folder, tmp_path, "--backend", "ort-cuda")
    assert (result.exit_code, result.stderr) == (2, "error: it went this far\n"), (
        "a progress bar of diffusers is no line of ours"
    )
    *told, pipe = seen
    assert told == ["cuda", torch.float16, "ort-cuda", "128x128"]
    assert type(pipe).__name__ == f"StableDiffusion{'XL' if kind == 'sdxl' else ''}ControlNetPipeline"
    assert {pipe.unet.dtype, pipe.controlnet.dtype, pipe.vae.dtype} == {torch.float16}


def test_what_diffusers_cannot_load_is_told_in_one_line(saved, tmp_path):
    _, folder = saved
    shutil.copytree(folder / "controlnet", tmp_path / "empty")
    next((tmp_path / "empty").glob("*.safetensors")).unlink()
    result = show(folder, tmp_path / "out", controlnet=tmp_path / "empty")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"error: diffusers cannot load .*empty: [^\n]+", result.stderr.strip())


def test_two_that_do_not_fit_are_told_before_weights_are_read(saved, tmp_path):
    _, folder = saved
    other = small.controlnet(small.unet(**small.TINY))
    other.save_config(tmp_path / "other")  # no weights
    result = show(folder, tmp_path / "out", controlnet=tmp_path / "other")
    assert result.exit_code == ContractError.exit_status
    assert "mid_block_residual" in result.stderr


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sd"], "--model without --controlnet: give both, or neither for a small model"),
        (["--controlnet", "net"], "--controlnet without --model: give both"),
        (["--variant", "fp16"], "--variant says which files of --model are read"),
        (["--size", "100x104"], "width 100 is not a multiple of 8"),
        (["--size", "large"], "'large' is not a size; expected WxH in pixels"),
        (["--prompt", "a\udcffb"], "the prompt is not text in UTF-8"),
        (["--image", "absent.png"], "cannot read the image absent.png: No such file"),
        (["--image", __file__], r"cannot read the image .*test_demo\.py: cannot identify"),
        (["--model", "sd15", "--controlnet", "sd15"], "sd15 is a preset, which has no weights: give a diffusers folder"),
        (["--steps", "1"], "1 is not in the range"),
        (["--seed", "-1"], "-1 is not in the range"),
        (["--backend", "torch"], "'torch' is not one of 'ort', 'torch-compile', 'ort-cuda'"),
    ],
)
def test_what_cannot_be_shown_is_told(tmp_path, arguments, message):
    result = demo("--out", str(tmp_path), *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(message, " ".join(result.stderr.split()))
    assert not any(tmp_path.iterdir())


def test_a_compiled_unet_has_no_artefact(tmp_path):
    """In place of the compiled UNet its file is run. Without a GPU that is on the CPU, and judged."""
    asked = []

    def load(_model, backend, **_options):
        asked.append(backend)
        return shapecheck.load(real_pipelines.export_unet("shallow"), "ort")

    with patched(*QUICK, (candidates, "load", load), (torch.cuda, "is_available", lambda: False)):
        result = demo("--out", str(tmp_path), *SHORT, "--backend", "torch-compile", "--format", "json")
    assert result.exit_code == 0, result.output
    assert asked == ["torch-compile"]
    read = json.loads(result.stdout)
    assert (read["verdict"], read["backend"], read["precision"], read["artefact"]) == ("parity", "torch-compile", "float32", "")
    assert (tmp_path / "torch-compile.png").is_file()
    assert "none: compiled in this process" in (tmp_path / "demo.md").read_text(encoding="utf-8")
    assert "on the CPU. Leaving the block" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    result = demo("--out", str(tmp_path / "file" / "folder"))
    assert result.exit_code == 2
    assert re.search("cannot write into .*folder: Not a directory", result.stderr)


def test_a_backend_of_gpus_needs_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = demo("--out", str(tmp_path), "--backend", "trt")
    assert result.exit_code == 2
    assert "trt runs on a GPU, and PyTorch sees none here: `shapecheck doctor`" in result.stderr


# the record


def sample(**changes) -> Demo:
    made = Demo(
        model="a model",
        controlnet="a ControlNet",
        random=True,
        prompt="a red chair",
        size_px=(16, 8),
        steps=4,
        seed=0,
        backend="ort",
        device="cpu, 2 threads",
        precision="float32",
        artefact="unet.onnx",
        contract="sha256:12",
        slots=13,
        pictures=(Picture("pytorch.png", "PyTorch"), Picture("ort.png", "ort")),
        difference=Change(0.01, 0.001),
        control=Change(90.0, 9.0),
        allowed=1.0,
        torch_seconds=0.2,
        backend_seconds=0.1,
        versions=(("torch", "2.13"),),
    )
    return replace(made, **changes)


NAN = Change(math.nan, math.nan)
HALF = {"allowed": None, "precision": "float16", "backend": "trt"}


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "PARITY", "ort draws PyTorch's picture, at most 0.01 of 255 apart; the ControlNet changes it by up to 90"),
        ({"difference": Change(1.0, 0.5)}, "PARITY", "at most 1 of 255 apart"),
        (
            {"difference": Change(1.4, 0.5)},
            "BROKEN",
            "ort does not draw PyTorch's picture: they are 1.4 of 255 apart, 1 allowed",
        ),
        ({"difference": NAN}, "BROKEN", "they are NaN of 255 apart"),
        ({"control": NAN}, "BROKEN", "the ControlNet changes PyTorch's picture by NaN of 255"),
        ({"control": Change(0.0, 0.0)}, "BROKEN", "by 0 of 255: a backend that ignores it would not be noticed"),
        ({"control": Change(0.5, 0.1)}, "BROKEN", "by 0.5 of 255"),
        (
            {"difference": Change(30.0, 9.0), "control": Change(30.0, 9.0), **HALF},
            "BROKEN",
            "trt is on average 9 of 255 from PyTorch's picture, which the ControlNet changes by 9",
        ),
        ({"difference": Change(30.0, 1.0), **HALF}, "NOT JUDGED", "trt and PyTorch differ by at most 30 of 255, in float16"),
        ({"difference": NAN, **HALF}, "BROKEN", "trt and PyTorch differ by NaN: a picture holds values that are not numbers"),
        ({"control": Change(0.0, 0.0), **HALF}, "BROKEN", "by 0 of 255"),
    ],
)
def test_the_verdict_follows_from_the_numbers(changes, verdict, words):
    found = sample(**changes)
    assert (found.verdict, found.passes) == (verdict, verdict != "BROKEN")
    text = " ".join(render_text(found).split())
    assert f"{verdict}: " in text and words in text
    assert f"**{verdict}: " in render_text(found, "markdown")
    assert ("nothing is judged" in text or "not judged" in text) == (found.allowed is None)


def test_json_is_the_record_and_what_follows_from_it():
    found = sample(difference=NAN)
    read = json.loads(render_json(found), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    expected = json.loads(json.dumps(asdict(replace(found, difference=Change(0, 0)))))
    expected |= {"difference": {"largest": "NaN", "mean": "NaN"}, "versions": {"torch": "2.13"}}
    assert read == {"shapecheck_demo": 1, "verdict": "broken", "passes": False, "times_faster": 2.0} | expected


# pictures


@pytest.mark.parametrize(("height", "width"), [(104, 136), (136, 104), (8, 8), (8, 264)])
def test_the_scene_is_a_depth_map_at_any_size(height, width):
    scene = pictures.draw_scene(height, width)
    assert (scene.shape, scene.dtype) == ((height, width, 3), np.float32)
    assert (scene[..., 0] == scene[..., 2]).all()
    assert (float(scene.min()), float(scene.max())) == (0, 1)


def test_the_floor_comes_nearer_and_things_stand_before_the_wall():
    scene = pictures.draw_scene(400, 600)[..., 0]
    rightmost = scene[:, -1]
    assert rightmost[0] == 0 and (np.diff(rightmost) >= 0).all() and rightmost[-1] > 0.5
    assert scene[200, 150] > scene[200, 450] > scene[200, -1] == 0  # the large ball, the box, the wall


def test_a_difference_is_amplified_by_a_round_number():
    black = np.zeros((2, 3, 3), dtype=np.float32)
    for largest, factor in {0.0026: 300, 0.3: 3, 1.0: 1, 0.0: 1, 1e-9: 1_000_000, math.nan: 1}.items():
        other = black.copy()
        other[1, 2, 0] = largest
        shown, told = pictures.amplify_difference(black, other)
        assert told == factor
        assert not shown.max() > 1


def test_what_is_no_number_is_black_and_no_small_difference(tmp_path):
    picture = np.full((2, 3, 3), 0.5, dtype=np.float32)
    other = picture.copy()
    other[0, 0, 0] = math.nan
    assert math.isnan(pictures.measure_change(picture, other).largest)
    pictures.save_picture(other, tmp_path / "a.png")
    assert pictures.read_image(tmp_path / "a.png").getpixel((0, 0)) == (0, 128, 128)


def test_an_image_is_cut_to_the_size_about_its_middle(tmp_path):
    Image.new("L", (40, 10), 255).save(tmp_path / "grey.png")
    assert pictures.fit_image(pictures.read_image(tmp_path / "grey.png"), 8, 16).shape == (8, 16, 3)


# the page


class Tags(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def rendered(found: Demo) -> str:
    return render_page(found, {each.file: b"\x89PNG" + each.file.encode() for each in found.pictures})


def test_the_page_needs_nothing_but_itself(shown):
    source = (shown.folder / "index.html").read_text(encoding="utf-8")
    tags = Tags(source).tags
    assert [attributes["src"] for tag, attributes in tags if tag == "img"] == [
        f"data:image/png;base64,{base64.b64encode((shown.folder / name).read_bytes()).decode()}" for name in PICTURES
    ]
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "a"}
    keys = {key for _, attributes in tags for key in attributes}
    assert not [key for key in keys if key.startswith("on") or key in ("href", "srcset", "style")]
    assert "url(" not in source and "@import" not in source
    (policy,) = (attributes["content"] for _, attributes in tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_text_from_outside_is_no_markup():
    hostile = '"><script>alert(1)</script><img src=x onerror=alert(1)>|\x1b[2J\n# a'
    found = sample(prompt=hostile, model=hostile, controlnet=hostile, artefact=hostile)
    harmless = Tags(rendered(sample())).tags
    assert [tag for tag, _ in Tags(rendered(found)).tags] == [tag for tag, _ in harmless]
    for text in (render_text(found), render_text(found, "markdown")):
        assert "\x1b" not in text
        assert not [line for line in text.splitlines() if line == "# a"]
    assert not re.search(r"(?<!\\)<", render_text(found, "markdown"))
    assert json.loads(render_json(found))["prompt"] == hostile


def test_small_pictures_are_not_blurred():
    assert 'class="small"' in rendered(sample())
    assert 'class="small"' not in rendered(sample(size_px=(512, 512)))


LOOK = """({
  images: [...document.images].map(e => [e.complete, e.naturalWidth, e.naturalHeight, e.getBoundingClientRect().width > 100]),
  verdict: document.querySelector('.verdict').innerText,
  tint: getComputedStyle(document.querySelector('.verdict')).backgroundColor,
  page: getComputedStyle(document.body).backgroundColor,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


@pytest.fixture(scope="module")
def browser():
    path = chromium.find()
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"none of {', '.join(chromium.NAMES)} is installed")
    with chromium.Browser(path) as opened:
        yield opened


def test_in_a_browser_every_picture_is_seen_and_nothing_is_asked_for(browser, shown):
    path = shown.folder / "index.html"
    seen = browser.open(path, LOOK)
    assert [each for each in seen.requests if each != path.as_uri() and not each.startswith("data:")] == []
    assert seen.complaints == []
    assert seen.value["images"] == [[True, *SIZE, True]] * len(PICTURES)
    assert seen.value["verdict"].startswith("PARITY")
    assert seen.value["tint"] != seen.value["page"]
    assert seen.value["wide"] == 0


@pytest.mark.parametrize("changes", [{"prompt": "x" * 3000, "model": "/a" * 300}, {"difference": NAN}, HALF])
def test_in_a_browser_no_text_makes_the_page_wider(browser, tmp_path, changes):
    (tmp_path / "page.html").write_text(rendered(sample(**changes)), encoding="utf-8")
    seen = browser.open(tmp_path / "page.html", LOOK)
    assert seen.value["wide"] == 0
    assert seen.value["tint"] not in ("rgba(0, 0, 0, 0)", seen.value["page"])


# the whole road; with our exporter it is a command of the README


@pytest.mark.full
def test_the_whole_road_with_checkpoints_and_an_image(saved, tmp_path):
    _, folder = saved
    pictures.save_picture(real_pipelines.rings(90, 200)[0], tmp_path / "rings.png")
    with patched(EXPORT):
        result = show(folder, tmp_path / "out", "--image", str(tmp_path / "rings.png"), "--steps", "2")
    assert result.exit_code == 0, result.output
    read = json.loads((tmp_path / "out" / "demo.json").read_text(encoding="utf-8"))
    assert (read["random"], read["size_px"], read["pictures"][3]["file"]) == (False, [128, 128], "control.png")
    assert "textures" not in result.stdout
