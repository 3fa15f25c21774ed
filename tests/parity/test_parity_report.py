"""What is said of a parity run: as text, as Markdown, as JSON, and on a page that a real browser opens."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from importlib import resources
from itertools import combinations
from pathlib import Path

import chromium
import parity_samples as samples
import pytest
from parity_samples import HOSTILE, SAMPLES

from shapecheck import Contract, presets
from shapecheck.parity.drawing import draw_unet
from shapecheck.parity.page import render_page
from shapecheck.parity.report import render_json, render_text
from shapecheck.parity.results import Check, Parity, Result, Rounding
from shapecheck.report.numbers import format_number

ROOT = Path(__file__).parents[2]
UNETS = [name for name in presets.names() if presets.load(name).kind == "unet"]
each_sample = pytest.mark.parametrize("name", SAMPLES)


@cache
def page_of(name: str) -> str:
    """Return a sample's page, made once."""
    return render_page(SAMPLES[name]())


def strict(text: str):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def named(value: float):
    """How a number that JSON does not have must be written."""
    return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")


class Text(HTMLParser):
    """The words of a page, and its elements."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words, self.tags, self.inside = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return spaced("".join(self.words))


def spaced(text: str) -> str:
    return " ".join(text.split())


# JSON


@each_sample
def test_json_is_strict_and_holds_every_number(name):
    parity = SAMPLES[name]()
    read = strict(render_json(parity))
    assert read["shapecheck_parity"] == 1
    assert (read["verdict"], read["model"], read["seed"]) == (parity.verdict.lower(), parity.model, 0)
    assert read["contract_digest"] == parity.contract.digest
    assert Contract.from_json(json.dumps(read["contract"])) == parity.contract
    assert [side["backend"] for side in read["sides"]] == [side.backend for side in parity.sides]
    for side, seen in zip(parity.sides, read["sides"], strict=True):
        assert (seen["ran"] or {}).get("provider") == (side.ran.provider if side.ran else None)
        assert (seen["artefact"], seen["notes"]) == (side.artefact, list(side.notes))
        assert (seen["divergence"] or {}).get("command") == (side.divergence.command if side.divergence else None)
        for result, found in zip(side.results, seen["results"], strict=True):
            check_result(result, found)


def check_result(result: Result, found: dict):
    assert (found["kind"], found["where"]) == (result.check.kind, result.check.where)
    assert (found["status"], found["reason"], found["seconds"]) == (result.status, result.reason, result.seconds)
    if verdict := result.verdict:
        seen = found["verdict"]
        for name in ("allowed", "own", "scale", "rms", "cosine", "psnr", "share"):
            assert seen[name] == named(getattr(verdict, name)), name
        assert (seen["outside"], seen["nan"], seen["inf"], seen["count"]) == (
            verdict.outside,
            verdict.nan,
            verdict.inf,
            verdict.count,
        )
        assert seen["passes"] is verdict.passes
        if verdict.absolute:
            assert seen["absolute"]["index"] == list(verdict.absolute.index)
            assert seen["times_own"] == pytest.approx(verdict.absolute.difference / verdict.own)
        else:
            assert (seen["absolute"], seen["times_own"]) == (None, "NaN")
    if effect := result.effect:
        assert found["effect"]["strength"] == named(effect.strength)
        assert found["effect"]["cosine"] == named(effect.cosine)
        assert found["effect"]["found"] == [list(row) for row in effect.found]


def test_json_names_what_is_no_number():
    read = strict(render_json(samples.hostile()))
    effect = read["sides"][0]["results"][-1]["effect"]
    assert (effect["strength"], effect["cosine"]) == ("Infinity", "-Infinity")
    with pytest.raises(AssertionError, match="NaN is no JSON"):
        strict('{"a": NaN}')


@pytest.mark.parametrize(
    ("own", "difference", "expected"), [(2.0, 3.0, 1.5), (0.0, 1.0, "Infinity"), (0.0, 0.0, 0.0), (0.0, math.nan, "NaN")]
)
def test_the_ratio_to_an_own_error_of_nothing(own, difference, expected):
    verdict = samples.verdict(1, own=own, difference=1.0)
    verdict = replace(verdict, absolute=replace(verdict.absolute, difference=difference))
    result = Result(Check("ort", "case", "x"), "failed", "x: too far", verdict=verdict)
    parity = samples.healthy()
    parity = replace(parity, sides=(replace(parity.sides[0], results=(result,)),))
    assert strict(render_json(parity))["sides"][0]["results"][0]["verdict"]["times_own"] == expected


def test_half_a_surrogate_pair_can_be_stored():
    parity = samples.parity(presets.contract("sd15"), model="a\udcff")
    assert strict(render_json(parity).encode().decode())["model"] == "a\udcff"
    assert "a\\udcff" in render_page(parity).encode().decode()


# text

BROKEN = """\
Parity of preset sd15

