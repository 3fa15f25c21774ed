"""`explain`: real UNets are given every fault, and what they say leads back to exactly the faults that make them say it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import small
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from hostile import FAMOUS, HOSTILE
from hypothesis import assume, given
from hypothesis import strategies as st
from searches import layers
from spoilt import KINDS, spoilt, text_of

from shapecheck import Geometry, presets, probe
from shapecheck.cli import main
from shapecheck.explain import report
from shapecheck.explain.candidate_sizes import candidate_geometries
from shapecheck.explain.explain_text import explain_text
from shapecheck.explain.fault_catalogue import list_faults
from shapecheck.explain.judge_mapping import judge_residuals
from shapecheck.explain.parse_text import find_symptoms, flatten_text
from shapecheck.explain.predicted_messages import format_message
from shapecheck.explain.residual_table import Hints, RequestedSize, ResidualShapes, ResidualTable, right_shapes
from shapecheck.explain.simulate import lay_out_unet, simulate_call
from shapecheck.explain.symptom import Symptom

ROOT = Path(__file__).parents[2]
XL = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}
THIN = XL | {"layers_per_block": 1}
"""SDXL's levels with one layer each: seven slots."""
TOPOLOGIES = {
    "thin": THIN,
    "xl": XL,
    "sd15": {"block_out_channels": (8, 16, 24, 24), "norm_num_groups": 4},
    "uneven": XL | {"layers_per_block": [1, 3, 2]},
    "kandinsky": {
        "block_out_channels": (8, 16, 24),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    },
}
AT = Geometry(2, 24, 20, 7)
pytestmark = pytest.mark.usefixtures("one_thread")


class Lab:
    """A small real UNet, on the CPU and without values, and its contract."""

    def __init__(self, name: str) -> None:
        self.real = small.unet(**TOPOLOGIES[name])
        self.meta = small.unet(**TOPOLOGIES[name]).to("meta")
        self.contract = probe(self.meta)
        self.config = dict(self.real.config)
        self.at = Geometry(2, 24, 16, 7) if name == "kandinsky" else AT

    def says(self, residuals: ResidualShapes, at: Geometry | None = None, *, on: str = "real") -> str | None:
        at = at or self.at
        return text_of(getattr(self, on), at.batch, at.height, at.width, residuals.downs, residuals.mid)

    def explained(self, text: str, at: Geometry | None = None):
        at = at or self.at
        return explain_text(text, {"it": self.contract}, RequestedSize((at.height, at.width), at.batch))


@pytest.fixture(scope="module")
def lab():
    labs = {"thin": Lab("thin")}
    return lambda name: labs[name] if name in labs else labs.setdefault(name, Lab(name))


LAYERS = {"thin": [], "sd15": pytest.mark.nightly}
"""SD1.5's levels are more of what the others have; the others differ in kind."""


# what a UNet says is foretold, word by word


ONE = Geometry(1, 24, 20, 7)
LARGER = tuple((4, *shape) for shape in ((8, 24, 20), (8, 24, 20), (8, 12, 10), (16, 12, 10), (16, 6, 5), (24, 6, 5)))
CELL = Geometry(1, 4, 4, 7)
LARGER_CELL = tuple((4, *shape) for shape in ((8, 4, 4), (8, 4, 4), (8, 2, 2), (16, 2, 2), (16, 1, 1), (24, 1, 1)))
RAISED = {
    "batch on the way up": (ONE, ResidualShapes(LARGER, (4, 24, 6, 5)), {"batch"}),
    "batch at one cell": (CELL, ResidualShapes(LARGER_CELL, (4, 24, 1, 1)), {"batch"}),
    "rank": (ONE, ResidualShapes(tuple((1, 1, *shape[1:]) for shape in LARGER), (1, 1, 24, 6, 5)), {"rank"}),
    "rank of one": (
        Geometry(1, 6, 7, 7),
        ResidualShapes(
            ((1, 8, 6, 7), (1, 1, 8, 6, 7), (1, 8, 3, 4), (1, 16, 3, 4), (1, 16, 2, 2), (1, 24, 2, 2)), (1, 24, 2, 2)
        ),
        {"rank"},
    ),
    "batch as a feature": (ONE, ResidualShapes(((4, 8, 12, 10), (4, 16, 6, 5), (4, 24, 6, 5)), None), set()),
}
"""For the thin UNet: tables that fail as none of the mistakes does that are made of its right one, and the kind of their fault;
the last has two, which no candidate has."""


