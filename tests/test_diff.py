"""Two contracts side by side: everything that differs is told, nothing else is, and what it means is true."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest
import small
import torch
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shapecheck import ContractError, presets, probe
from shapecheck.cli import main
from shapecheck.contract import AddSite, Config, Contract, Dim
from shapecheck.contract.dims import constant
from shapecheck.diff import Difference, explain_differences, list_differences, render_json, render_text
from shapecheck.diff import NamedContract as Named

SD15 = presets.contract("sd15")
UNLIKE = ("sd15", "sd21", "sd15-inpaint", "sd-x4-upscaler", "kandinsky-2.2", "sdxl", "sdxl-refiner", "ssd-1b", "koala-700m")
"""Presets that differ in kind: widths, inputs, levels, layers, roundings, divisors."""
ALIKE = (("sd15", "lcm-dreamshaper-v7"), ("sd21", "sd21-base"), ("sd21", "sd-turbo"), ("sdxl", "sdxl-turbo"))
PAIRS = [*combinations(UNLIKE, 2), *ALIKE, ("sd15", "sd15")]


def shapecheck(*arguments: str):
    return CliRunner().invoke(main, ["diff", *arguments])


def side(name: str) -> Named:
    return Named(name, presets.contract(name))


# what differs


def in_the_json(a: Contract, b: Contract) -> set[tuple[str, str]]:
    """What differs by the saved JSON alone: (part, name). The oracle."""
    left, right = (json.loads(each.to_json()) for each in (a, b))
    found = {("model", key) for key in ("divisor", "role") if left[key] != right[key]}
    found |= {("model", "class")} if left["class_name"] != right["class_name"] else set()
    for part in ("inputs", "slots"):
        tables = [{each.pop("name"): without_lines(each) for each in record[part]} for record in (left, right)]
        found |= {
            (part[:-1], name) for name in tables[0].keys() | tables[1].keys() if tables[0].get(name) != tables[1].get(name)
        }
    absent = object()
    keys = left["config"].keys() | right["config"].keys()
    return found | {("setting", key) for key in keys if left["config"].get(key, absent) != right["config"].get(key, absent)}


def without_lines(member: dict) -> dict:
    for site in member.get("adds", ()):
        del site["file"], site["line"]
    return member


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_what_differs_is_what_differs_in_the_saved_json(a, b):
    first, second = presets.contract(a), presets.contract(b)
    found = list_differences(first, second)
    assert {(each.part, each.name) for each in found} == in_the_json(first, second)
    assert bool(found) == (first.digest != second.digest)
    back = {replace(each, a=each.b, b=each.a) for each in list_differences(second, first)}
    assert back == set(found)


def of_slot(**changes) -> st.SearchStrategy[tuple[Contract, tuple[str, str]]]:
    """SD1.5 with one slot changed in one thing."""
    return st.sampled_from(range(len(SD15.slots))).map(
        lambda at: (
            replace(SD15, slots=(*SD15.slots[:at], replace(SD15.slots[at], **changes), *SD15.slots[at + 1 :])),
            ("slot", SD15.slots[at].name),
        )
    )


def of_input(**changes) -> st.SearchStrategy[tuple[Contract, tuple[str, str]]]:
    return st.sampled_from(range(len(SD15.inputs))).map(
        lambda at: (
            replace(SD15, inputs=(*SD15.inputs[:at], replace(SD15.inputs[at], **changes), *SD15.inputs[at + 1 :])),
            ("input", SD15.inputs[at].name),
        )
    )


SKIPS = [
    (Dim("batch"), constant(321), *SD15.slots[0].skip[2:]),
    (Dim("batch"), constant(7), Dim("h", 1, ("floor",)), Dim("w", 1, ("ceil", "ceil"))),
    (Dim("batch", 2), constant(7), Dim("h", 3), Dim("w")),
]
CHANGED = st.one_of(
    *(of_slot(skip=skip) for skip in SKIPS),
    of_slot(producer="elsewhere"),
    of_slot(up_block="up_blocks.9"),
    of_slot(spatial="pooled"),
    of_slot(adds=(AddSite("up_blocks.0", "forward"),)),
    of_input(dtype="float16"),
    of_input(argument="elsewhere"),
    of_input(shape=(Dim("batch"), constant(5))),
    st.sampled_from(sorted(SD15.config)).flatmap(
        lambda key: st.sampled_from([7.5, True, "text", [3, None], {"inner": 1}, None, 1]).map(
            lambda value: (replace(SD15, config=Config({**SD15.config.to_json(), key: value})), ("setting", key))
        )
    ),
    st.sampled_from(sorted(SD15.config)).map(
        lambda key: (
            replace(SD15, config=Config({other: value for other, value in SD15.config.items() if other != key})),
            ("setting", key),
        )
    ),
    st.sampled_from(range(len(SD15.slots))).map(
        lambda at: (replace(SD15, slots=SD15.slots[:at] + SD15.slots[at + 1 :]), ("slot", SD15.slots[at].name))
    ),
    st.just((replace(SD15, config=Config({**SD15.config, "new": 1})), ("setting", "new"))),
    st.just((replace(SD15, divisor=8), ("model", "divisor"))),
    st.just((replace(SD15, class_name="UNet3D"), ("model", "class"))),
    st.just((replace(SD15, role="controlnet"), ("model", "role"))),
    st.just((replace(SD15, inputs=SD15.inputs[::-1]), ("model", "inputs"))),
    st.just((replace(SD15, slots=SD15.slots[::-1]), ("model", "slots"))),
    st.just((replace(SD15, slots=(*SD15.slots, SD15.slots[3])), ("slot", "down_block_residual_03 (2)"))),
)


@settings(max_examples=20, deadline=None)
@given(CHANGED, st.booleans())
@example((replace(SD15, inputs=SD15.inputs[::-1]), ("model", "inputs")), False)
def test_one_thing_that_is_changed_is_told_and_nothing_else(changed, exchanged):
    other, where = changed
    a, b = (other, SD15) if exchanged else (SD15, other)
    found = list_differences(a, b)
    assert {(each.part, each.name) for each in found} == ({where} if other.digest != SD15.digest else set())
    assert all(each.a != each.b for each in found)
    assert bool(found) == (a != b)
    report = json.loads(render_json(Named("a", a), Named("b", b)))
    assert report["verdict"] == ("different" if found else "same")
    assert ("DIFFERENT" if found else "SAME") in render_text(Named("a", a), Named("b", b))
    if found and where[0] == "slot" and found[0].aspect in ("", "channels", "size", "batch", "spatial"):
        assert not (report["controlnet_of_a_fits_b"] or report["controlnet_of_b_fits_a"] or report["same_architecture"])


def test_a_difference_says_what_each_side_has():
    assert list_differences(SD15, presets.contract("sd21"))[:3] == (
        Difference("input", "encoder_hidden_states", "shape", "batch×tokens×768", "batch×tokens×1024"),
        Difference("setting", "attention_head_dim", "", "8", "[5, 10, 20, 20]"),
        Difference("setting", "cross_attention_dim", "", "768", "1024"),
    )
    deepest = list_differences(SD15, presets.contract("sdxl"))
    assert Difference("slot", "down_block_residual_11", "", "batch×1280×ceil(h/8)×ceil(w/8)", None) in deepest
    assert Difference("slot", "mid_block_residual", "size", "ceil(h/8)×ceil(w/8)", "ceil(h/4)×ceil(w/4)") in deepest
    assert Difference("input", "time_ids", "", None, "batch×6 float32") in deepest


def test_the_header_makes_no_difference():
    header = replace(SD15.header, source="elsewhere", vae_factor=4, versions=(("diffusers", "0.35.0"), ("torch", "2.13.0")))
    other = replace(SD15, header=header)
    assert list_differences(SD15, other) == ()
    text = render_text(Named("a", SD15), Named("b", other))
    assert "SAME: 13 slots, 3 base inputs, 48 settings" in text
    assert "note: a latent cell covers 8 pixels along each side in A, 4 in B" in text
    assert "observed with other releases: diffusers" in text


# what it means


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("sd15", "sd21", "does not fit the other: the 13 slots are the same, text width differs: 768 against 1024."),
        (
            "sd21",
            "sd21-base",
            "The same architecture: exports and engines of both take calls of the same shapes; only sample_size",
        ),
        ("sd21", "sd21-base", "A ControlNet made for one fits the other by its shapes: the 13 slots are the same"),
        ("sdxl", "ssd-1b", "A ControlNet made for one fits the other by its shapes: the 10 slots are the same"),
        ("sdxl", "koala-700m", "does not fit the other: 7 of 10 slots differ in shape."),
        ("sd15", "sdxl", "only sdxl takes text_embeds and time_ids."),
        ("sd15", "kandinsky-2.2", "only sd15 takes encoder_hidden_states, only kandinsky-2.2 takes image_embeds."),
        ("sdxl", "sdxl-refiner", "time_ids differs: 6 against 5"),
        ("sd15", "sd15-inpaint", "The UNets take 4 and 9 latent channels: a ControlNet must take what the pipeline gives it"),
        ("sd15", "sd15", "One contract: ControlNets, exports and engines of one have the shapes of the other's."),
    ],
)
def test_what_it_means_is_said(a, b, said):
    assert said in " ".join(explain_differences(side(a), side(b)))


def test_a_controlnet_that_needs_more_than_it_is_given_fits_in_one_direction_only():
    more = presets.contract("sdxl").inputs[-2:]
    wider = replace(SD15, inputs=(*SD15.inputs, *more))
    said = explain_differences(Named("wide", wider), Named("plain", SD15))
    assert said[0] == (
        "A ControlNet made for wide does not fit plain: the 13 slots are the same, but it takes text_embeds and time_ids, "
        "which a pipeline of plain does not give."
    )
    assert said[1] == "A ControlNet made for plain fits wide by its shapes."
    record = json.loads(render_json(Named("wide", wider), Named("plain", SD15)))
    assert (record["controlnet_of_a_fits_b"], record["controlnet_of_b_fits_a"]) == (False, True)


def test_precision_and_places_are_told_apart_from_shapes():
    half = replace(SD15, inputs=tuple(replace(each, dtype="float16") for each in SD15.inputs))
    said = explain_differences(Named("a", half), Named("b", SD15))
    assert said[0].startswith("The same architecture")
    assert said[-1].startswith("The precision differs, float16 against float32")
    moved = replace(SD15, slots=(replace(SD15.slots[0], producer="elsewhere"), *SD15.slots[1:]))
    assert explain_differences(Named("a", SD15), Named("b", moved))[1:] == (
        "The same shapes are made elsewhere in the two: the skips of down_block_residual_00.",
    )


def test_controlnets_and_what_has_no_slots_are_told_as_such():
    net = replace(SD15, role="controlnet", class_name="ControlNetModel")
    assert explain_differences(Named("net", net), Named("unet", SD15)) == (
        "net is a ControlNet, unet a UNet: `shapecheck probe UNET --controlnet NAME` says what fits.",
    )
    wider = replace(net, config=Config({**net.config, "conditioning_channels": 5}))
    assert explain_differences(Named("a", net), Named("b", wider))[-1] == "Both ControlNets give the same 13 residuals."
    fewer = replace(net, slots=net.slots[1:])
    assert explain_differences(Named("a", net), Named("b", fewer)) == (
        "One ControlNet cannot stand in for the other: 1 of 13 slots differ in shape.",
    )
    bare = replace(SD15, slots=())
    assert explain_differences(Named("a", SD15), Named("b", bare)) == ("No ControlNet fits b: there are no slots.",)
    assert json.loads(render_json(Named("a", SD15), Named("b", bare)))["controlnet_of_a_fits_b"] is None


BASE = small.SMALL | small.TINY | {"up_block_types": ("UpBlock2D",), "mid_block_type": "UNetMidBlock2D"}
TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}
MODELS = {
    "plain": BASE,
    "other text": BASE | {"cross_attention_dim": 16},
    "text and time": BASE | small.TEXT_TIME,
    "two levels": BASE | TWO_LEVELS,
    "rounded down": BASE | TWO_LEVELS | {"downsample_padding": 0},
}


@pytest.mark.parametrize(
    ("one", "other"),
    [("plain", "text and time"), ("plain", "other text"), ("plain", "two levels"), ("two levels", "rounded down")],
)
def test_whether_a_controlnet_fits_is_what_a_run_of_both_says(one, other):
    """The oracle is the probe: the ControlNet that the one implies, run with the other, both ways."""
    with torch.device("meta"):
        first, second = (small.unet(**MODELS[name]) for name in (one, other))
        (b, forth), (a, back) = run(first, second), run(second, first)
    record = json.loads(render_json(Named("", a), Named("", b)))
    assert (record["controlnet_of_a_fits_b"], record["controlnet_of_b_fits_a"]) == (forth, back)


def run(made_for, held_to) -> tuple[Contract, bool]:
    """The contract of a UNet, and whether the ControlNet made for another one agrees with it."""
    net = made_for if isinstance(made_for, str) else small.controlnet(made_for)
    try:
        return probe(held_to, net), True
    except ContractError as error:
        return error.contract, False


@pytest.mark.full
@pytest.mark.parametrize(("made_for", "held_to"), [("sdxl", "ssd-1b")])
def test_the_same_of_well_known_models(made_for, held_to):
    assert json.loads(render_json(side(made_for), side(held_to)))["controlnet_of_a_fits_b"] is run(made_for, held_to)[1]


# the command


def test_the_command_says_it_in_every_form_and_by_its_exit_status(tmp_path):
    human = shapecheck("sd15", "sd21")
    assert human.exit_code == 1
    assert human.stdout.splitlines()[2] == human.stdout.splitlines()[-1] == "DIFFERENT: 1 base input, 5 settings"
    assert max(map(len, shapecheck("sd15", "sdxl").stdout.splitlines())) <= 150
    markdown = shapecheck("sd15", "sd21", "--format", "markdown").stdout
    assert markdown.startswith("# sd15 against sd21\n\n**DIFFERENT")
    assert "| setting | cross_attention_dim" in markdown
    file = tmp_path / "diff.json"
    assert shapecheck("sd15", "sd21", "--format", "json", "-o", str(file)).exit_code == 1
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["b"]["families"] == ["sd-turbo", "sd21", "sd21-base"]
    assert {"part": "setting", "name": "sample_size", "aspect": "", "a": "64", "b": "96"} in record["differences"]
    same = shapecheck("sd15", "sd15")
    assert (same.exit_code, same.stdout.splitlines()[-1]) == (0, "SAME: 13 slots, 3 base inputs, 48 settings")


def test_a_model_is_compared_with_the_contract_that_was_saved_of_it(tmp_path):
    folder, saved = tmp_path / "model", tmp_path / "contract.json"
    small.unet(**BASE).save_config(folder)
    assert CliRunner().invoke(main, ["probe", str(folder), "--format", "json", "-o", str(saved)]).exit_code == 0
    assert shapecheck(str(folder), str(saved)).exit_code == 0
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 20}), encoding="utf-8")
    changed = shapecheck(str(folder), str(saved), "--format", "json")
    assert changed.exit_code == 1
    found = {(each["part"], each["name"]): (each["a"], each["b"]) for each in json.loads(changed.stdout)["differences"]}
    assert found == {
        ("input", "encoder_hidden_states"): ("batch×tokens×20", "batch×tokens×12"),
        ("setting", "cross_attention_dim"): ("20", "12"),
    }


def test_what_others_wrote_into_a_contract_steers_no_terminal(tmp_path):
    saved = tmp_path / "contract.json"
    config = Config({**SD15.config, "evil\x1b[2J": "\x1b[31m\u202e<b>|", "long": "x" * 5000})
    saved.write_text(replace(SD15, config=config).to_json(), encoding="utf-8")
    for form in ("human", "markdown"):
        text = shapecheck("sd15", str(saved), "--format", form).stdout
        assert "evil" in text
        assert all(each.isprintable() or each == "\n" for each in text)
        assert len(text) < 8000
    assert "\\<b>\\|" in shapecheck("sd15", str(saved), "--format", "markdown").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sd15", "sd16"), "did you mean sd21 or sd15"),
        (("no/such.onnx", "sd15"), "no/such.onnx"),
        (("sd15", "sd15", "-o", "no/such/folder/x"), "cannot write no/such/folder/x"),
        (("sd15", "controlnet-sd15"), "controlnet-sd15 is a ControlNet"),
    ],
)
def test_what_cannot_be_compared_is_exit_status_2(arguments, message):
    result = shapecheck(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_presets_and_files_are_compared_without_torch():
    code = (
        "import sys; from shapecheck.cli import main\n"
        "try: main(['diff', 'sd15', 'sd21'])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert not {"torch", "diffusers", "onnx"} & set(done.stderr.split())


def test_an_adapter_s_features_are_told_apart_from_slots():
    feature = replace(SD15.slots[2], name="down_intrablock_residual_00")
    taking = replace(SD15, features=(feature,))
    (found,) = list_differences(taking, SD15)
    assert (found.part, found.name, found.b) == ("feature", feature.name, None)
    said = " ".join(explain_differences(Named("A", taking), Named("B", SD15)))
    assert "A takes a T2I-Adapter's features too" in said
    assert "the 13 slots are the same" in said
    assert "same architecture" not in said
    other = replace(SD15, features=(replace(feature, skip=SD15.slots[4].skip),))
    assert "made for one does not fit the other" in explain_differences(Named("A", taking), Named("B", other))[0]
    assert "DIFFERENT: 1 feature" in render_text(Named("A", taking), Named("B", SD15))