BROKEN: ort: down_block_residual_04 and down_block_residual_05 are exchanged: down_block_residual_04
    acts like down_block_residual_05 of PyTorch (cosine 0.9998): the two slots are swapped;
    down_block_residual_10 changes nothing: the graph does not use it. Export again with the
    residual given as a graph input; and 2 more faults (5 of 26 checks failed)

reference  PyTorch float64 on cpu
tolerance  at most 8 times PyTorch's own error in that precision
sizes      batch 2, latent 9×11
           batch 1, latent 16×24
           batch 1, latent 64×64
seed       0
"""
WHY = """\
ort: ONNX Runtime on the CPU

ran       CPUExecutionProvider on x86-64 CPU, 8 threads, float32
with      onnxruntime 1.22.0; no TF32 on a CPU
artefact  models/sd15/unet.onnx
checks    20 passed, 5 failed, 1 not run

note: graph optimizations: all

What failed on ort

case batch 1, latent 16×24, control on: 96 NaN among 792 values
slot down_block_residual_04 acts like down_block_residual_05 of PyTorch (cosine 0.9998): the two
    slots are swapped
slot down_block_residual_05 acts like down_block_residual_04 of PyTorch (cosine 0.9997): the two
    slots are swapped
slot down_block_residual_10 changes nothing: the graph does not use it. Export again with the
    residual given as a graph input.
slot mid_block_residual acts at 0.5 of its strength: it is added after the scale, not before

What was not run on ort

switch on, off, on: not tried: a case with control on has failed

Where ort first leaves PyTorch

skip_4_sum (module down_blocks.1.attentions.0, slot down_block_residual_04): largest difference
    3.10e-01 at [0, 0, 3, 5] (0.56 for 0.25), 1.92e-05 allowed; 117 of 792 values outside (14.8%)
3 values before it agree, the last skip_3_sum
found on the graph without ONNX Runtime's optimizations

    polygraphy run unet.onnx --onnxrt --onnx-outputs skip_4_sum --load-outputs reference.json --rtol 0 --atol 1.9e-5