@pytest.fixture(scope="module")
def failures(lab):
    """By kind and stage of a failure: the size, the table that fails so, the kinds of its faults, and the failure."""
    it = lab("thin")
    made = [
        (it.at, faults[0].residuals, {fault.kind for fault in faults})
        for faults in list_faults(ResidualTable.of(it.contract, it.at))
    ]
    first = {}
    for at, table, kinds in (*made, *RAISED.values()):
        if (failure := simulate_call(lay_out_unet(it.contract, at), table)) is not None:
            first.setdefault((failure.kind, failure.stage), (at, table, kinds, failure))
    return first


def test_every_kind_of_failure_is_foretold_word_by_word(lab, failures):
    it = lab("thin")
    assert set(failures) == {
        *(("broadcast", stage) for stage in ("down", "mid", "feature", "up")),
        *((kind, "up") for kind in ("concat", "norm", "groups", "rank", "index", "upsample", "reshape")),
        ("output", "feature"),
    }
    for kind, (at, table, _, failure) in failures.items():
        assert format_message(failure) == it.says(table, at), kind
        if kind != ("output", "feature"):  # on the meta device PyTorch writes these shapes otherwise, which is not foretold
            assert format_message(failure, meta=True) == it.says(table, at, on="meta"), kind


def check_what_is_foretold(it, search, on):
    """Draw sizes and faults, and hold what is foretold against what the UNet says."""

    @search
    @given(data=st.data())
    def check(data):
        at = Geometry(data.draw(st.integers(1, 2)), data.draw(st.integers(4, 21)), data.draw(st.integers(4, 21)), 7)
        fault = data.draw(spoilt(it.config, at.batch, at.height, at.width, tuple(set(KINDS) - {"swap", "stride"})))
        failure = simulate_call(lay_out_unet(it.contract, at), ResidualShapes(fault.downs, fault.mid))
        foretold = None if failure is None else format_message(failure, meta=on == "meta")
        assert foretold == it.says(ResidualShapes(fault.downs, fault.mid), at, on=on)

    check()


@layers(40, 100, 1000)
def test_outcome_and_words_are_those_of_a_real_unet(lab, search):
    check_what_is_foretold(lab("thin"), search, "real")


@layers(8, 30, 600)
def test_outcome_and_words_are_those_of_a_unet_without_values(lab, search):
    check_what_is_foretold(lab("thin"), search, "meta")


@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_larger_than_the_text_s_is_foretold_too(lab, batch):
    it, at = lab("thin"), Geometry(1, 24, 20, 7)
    received = right_shapes(it.contract, Geometry(batch, 24, 20, 7))
    failure = simulate_call(lay_out_unet(it.contract, at), received)
    text = it.says(received, at)
    assert (failure.stage, format_message(failure)) == ("up", text)
    assert any(each.fault.residuals == received for each in candidates(it.explained(text, at)))


# text alone


def candidates(diagnosis):
    return [each for reading in diagnosis.explanations for answer in reading.answers for each in answer.candidates]


@pytest.mark.parametrize("name", [pytest.param(name, marks=LAYERS.get(name, pytest.mark.full)) for name in TOPOLOGIES])
def test_the_candidates_are_exactly_the_faults_that_give_the_text(lab, name):
    it = lab(name)
    table = ResidualTable.of(it.contract, it.at)
    given_by = defaultdict(set)
    for faults in list_faults(table, Hints((640,), (), (3,))):
        given_by[it.says(faults[0].residuals)].add(faults[0].residuals)
    assert len(given_by.pop(None)) >= 3
    assert len(given_by) > 20
    for text, tables in given_by.items():
        tables_of_candidates = {each.fault.residuals for each in candidates(it.explained(text))}
        assert tables <= tables_of_candidates, text
        assert all(it.says(table) == text for table in tables_of_candidates - tables), text