"""
ROWS = """\
output                              worst error  allowed   own error  worst/own  outside  cosine    PSNR      status
batch 2, latent 9×11, control on    2.40e-06     1.92e-05  2.40e-06   1.00×      0%       1.000000  135.1 dB  passed
batch 1, latent 16×24, control on   96 NaN       1.92e-05  2.40e-06   NaN        12.1%    NaN       NaN       FAILED
switch on, off, on                  -            -         -          -          -        -         -         not run
input or slot           strength  cosine    effect  at                    status
down_block_residual_03  1.000     1.000000  31.0%   batch 2, latent 9×11  passed
down_block_residual_10  0.000     NaN       15.5%   batch 2, latent 9×11  FAILED
"""


def test_a_broken_run_as_people_read_it():
    text = render_text(samples.broken())
    assert text.startswith(BROKEN)
    assert WHY in text
    assert set(ROWS.splitlines()) <= set(text.splitlines())
    assert text.index("What failed") < text.index("Where ort first") < text.index("Outputs of ort") < text.index("Effect of")


def test_a_run_whose_file_is_cut_off_is_not_taken_for_a_healthy_one():
    for name, start in SAMPLES.items():
        parity = start()
        lines = render_text(parity).split("\n\n")
        assert lines[1].rstrip() == lines[-1].rstrip(), name
        assert lines[-1].startswith(f"{parity.verdict}: "), name
        assert render_text(parity, "markdown").split("\n\n")[1].startswith(f"**{parity.verdict}: "), name


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("healthy", "PARITY: 26 checks on ort"),
        ("two-backends", "PARITY: 50 checks on ort, trt"),
        (
            "could-not-run",
            "BROKEN: trt: could not run (TensorRT cannot run here: no NVIDIA driver; install one, or leave trt out)",
        ),
        ("nothing-tried", "BROKEN: no backend was tried"),
    ],
)
def test_the_verdict_line(name, line):
    parity = SAMPLES[name]()
    assert spaced(render_text(parity).split("\n\n")[1]) == line
    assert spaced(line.partition(": ")[2]) in Text(page_of(name)).text


def test_what_was_not_judged_is_counted_wherever_there_is_a_verdict():
    whole = samples.healthy()
    (side,) = whole.sides
    unrun = [replace(each, status="not run", reason="too small") for each in side.results[-2:]]
    parity = replace(whole, sides=(replace(side, results=(*side.results[:-2], *unrun)),))
    told = "PARITY: 26 checks on ort, 2 of them not judged"
    assert spaced(render_text(parity)).endswith(told)
    assert f"**{told}**" in render_text(parity, "markdown")
    assert told.removeprefix("PARITY: ") in Text(render_page(parity)).text
    assert strict(render_json(parity))["unjudged"] == parity.unjudged == 2
    assert str(parity) == f"PARITY: {parity.model}, 2 checks not judged"
    assert whole.unjudged == 0
    assert str(whole) == f"PARITY: {whole.model}"


def test_a_side_on_which_nothing_was_checked_is_broken():
    whole = samples.healthy()
    unrun = Result(Check("ort", "slot", "down_block_residual_00"), "not run", "the provider fell back")
    parity = replace(whole, sides=(replace(whole.sides[0], results=(unrun,)),))
    assert render_text(parity).split("\n\n")[1] == "BROKEN: ort: nothing was checked (the provider fell back)"


def as_told(text: str, form: str) -> str:
    """What outside text becomes in a report."""
    text = text.replace("\x1b", "\\x1b")
    return text.replace("<", "\\<").replace("|", "\\|") if form == "markdown" else text


def reasons(source: str) -> str:
    """The lists of what failed or was not run, without what the drawing says of it."""
    return "".join(re.findall(r'<ul class="reasons">.*?</ul>', source, re.DOTALL))


@each_sample
@pytest.mark.parametrize("form", ["human", "markdown", "html"])
def test_every_failure_is_told_with_its_reason(name, form):
    parity = SAMPLES[name]()
    text = Text(reasons(page_of(name))).text if form == "html" else spaced(render_text(parity, form))
    for side in parity.sides:
        for result in side.results:
            if result.status != "passed":
                about, why = result.check.where or result.check.kind, result.reason
                assert spaced(as_told(about, form)) in text, result.check
                assert spaced(as_told(why.removeprefix(result.check.where).strip(": ") or why, form)) in text, result.check


def test_the_errors_of_all_values_together_are_told():
    whole = samples.healthy()
    rounding = Rounding(found=3.2e-4, own=1e-4, allowed=1.8e-4, calls=5)
    result = Result(Check("ort", "rounding", ""), "failed", "3.2 times PyTorch's own", rounding=rounding)
    parity = replace(whole, sides=(replace(whole.sides[0], results=(*whole.sides[0].results, result)),))
    told = "3.20× PyTorch's own error over all values of 5 calls (root mean square), 1.80× allowed"
    assert f"\nrounding  {told}\n" in render_text(parity)
    read = strict(render_json(parity))["sides"][0]["results"]
    assert read[-1]["rounding"] == {
        "found": 3.2e-4,
        "own": 1e-4,
        "allowed": 1.8e-4,
        "calls": 5,
        "times_own": rounding.times_own,
    }
    assert read[0]["rounding"] is None
    assert "rounding: 3.2 times PyTorch's own" in Text(render_page(parity)).text


def test_a_failure_without_a_reason_says_so():
    whole = samples.healthy()
    parity = replace(whole, sides=(replace(whole.sides[0], results=(Result(Check("ort", "weights", ""), "failed"),)),))
    assert "\nweights: no reason was given\n" in render_text(parity)


def test_hostile_names_steer_neither_terminal_nor_markdown():
    text = render_text(samples.hostile())
    assert all(each.isprintable() or each == "\n" for each in text)
    lines = render_text(samples.hostile(), "markdown").splitlines()
    assert not [line for line in lines if re.search(r"(?<!\\)<", line) and not line.startswith("    ")]
    assert HOSTILE not in "\n".join(lines)
    rows = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {10, 7}


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (2.345e-5, "difference", "2.35e-05"), (math.nan, "difference", "NaN"),
        (1.2, "times", "1.20×"), (123456.0, "times", "1.2e+05×"),
        (0.5, "strength", "0.500"), (0.9999996, "cosine", "1.000000"), (-math.inf, "cosine", "−∞"),
        (96.24, "decibel", "96.2 dB"), (math.inf, "decibel", "∞"), (3, "count", "3"), (0.25, "seconds", "0.25 s"),
        (0.0, "share", "0%"), (0.000001, "share", "0.00010%"), (0.148, "share", "14.8%"), (0.9999, "share", "99.9%"),
        (1.0, "share", "100%"), (1.5, "share", "150.0%"),
    ],
)  # fmt: skip
def test_how_a_number_is_written(value, style, text):
    assert format_number(value, style) == text


# the drawing


@pytest.mark.parametrize("name", UNETS)
def test_the_drawing_of_every_preset(name):
    contract = presets.contract(name)
    words = "changes nothing " * 30
    failed = {slot.name: Result(Check("ort", "slot", slot.name), "failed", words) for slot in contract.slots}
    drawing = draw_unet(contract, failed)
    assert drawing is not None
    assert sorted(drawn.slot.name for drawn in drawing.slots) == sorted(slot.name for slot in contract.slots)
    boxes = [slot.box for slot in drawing.slots]
    strips = [slot.strip for slot in drawing.slots]
    for one, other in combinations([*boxes, *strips, *drawing.ups], 2):
        assert not (one.x < other.right and other.x < one.right and one.y < other.bottom and other.y < one.bottom), (one, other)
    for box in (*boxes, *strips, *drawing.ups, *drawing.levels):
        assert drawing.lane <= box.x < box.right <= drawing.width
        assert 0 <= box.y < box.bottom <= drawing.height
    for seen, slot in zip(drawing.slots[:-1], contract.slots[:-1], strict=True):
        (up,) = [each for each in drawing.ups if each.y <= seen.box.middle <= each.bottom]
        assert up.label == slot.up_block
        assert seen.skip.endswith(f"H{up.x:.1f}")
        assert seen.box.label == str(slot.channels)
        level = next(each for each in drawing.levels if each.y <= seen.box.y and seen.box.bottom <= each.bottom)
        assert level.label.startswith(f"stride {slot.stride} ")
    assert len({level.label for level in drawing.levels}) == len({slot.stride for slot in contract.slots})


def test_more_channels_are_wider_and_deeper_levels_further_in():
    drawing = draw_unet(presets.contract("sd15"), {})
    by_label = {slot.box.label: slot.box.width for slot in drawing.slots[:-1]}
    assert by_label["320"] < by_label["640"] < by_label["1280"]
    starts = [slot.box.x for slot in drawing.slots[:-1]]
    assert starts == sorted(starts)
    assert len(set(starts)) == 4


def test_what_is_drawn_of_each_slot_is_what_its_check_came_to():
    parity = samples.broken()
    groups = [attributes for tag, attributes in Text(render_page(parity)).tags if "data-slot" in attributes]
    drawn = {each["data-slot"]: each["data-status"] for each in groups}
    assert drawn == {each.check.where: each.status for each in parity.sides[0].results if each.check.kind == "slot"}
    assert list(drawn.values()).count("failed") == 4
    assert all(each["class"].split()[1] == each["data-status"] for each in groups)


def test_a_slot_that_fails_at_one_size_is_drawn_as_failed_and_one_nobody_tried_as_not_run():
    whole = samples.healthy()
    side = whole.sides[0]
    again = Result(Check("ort", "slot", "down_block_residual_00"), "failed", "down_block_residual_00: too far")
    kept = tuple(each for each in side.results if each.check.where != "down_block_residual_01")
    for results in ((*kept, again), (again, *kept)):
        source = render_page(replace(whole, sides=(replace(side, results=results),)))
        assert 'data-slot="down_block_residual_00" data-status="failed"' in source
        assert 'data-slot="down_block_residual_01" data-status="not run"' in source


# the page


LOADING = {"link", "img", "image", "iframe", "object", "embed", "base", "form", "video", "audio", "use"}


@each_sample
def test_the_page_holds_nothing_that_loads_or_runs(name):
    tags = Text(page_of(name)).tags
    assert [attributes for tag, attributes in tags if tag == "script"] == [{"type": "application/json", "id": "parity"}]
    assert not {tag for tag, _ in tags} & LOADING
    for _, attributes in tags:
        assert not {key for key in attributes if key.startswith("on") or key in ("src", "srcset", "style", "xlink:href")}
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in page_of(name) and "@import" not in page_of(name)
    assert {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"} in [
        attributes for tag, attributes in tags if tag == "meta"
    ]


def test_each_backend_has_its_section_and_a_link_to_it():
    tags = Text(render_page(samples.two_backends())).tags
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    assert links == [f"#{attributes['id']}" for tag, attributes in tags if tag == "section"] == ["#backend-0", "#backend-1"]


def test_what_the_page_is_made_of_is_installed_with_the_package():
    folder = resources.files("shapecheck.parity")
    assert all((folder / name).is_file() for name in ("parity.html.j2", "parity_pieces.html.j2", "parity.css"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "jinja2>=3.1" in project["dependencies"]


def test_a_page_needs_no_torch():
    code = "import sys; from shapecheck.parity import page, report; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "jinja2" in loaded
    assert not {"torch", "numpy", "diffusers"} & set(loaded)


# in a browser

LOOK = """(() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] };
  const numbers = [...document.querySelectorAll('.n')].map(e => (
    {path: e.dataset.path, value: e.dataset.value, style: e.dataset.style, text: e.textContent,
     folded: !!e.closest('details'), shown: e.getClientRects().length > 0}));
  const maps = [...document.querySelectorAll('svg[data-path]')].map(e => (
    {path: e.dataset.path, value: e.dataset.value,
     cells: [...e.querySelectorAll('rect')].map(r => r.className.baseVal ? null : Number(getComputedStyle(r).fillOpacity))}));
  const drawings = [...document.querySelectorAll('svg.unet')].map(e => (
    {frame: box(e), texts: [...e.querySelectorAll('text, .track')].map(t => [t.textContent || 'a bar', ...box(t)]),
     strips: [...e.querySelectorAll('.why')].map(
       g => [box(g.querySelector('rect')), ...[...g.querySelectorAll('text')].map(box)]),
     strokes: Object.fromEntries([...e.querySelectorAll('.slot .box')].map(
       b => [b.parentNode.dataset.status, getComputedStyle(b).stroke]))}));
  return {numbers, maps, drawings, embedded: document.getElementById('parity').textContent,
          wide: document.documentElement.scrollWidth - document.documentElement.clientWidth};
})()"""
NAMED = {"NaN": "NaN", "Infinity": "∞", "-Infinity": "−∞"}


def browser_or_reason() -> str:
    """Where Chromium is. Where there is none the test is skipped, but in CI it fails."""
    path = chromium.find()
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"none of {', '.join(chromium.NAMES)} is installed")
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium.Browser(browser_or_reason()) as opened:
        yield opened


def opened(browser, folder: Path, source: str):
    path = folder / "page.html"
    path.write_text(source, encoding="utf-8")
    seen = browser.open(path, LOOK)
    seen.requests = [each for each in seen.requests if each != path.as_uri()]
    return seen


@pytest.fixture(scope="module")
def looked_at(browser, tmp_path_factory):
    """What a sample's page is in the browser; each is opened once."""
    return cache(lambda name: opened(browser, tmp_path_factory.mktemp("page"), page_of(name)))