@layers(20, 100, 1000)
def test_the_true_fault_is_among_the_candidates_at_its_slot(lab, search):
    it = lab("thin")

    @search
    @given(data=st.data())
    def check(data):
        fault = data.draw(spoilt(it.config, AT.batch, AT.height, AT.width, KINDS))
        text = it.says(ResidualShapes(fault.downs, fault.mid))
        assume(text is not None)
        true = [each for each in candidates(it.explained(text)) if fault.kind in {one.kind for one in each.faults}]
        assert any(
            one.fault.residuals == ResidualShapes(fault.downs, fault.mid) or fault.kind in ("stride", "width") for one in true
        )

    check()


def kinds_of(text, it):
    """The kinds of the faults that are found for a text where no size is known."""
    return {fault.kind for one in candidates(explain_text(text, {"it": it.contract}, RequestedSize())) for fault in one.faults}


def test_without_a_size_every_size_is_looked_at(lab, failures):
    it = lab("thin")
    for kind, (_, _, kinds, failure) in failures.items():
        assert kinds <= kinds_of(format_message(failure), it), kind
    for kind in (("broadcast", "down"), ("broadcast", "up"), ("concat", "up")):
        _, _, kinds, failure = failures[kind]
        assert kinds <= kinds_of(format_message(failure, meta=True), it), kind


def test_without_a_size_a_text_from_an_odd_size_is_explained_too(lab):
    text = "The size of tensor a (7) must match the size of tensor b (6) at non-singleton dimension 2"
    assert "floor" in kinds_of(text, lab("thin"))  # at 13 cells; half of 14 is 7 whichever way it is rounded


@pytest.mark.parametrize("on", ["real", "meta"])
@layers(6, 30, 300)
def test_without_a_size_the_true_fault_is_found(lab, search, on):
    it = lab("thin")

    @search
    @given(data=st.data())
    def check(data):
        at = Geometry(data.draw(st.integers(1, 3)), *data.draw(st.sampled_from([(24, 20), (17, 25), (9, 33), (16, 16)])), 7)
        fault = data.draw(spoilt(it.config, at.batch, at.height, at.width, KINDS))
        text = it.says(ResidualShapes(fault.downs, fault.mid), at, on=on)
        assume(text is not None)
        assert fault.kind in kinds_of(text, it)

    check()


def test_a_traceback_narrows_to_its_place(lab):
    it = lab("thin")
    downs, mid = right_shapes(it.contract, AT).downs, right_shapes(it.contract, AT).mid
    text = it.says(ResidualShapes(downs, (*mid[:1], 8, *mid[2:])))
    alone = candidates(it.explained(text))
    lines = {
        "down": "down_block_res_sample = down_block_res_sample + down_block_additional_residual",
        "mid": "sample = sample + mid_block_additional_residual",
    }
    seen = {}
    for stage, line in lines.items():
        traceback = f'Traceback (most recent call last):\n  File "unet_2d_condition.py", line 1, in forward\n    {line}\n{text}'
        seen[stage] = candidates(it.explained(traceback))
        assert {each.failure.stage for each in seen[stage]} == {stage}
        assert {each.fault.residuals for each in seen[stage]} <= {each.fault.residuals for each in alone}
    assert len(seen["down"]) + len(seen["mid"]) == len(alone)


def test_the_famous_text_is_slots_0_to_3_of_sd15():
    diagnosis = explain_text(FAMOUS, {"sd15": presets.contract("sd15")}, RequestedSize())
    (reading,) = diagnosis.explanations
    (answer,) = reading.answers
    shown = {(each.failure.slot, each.fault.kind) for each in answer.candidates}
    assert {slot for slot, _ in shown} == {f"down_block_residual_{number:02d}" for number in range(4)}
    assert shown >= {(f"down_block_residual_{number:02d}", kind) for number in range(4) for kind in ("blocks", "width")}
    tables = {each.fault.residuals.downs: each.failure.slot for each in answer.candidates}
    at = lambda *widths: tuple((1, width, 64, 64) for width in widths)  # noqa: E731
    assert tables[at(320, 640, 1280, 1280)] == "down_block_residual_01"
    assert tables[at(640, 1280, 1280, 1280)] == "down_block_residual_00"


@pytest.mark.full
def test_the_famous_text_is_foretold_at_real_size():
    """SD1.5 itself, on the meta device: the mappings that lead to the famous text do."""
    contract = presets.contract("sd15")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(presets.load("sd15").config)).eval()
    (answer,) = explain_text(FAMOUS, {"sd15": contract}, RequestedSize()).explanations[0].answers
    for each in answer.candidates:
        table = each.fault.residuals
        said = text_of(unet, 1, 64, 64, table.downs, table.mid, text_width=768)
        assert said == format_message(simulate_call(lay_out_unet(contract, Geometry(1, 64, 64)), table), meta=True)
        assert "of length 640 at -3" in said


# what has nothing to do with slots


SUM = "RuntimeError: The size of tensor a (320) must match the size of tensor b (640) at non-singleton dimension 1"
OTHER = {
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB": "memory",
    "FileNotFoundError: [Errno 2] No such file or directory: 'unet.onnx'": "missing",
    "RuntimeError: Error(s) in loading state_dict for UNet: size mismatch for conv_in.weight: copying a param": "weights",
    f'File "lora.py", line 9, in forward\n{SUM}': "LoRA",
    "ModuleNotFoundError: No module named 'xformers'": "package",
    SUM.replace("320", "77").replace("640", "78"): "no slot",
    "IndexError: list index out of range": "nothing of residuals",
    "": "nothing of residuals",
    "It works now, thanks!": "nothing of residuals",
    f'Traceback (most recent call last):\n  File "/x/diffusers/models/vae.py", line 9, in forward\n{SUM}': "vae.py",
    f"    sample = sample + controlnet_cond\n{SUM}": "ControlNet's image",
}


@pytest.mark.parametrize(("text", "about"), OTHER.items())
def test_other_texts_are_answered_so(text, about):
    result = shapecheck(text)
    assert result.exit_code == 1, result.output
    assert result.stdout.startswith("NO DIAGNOSIS: ")
    assert about in " ".join(result.stdout.split())
    assert "down_block" not in result.stdout


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_has_an_answer(name):
    """How soon is measured by bench/explain.py."""
    diagnosis = explain_text(HOSTILE[name], {"sd15": presets.contract("sd15")}, RequestedSize())
    assert diagnosis.explanations or diagnosis.reason


PARTS = ("size of tensor a (", "320", ")", "[1, ", "must match the size of tensor b", "Axis 2")


@layers(20, 100, 1000)
def test_any_text_has_an_answer(search):
    @search
    @given(st.text() | st.lists(st.sampled_from(PARTS)).map("".join))
    def check(text):
        diagnosis = explain_text(text, {"sd15": presets.contract("sd15")}, RequestedSize((8, 8), 1))
        assert diagnosis.explanations or diagnosis.reason

    check()


def test_binary_files_have_an_answer(tmp_path):
    file = tmp_path / "core"
    file.write_bytes(bytes(range(256)) * 20_000 + FAMOUS.encode())
    assert shapecheck(str(file)).exit_code == 0  # the end of a log counts


# a table given