def at(values, path: str):
    for step in path.split("."):
        values = values[int(step)] if isinstance(values, list) else values[step]
    return values


def wrong_numbers(seen, values) -> list[str]:
    """Every number on the page that is not the one in the JSON, by its place."""
    wrong = [each["path"] for each in seen["numbers"] if not is_told(each, at(values, each["path"]))]
    for each in seen["maps"]:
        grid = at(values, each["path"])
        cells = [cell for row in grid for cell in row]
        same = len(cells) == len(each["cells"]) and all(
            found == pytest.approx(cell, abs=1e-4) for cell, found in zip(cells, each["cells"], strict=True)
        )
        if not same or json.loads(each["value"]) != grid:
            wrong.append(each["path"])
    return wrong


def is_told(number, value) -> bool:
    """Whether a number's element holds the value, and shows it, rounded to the last digit that it shows."""
    if json.loads(number["value"]) != value or not (number["folded"] or number["shown"]):
        return False
    if isinstance(value, str):
        return number["text"] == NAMED[value]
    read, decimals, power, unit = re.fullmatch(r"(-?\d+(?:\.(\d+))?(?:e([+-]\d+))?)(×|%| dB| s)?", number["text"]).groups()
    last_digit = 10.0 ** (int(power or 0) - len(decimals or ""))
    return abs(float(read) - value * (100 if unit == "%" else 1)) <= 0.5001 * last_digit