@layers(25, 100, 1000)
def test_the_true_fault_of_a_table_is_first(lab, search):
    it = lab("thin")

    @search
    @given(data=st.data())
    def check(data):
        fault = data.draw(spoilt(it.config, AT.batch, AT.height, AT.width, KINDS))
        table = ResidualShapes(fault.downs, fault.mid)
        judgement = judge_residuals(table, ("it",), it.contract, AT)
        said = it.says(table)
        assert judgement.is_silent == (said is None and table != right_shapes(it.contract, AT))
        if judgement.failure is not None:
            assert format_message(judgement.failure) == said
        if not judgement.is_right:
            assert judgement.matches[0].differs == 0
            assert fault.kind in {each.kind for each in judgement.matches[0].faults}

    check()


@layers(25, 100, 1000)
def test_the_true_fault_of_a_preset_s_table_is_first(search):
    @search
    @given(data=st.data())
    def check(data):
        name = data.draw(st.sampled_from(["sd15", "sdxl", "koala-700m", "bk-sdm-tiny", "sdxl-refiner"]))
        contract = presets.contract(name)
        at = Geometry(data.draw(st.integers(1, 3)), data.draw(st.integers(9, 130)), data.draw(st.integers(9, 130)))
        fault = data.draw(spoilt(dict(contract.config), at.batch, at.height, at.width, KINDS))
        judgement = judge_residuals(ResidualShapes(fault.downs, fault.mid), (name,), contract, at)
        assert judgement.is_right or fault.kind in {each.kind for each in judgement.matches[0].faults}

    check()


@pytest.mark.parametrize(("unet", "given_of"), [("sd15", "sdxl"), ("sdxl", "sd15"), ("koala-700m", "sdxl-refiner")])
def test_another_family_s_table_is_named(unet, given_of):
    at = Geometry(1, 72, 56)
    judgement = judge_residuals(right_shapes(presets.contract(given_of), at), (unet,), presets.contract(unet), at)
    assert judgement.matches[0].fault.kind == "family"
    assert given_of in judgement.matches[0].fault.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mapping", "320@64", "--controlnet", "sd15"], "give one of them"),
        (["--controlnet", "sd15"], "name the UNet"),
        (["x", "--model", "nowhere"], "nowhere is not a preset"),
        (["x", "--model", "controlnet-sd15"], "is a ControlNet"),
        (["x", "--size", "513x512"], "not a multiple of 8"),
        (["x", "--size", "512x512", "--latent", "64x64"], "give one of them"),
        (["x", "--model", "kandinsky-2.2", "--latent", "9x9"], "multiples of"),
        ([], "give an error TEXT"),
    ],
)
def test_what_cannot_be_meant_is_status_2(arguments, message):
    result = shapecheck(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output.replace("\n", " ")


# the command


def shapecheck(*arguments: str, **options):
    return CliRunner().invoke(main, ["explain", *arguments], **options)


def test_standard_input_files_and_words_are_the_same(tmp_path):
    (tmp_path / "log.txt").write_text(f"noise\n{FAMOUS}\nnoise", encoding="utf-8")
    reports = {
        shapecheck(FAMOUS, "--model", "sd15").stdout,
        shapecheck("-", "--model", "sd15", input=FAMOUS).stdout,
        shapecheck(str(tmp_path / "log.txt"), "--model", "sd15").stdout,
    }
    assert len(reports) == 1
    assert "On sd15, 34 faults give exactly this text, at slots 0, 1, 2, 3" in reports.pop()


def test_json_has_every_candidate_and_its_table():
    record = json.loads(shapecheck(FAMOUS, "--model", "sd15", "--format", "json").stdout)
    assert (record["verdict"], record["tried"]) == ("diagnosis", ["sd15"])
    (answer,) = record["symptoms"][0]["answers"]
    assert len(answer["candidates"]) == 34
    assert answer["right"]["down_block_residual_03"] == [1, 320, 32, 32]
    swap = next(each for each in answer["candidates"] if each["fault"] == "swap")
    assert swap["touched"] == ["down_block_residual_03", "down_block_residual_04"]
    assert swap["mapping"]["down"][3] == [1, 640, 32, 32]


def test_markdown_is_markdown(tmp_path):
    result = shapecheck(FAMOUS, "--model", "sd15", "--format", "markdown", "-o", str(tmp_path / "report.md"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (result.exit_code, result.stdout) == (0, "")
    assert text.startswith("# PyTorch: ")
    assert "| fault   | what was done" in text


def test_presets_are_tried_without_torch():
    code = (
        "import sys; from click.testing import CliRunner; from shapecheck.cli import main;"
        f"r = CliRunner().invoke(main, ['explain', {FAMOUS!r}]); assert r.exit_code == 0 and 'sdxl' in r.stdout;"
        "assert not {'torch', 'diffusers', 'numpy', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_controlnet_by_name_is_held_against_the_unet():
    result = shapecheck("--model", "sd15", "--controlnet", "controlnet-sdxl-small", "--latent", "40x56", "--format", "json")
    mapping = json.loads(result.stdout)["mapping"]
    assert (mapping["verdict"], mapping["faults"][0]["fault"]) == ("raises", "family")
    fits = json.loads(shapecheck("--model", "sd15", "--controlnet", "controlnet-sd15", "--format", "json").stdout)
    assert fits["mapping"]["verdict"] == "right"


ONE_SIDE = (
    "Got invalid dimensions for input: down_block_residual_03 for the following indices\n index: 3 Got: 96 Expected: 48\n",
    (
        "[!] Input tensor: down_block_residual_03 | Received incompatible shape: (2, 320, 64, 48).\n    Note: Expected a shape "
        "compatible with: BoundedShape(['B', 320, 'H', 96], min=None, max=None)"
    ),
)


def test_one_side_of_a_shape_finds_the_sizes_of_both():
    sd15 = presets.contract("sd15")
    for text, count in zip(ONE_SIDE, (39, 1), strict=True):
        (reading,) = explain_text(text, {"sd15": sd15}, RequestedSize(None, None)).readings
        candidates = candidate_geometries(reading.symptom, sd15, Geometry(1, 64, 64), size_known=False, batch_known=False)
        assert len(candidates) == 16
        assert [len(answer.candidates) for answer in reading.answers] == [count]


def test_a_side_that_no_latent_has_says_nothing_of_the_size():
    sd15, usual = presets.contract("sd15"), Geometry(1, 64, 64)
    for side in (-1, 0, 2**15):
        symptom = Symptom("dimensions", "PyTorch", "", expected_shape=(1, 320, side, 48))
        candidates = candidate_geometries(symptom, sd15, usual, size_known=False, batch_known=False)
        assert Geometry(1, 48, 48) in candidates, side
    reshape = Symptom("reshape", "PyTorch", "", expected_shape=(1, 320, 48, 24, 48))
    candidates = candidate_geometries(reshape, sd15, usual, size_known=False, batch_known=False)
    assert Geometry(1, 24, 48) in candidates


NAMED = (
    (
        "Required inputs (['down_block_0', 'down_block_10', 'mid_block_residual']) are missing from the input feed (",
        "missing",
        "down_block_residual_10",
    ),
    (
        "Got invalid dimensions for input: input_control_03 for the following indices\n index: 1 Got: 640 Expected: 320\n",
        "dimensions",
        "down_block_residual_03",
    ),
    ("Invalid input name: down_block_residual_03", "unknown", "down_block_residual_03"),
    ("Invalid input name: down_block_12", "unknown", ""),
    (
        "while setting input shape for down_block_0. Set dimensions are [2,640,64,64]. Expected dimensions are [-1,320,-1,-1].",
        "dimensions",
        "down_block_residual_00",
    ),
    (
        (
            "Set dimension [2,320,96,96] for tensor down_block_residual_01 does not satisfy any optimization profiles.\n"
            "Valid range for profile 0: [1,320,64,64]..[4,320,64,64]."
        ),
        "range",
        "down_block_residual_01",
    ),
    (
        (
            "Supplied binding dimension [2,4,67,120] for bindings[0] exceed min ~ max range at index 2, maximum dimension "
            "in profile is 64, minimum dimension in profile is 64, but supplied dimension is 67."
        ),
        "range",
        "sample",
    ),
    ("ValueError: No valid profile found. Please go to the TensorRT tab", "range", ""),
    ("Address is not set for input tensor input_control_00. Call", "missing", "down_block_residual_00"),
    ("Cannot find binding of given name: mid_block_residual", "unknown", "mid_block_residual"),
    (
        (
            "[!] Input tensor: down_block_0 | Received incompatible shape: (2, 640, 8, 8).\n    Note: Expected a shape "
            "compatible with: BoundedShape(['B', 320, 'H', 'W'], min=None, max=None)"
        ),
        "dimensions",
        "down_block_residual_00",
    ),
    ("Trying to create tensor with negative dimension -1: [-1, 320, -1, -1]", "missing", "down_block_residual_00"),
    ("AttributeError: 'tuple' object has no attribute 'pop'", "container", "mid_block_residual"),
    (
        "FutureWarning: Passing intrablock residual connections with `down_block_additional_residuals` is deprecated",
        "mid",
        "mid_block_residual",
    ),
    ("mat1 and mat2 shapes cannot be multiplied (154x1024 and 768x320)", "input", "encoder_hidden_states"),
    ("expected input[2, 9, 64, 64] to have 4 channels, but got 9 channels instead", "input", "sample"),
    ("mixed dtype (CPU): expect parameter to have scalar type of Float", "dtype", ""),
    ("ValueError: unknown mid_block_type : None", "from_unet", ""),
    ("axis 2 dimensions must be equal for concatenation on axis 1. Condition '==' violated: 87 != 88.", "odd size", ""),
    ("Sizes of tensors must match except in dimension 1. Expected size 24 but got size 23", "odd size", ""),
)


@pytest.mark.parametrize(("text", "kind", "where"), NAMED)
def test_what_a_text_names_is_told_by_name(text, kind, where):
    diagnosis = explain_text(text, {"sd15": presets.contract("sd15")}, RequestedSize())
    causes = [cause for reading in diagnosis.explanations for cause in reading.causes]
    cause = next(cause for cause in causes if cause.kind == kind)
    assert where in (cause.where, *cause.slots)
    assert re.search(rf"^cause +{re.escape(cause.message[:40])}", report.render_text(diagnosis), re.MULTILINE)


def test_what_a_text_names_is_told_of_every_preset_by_the_command():
    text, kind, where = NAMED[0]
    result = shapecheck(text, "--format", "json")
    assert result.exit_code == 0, result.output
    (cause,) = [cause for symptom in json.loads(result.stdout)["symptoms"] for cause in symptom["causes"]]
    assert (cause["kind"], where in cause["slots"]) == (kind, True)


def test_symptoms_carry_what_is_said():
    (one,) = find_symptoms(flatten_text(f"{FAMOUS}\n{FAMOUS}"))
    assert (one.kind, one.axis, one.expected, one.actual) == ("broadcast", 1, 320, 640)
    (formula,) = find_symptoms(
        "The size of tensor a ((((s18 - 1)//2)) + 1) must match the size of tensor b (s45) at non-singleton dimension 3)"
    )
    assert (formula.stride, formula.expected, formula.actual) == (2, None, None)
    (pair,) = find_symptoms("warning control could not be applied torch.Size([8, 1280, 12, 8]) torch.Size([8, 1280, 24, 16])")
    assert (pair.expected_shape, pair.actual_shape) == ((8, 1280, 12, 8), (8, 1280, 24, 16))


def test_comfyui_s_warning_is_every_slot_where_the_two_shapes_meet():
    text = "warning control could not be applied torch.Size([2, 640, 32, 32]) torch.Size([2, 640, 64, 64])"
    shown = candidates(explain_text(text, {"sd15": presets.contract("sd15")}, RequestedSize((64, 64))))
    assert {each.failure.slot for each in shown} == {"down_block_residual_04", "down_block_residual_05"}
    assert {"constant", "stride"} <= {each.fault.kind for each in shown}