def seldom(*names: str) -> list:
    """Pages that differ in their numbers alone from those that are opened by default."""
    return [pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", ["broken", "hostile", *seldom("two-backends", "could-not-run", "without-slots", "pooled")])
def test_in_a_browser_the_page_is_silent_and_its_numbers_are_those_of_the_json(looked_at, name):
    parity, seen = SAMPLES[name](), looked_at(name)
    assert (seen.requests, seen.complaints) == ([], [])
    values = strict(render_json(parity))
    assert strict(seen.value["embedded"]) == values
    assert wrong_numbers(seen.value, values) == []
    shown = {each["path"] for each in seen.value["numbers"]}
    assert must_show(parity) <= shown
    prints = sum(each.effect is not None for side in parity.sides for each in side.results)
    assert len(seen.value["maps"]) == 2 * prints
    assert seen.value["wide"] == 0


def must_show(parity: Parity) -> set[str]:
    """The numbers a reader looks for."""
    found = set()
    for index, side in enumerate(parity.sides):
        for number, each in enumerate(side.results):
            path = f"sides.{index}.results.{number}"
            if each.effect:
                found |= {f"{path}.effect.{name}" for name in ("strength", "cosine", "size")}
            if each.verdict:
                found |= {
                    f"{path}.verdict.{name}" for name in ("allowed", "own", "times_own", "share", "cosine", "psnr", "nan")
                }
            if each.verdict and each.verdict.absolute:
                found.add(f"{path}.verdict.absolute.difference")
    return found


@pytest.mark.parametrize("name", ["broken", "hostile", *seldom("koala", "pooled")])
def test_in_a_browser_no_label_lies_on_another(looked_at, name):
    (drawing,) = looked_at(name).value["drawings"]
    assert len(drawing["texts"]) > 10
    left, top, right, bottom = drawing["frame"]
    for word, *box in drawing["texts"]:
        assert left <= box[0] and top <= box[1] and box[2] <= right and box[3] <= bottom, word
    for (one, *a), (other, *b) in combinations(drawing["texts"], 2):
        across = min(a[2], b[2]) - max(a[0], b[0])
        along = min(a[3], b[3]) - max(a[1], b[1])
        assert across <= 1 or along <= 4, (one, other)  # a line's box is taller than its letters
    for strip, *lines in drawing["strips"]:
        assert all(strip[0] <= line[0] and line[2] <= strip[2] for line in lines)
    assert len(drawing["strokes"]) == len(set(drawing["strokes"].values()))


def test_what_would_load_or_complain_is_seen(browser, tmp_path):
    source = render_page(samples.without_slots())
    planted = '<img src="http://127.0.0.1:18/x.png"><script>console.warn("a"); throw Error("b")</script>'
    seen = opened(browser, tmp_path, source.replace("<main>", f"<main>{planted}"))
    assert seen.requests == ["http://127.0.0.1:18/x.png"]
    assert [each for each in seen.complaints if "image" in each and "Content Security Policy" in each]
    assert [each for each in seen.complaints if "inline script" in each]
    free = re.sub(r"<meta http-equiv[^>]*>", "", source).replace("<main>", f"<main>{planted}")
    complaints = " ".join(opened(browser, tmp_path, free).complaints)
    assert "console.warning" in complaints and "Error: b" in complaints


def test_a_number_that_is_not_the_json_s_is_seen(browser, tmp_path):
    parity = samples.broken()
    values, source = strict(render_json(parity)), render_page(parity)
    planted = {
        'data-style="difference">2.88e-06<': 'data-style="difference">2.89e-06<',
        'data-value="0.02"': 'data-value="0.021"',
        'fill-opacity="1.0"': 'fill-opacity="0.9"',
    }
    for right, wrong in planted.items():
        assert right in source
        source = source.replace(right, wrong, 1)
    assert len(wrong_numbers(opened(browser, tmp_path, source).value, values)) == len(planted)


@pytest.mark.parametrize(("variable", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_a_browser_only_ci_fails(monkeypatch, variable, outcome):
    monkeypatch.setattr(chromium.shutil, "which", lambda _: None)
    monkeypatch.setenv("CI", variable)
    with pytest.raises(outcome, match="none of chromium, chromium-browser, google-chrome is installed"):
        browser_or_reason()
