"""The records: dimensions, geometries, contracts and their JSON, and the comparison with given shapes."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from shapecheck import Contract, ContractError, Geometry, ShapecheckError, presets
from shapecheck.contract import Config, Dim, Header
from shapecheck.contract.dims import constant
from shapecheck.contract.size_request import SizeRequest
from shapecheck.observe import request as requests
from shapecheck.observe.report import render_text
from shapecheck.presets.families import find_families

ODD = Geometry(2, 13, 21)
SD15 = presets.contract("sd15")
RIGHT = {  # by hand: SD1.5 at 13×21 latents, batch 2
    "down_block_residual_00": (2, 320, 13, 21),
    "down_block_residual_01": (2, 320, 13, 21),
    "down_block_residual_02": (2, 320, 13, 21),
    "down_block_residual_03": (2, 320, 7, 11),
    "down_block_residual_04": (2, 640, 7, 11),
    "down_block_residual_05": (2, 640, 7, 11),
    "down_block_residual_06": (2, 640, 4, 6),
    "down_block_residual_07": (2, 1280, 4, 6),
    "down_block_residual_08": (2, 1280, 4, 6),
    "down_block_residual_09": (2, 1280, 2, 3),
    "down_block_residual_10": (2, 1280, 2, 3),
    "down_block_residual_11": (2, 1280, 2, 3),
    "mid_block_residual": (2, 1280, 2, 3),
}

halvings = st.lists(st.sampled_from(["ceil", "floor", "exact"]), max_size=6).map(tuple)
dims = st.builds(Dim, st.sampled_from(["batch", "h", "w", "tokens"]), st.integers(1, 64), halvings) | st.builds(
    constant, st.integers(0, 10**6)
)


# dimensions


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (constant(320), "320"),
        (Dim("h"), "h"),
        (Dim("w", 8), "8*w"),
        (Dim("h", 1, ("ceil", "ceil")), "ceil(h/4)"),
        (Dim("w", 1, ("floor", "ceil")), "ceil(floor(w/2)/2)"),
        (Dim("h", 8, ("exact", "floor", "floor")), "floor(8*h/2/4)"),
    ],
)
def test_a_dimension_reads_as_people_write_it(dim, text):
    assert str(dim) == text
    assert Dim.parse(text) == dim


@settings(deadline=None)
@given(dims)
def test_every_dimension_survives_its_text(dim):
    assert Dim.parse(str(dim)) == dim


@settings(deadline=None)
@given(st.lists(st.sampled_from(["ceil", "floor"]), max_size=5), st.integers(1, 10_000))
def test_a_chain_of_halvings_is_worked_out_step_by_step(roundings, size):
    expected = size
    for rounding in roundings:
        expected = math.ceil(expected / 2) if rounding == "ceil" else math.floor(expected / 2)
    assert Dim("h", 1, tuple(roundings)).at({"h": size}) == expected


def test_an_unknown_rounding_is_not_guessed():
    dim = Dim("h", 1, ("exact",))
    assert dim.at({"h": 12}) == 6
    with pytest.raises(ValueError, match="h/2 is not known for h=13: 13 is odd"):
        dim.at({"h": 13})


@pytest.mark.parametrize(
    "text", ["", "h/3", "ceil(h/0)", "ceil(320/2)", "-1", "ceil(h/2", "h w", "__import__('os')", "(" * 10_000]
)
def test_what_is_no_dimension_is_refused(text):
    with pytest.raises(ValueError, match=r"not a (dimension|chain of halvings)"):
        Dim.parse(text)


# geometries


def test_a_geometry_in_pixels_is_width_times_height():
    assert Geometry.from_px(904, 512, batch=3) == Geometry(3, 64, 113)
    assert Geometry.from_px(512, 256, vae_factor=4) == Geometry(1, 64, 128)


def test_a_size_that_is_no_multiple_names_the_nearest():
    with pytest.raises(ShapecheckError, match=r"904x510 pixels: height 510 is not a multiple of 8 .*nearest: 504, 512"):
        Geometry.from_px(904, 510)


@pytest.mark.parametrize("sizes", [(0, 8, 8), (1, -8, 8), (1, 8, 8.0), (True, 8, 8)])
def test_a_geometry_is_made_of_whole_positive_numbers(sizes):
    with pytest.raises(ShapecheckError, match="whole number of at least 1"):
        Geometry(*sizes)


# the contract


def test_shapes_are_those_worked_out_by_hand():
    assert SD15.shapes(ODD) == RIGHT
    assert (
        SD15.input_shapes(ODD)
        == {
            "sample": (2, 4, 13, 21),
            "timestep": (2,),
            "encoder_hidden_states": (2, 77, 768),
        }
        | RIGHT
    )


def test_sdxl_takes_its_conditioning_as_inputs():
    inputs = presets.contract("sdxl").input_shapes(Geometry(2, 13, 21, tokens=5))
    assert inputs["encoder_hidden_states"] == (2, 5, 2048)
    assert (inputs["text_embeds"], inputs["time_ids"]) == ((2, 1280), (2, 6))
    assert presets.contract("sdxl-refiner").input_shapes(ODD)["time_ids"] == (2, 5)


def test_a_divisor_is_kept():
    kandinsky = presets.contract("kandinsky-2.2")
    assert kandinsky.divisor == 8
    assert kandinsky.shapes(Geometry(1, 16, 24))["mid_block_residual"] == (1, 1536, 2, 3)
    with pytest.raises(ShapecheckError, match=r"refuses latents of 16×20: both must be multiples of 8"):
        kandinsky.shapes(Geometry(1, 16, 20))


def test_an_unknown_slot_lists_the_known():
    with pytest.raises(ShapecheckError, match=r"no slot 'down_12'.*down_block_residual_00.*mid_block_residual"):
        SD15.slot("down_12")


@pytest.mark.parametrize("name", sorted(presets.contracts()))
def test_json_gives_the_same_contract_back(name):
    contract = presets.contract(name)
    again = Contract.from_json(contract.to_json())
    assert again == contract
    assert again.header == contract.header
    assert again.digest == contract.digest
    assert hash(again) == hash(contract)


def test_the_header_is_no_part_of_equality_and_the_config_is():
    other = replace(SD15, header=Header(source="elsewhere", versions=(("torch", "9"),)))
    assert other == SD15
    assert other.digest == SD15.digest
    config = Config(SD15.config.to_json() | {"sample_size": 96})
    assert replace(SD15, config=config) != SD15
    assert replace(SD15, config=config).digest != SD15.digest


def test_line_numbers_are_no_part_of_equality():
    slot = SD15.slots[0]
    moved = replace(slot, adds=(replace(slot.adds[0], line=7),))
    assert replace(SD15, slots=(moved, *SD15.slots[1:])) == SD15
    assert replace(SD15, slots=(moved, *SD15.slots[1:])).digest == SD15.digest
    assert replace(SD15, slots=SD15.slots[1:]).digest != SD15.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record | {"divisor": 8}, "an edited contract: its digest is sha256:"),
        (lambda record: record | {"shapecheck_contract": 99}, "contract of schema 99; this release reads schema 1"),
        (lambda record: record | {"slots": [{}]}, r"a damaged contract: slots\[0\]: no key 'name'"),
        (lambda record: record | {"inputs": None}, "a damaged contract: inputs: expected a list, got None"),
        (lambda record: {"model": "sd15"}, "no key 'shapecheck_contract'"),
        (lambda record: [1], "no key 'shapecheck_contract'"),
        (lambda record: record | {"shapecheck_contract": True}, "contract of schema True"),
        (lambda record: record | {"divisor": 1.5}, "expected a whole number of at least 1, got 1.5"),
        (lambda record: record | {"divisor": 0}, "expected a whole number of at least 1, got 0"),
        (lambda record: record | {"inputs": {}}, "expected a list, got {}"),
        (lambda record: record | {"config": None}, "expected an object, got None"),
        *[
            (lambda record, change=change: record | {"header": record["header"] | change}, said)
            for change, said in [
                ({"vae_factor": 0}, "of at least 1, got 0"),
                ({"vae_factor": "8"}, "of at least 1, got '8'"),
                ({"native": [64]}, r"header.native: expected a list of 2, got \[64\]"),
                ({"native": 64}, "expected a list, got 64"),
                ({"parameters": 0.5}, "of at least 0, got 0.5"),
                ({"notes": "a note"}, "expected a list, got 'a note'"),
                ({"versions": {"torch": 2}}, "expected text, got 2"),
                ({"source": None}, "expected text, got None"),
                ({"controlnets": [{}]}, r"header.controlnets\[0\]: no key 'source'"),
            ]
        ],
    ],
)
def test_what_is_no_contract_is_refused(change, message):
    with pytest.raises(ShapecheckError, match=message):
        Contract.from_json(json.dumps(change(json.loads(SD15.to_json()))))


@pytest.mark.parametrize("text", [None, b"{}", Path("contract.json")])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(ShapecheckError, match=f"not a contract: expected JSON text, got {type(text).__name__}"):
        Contract.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00\xff", "1" * (5 * 2**20)])
def test_text_that_is_no_json_is_refused(text):
    with pytest.raises(ShapecheckError, match="not a contract"):
        Contract.from_json(text)


def test_a_config_is_frozen_and_hashable():
    config = Config({"b": [1, [2, {"c": 3}]], "_class_name": "X", "a": None})
    assert dict(config) == {"a": None, "b": (1, (2, Config({"c": 3})))}
    assert config.to_json() == {"a": None, "b": [1, [2, {"c": 3}]]}
    assert hash(config) == hash(Config({"a": None, "b": (1, (2, {"c": 3}))}))


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0, False), (0.0, -0.0), ([1], [[1]])])
def test_configs_are_equal_where_their_digests_are(one, other):
    first, second = (replace(SD15, config=Config({"key": value})) for value in (one, other))
    assert first != second
    assert first.digest != second.digest
    assert first == replace(SD15, config=Config({"key": one}))
    assert len({first.config, second.config, Config({"key": one})}) == 2


def test_a_config_of_nan_equals_itself():
    assert Config({"key": float("nan")}) == Config({"key": float("nan")})


class Odd:
    """A setting as live modules have them."""

    __hash__ = None


def test_what_json_does_not_know_is_kept_as_text():
    values = {"quantization": Odd(), "kinds": {"b", "a"}, "path": Path("x"), "deep": [{"of": Path("y")}], 5: None}
    config = Config(values)
    assert config["quantization"] == f"<{__name__}.Odd object>"
    assert config["kinds"] == ("a", "b")
    assert (config["path"], config["deep"][0]["of"], config["5"]) == ("x", "y", None)
    assert hash(config) == hash(Config(values | {"quantization": Odd()}))
    contract = replace(SD15, config=config)
    assert Contract.from_json(contract.to_json()) == contract


# families


FACTS = json.loads((Path(__file__).parents[1] / "support" / "data" / "slot_tables.json").read_text(encoding="utf-8"))
WRITTEN_OUT = {
    "sdxl": {"attention_head_dim": [5, 10, 20], "layers_per_block": [2, 2, 2], "only_cross_attention": [False] * 3},
    "sd15": {"attention_head_dim": [8] * 4, "cross_attention_dim": [768] * 4, "layers_per_block": [2] * 4},
    "ssd-1b": {"transformer_layers_per_block": [1, [2, 2], [4, 4]]},
    "segmind-vega": {"transformer_layers_per_block": [[1, 1], [1, 1], [2, 2]]},
}


@pytest.mark.parametrize("name", sorted(presets.contracts()))
def test_a_preset_is_of_its_own_family(name):
    assert name in find_families(presets.contract(name))


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_number_written_out_per_level_is_that_number(name):
    contract = presets.contract(name)
    changed = replace(contract, config=Config(contract.config.to_json() | WRITTEN_OUT[name]))
    assert (changed == contract, find_families(changed)) == (False, find_families(contract))
    other = replace(contract, config=Config(contract.config.to_json() | {"attention_head_dim": 7}))
    assert find_families(other) == ()


PRESET_OF = {name: {"sdxl_base": "sdxl", "sd21_768v": "sd21"}.get(name, name.replace("_", "-")) for name in FACTS}


@pytest.mark.parametrize("name", FACTS)
def test_a_recorded_config_is_of_the_family_it_is_named_after(name):
    """A recorded config lacks what is diffusers' default."""
    arguments = inspect.signature(UNet2DConditionModel.__init__).parameters.values()
    defaults = {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}
    contract = presets.contract(PRESET_OF[name])
    recorded = replace(contract, config=Config(defaults | FACTS[name]["config"]))
    assert PRESET_OF[name] in find_families(recorded)
    wider = FACTS[name]["config"] | {
        "block_out_channels": [64 + width for width in FACTS[name]["config"]["block_out_channels"]]
    }
    assert find_families(replace(contract, config=Config(defaults | wider))) == ()


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd15_inpaint", "sd_turbo", "ssd_1b", "koala_700m", "sdxl_turbo"])
def test_what_is_observed_of_a_recorded_config_is_of_its_family_too(name, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FACTS[name]["config"] | {"_class_name": "UNet2DConditionModel"}), encoding="utf-8")
    finding = requests.run_probe(requests.ProbeRequest(str(config)), progress=lambda _: None)
    assert PRESET_OF[name] in find_families(finding.contract)


# given shapes


class Shaped:
    """Anything with a shape, as a tensor has."""

    def __init__(self, shape):
        self.shape = shape


@pytest.mark.parametrize(
    "form",
    [
        lambda table: table,
        lambda table: list(table.values()),
        lambda table: (list(table.values())[:-1], table["mid_block_residual"]),
        lambda table: ([Shaped(each) for each in list(table.values())[:-1]], Shaped(table["mid_block_residual"])),
        lambda table: {name: Shaped(shape) for name, shape in table.items()},
        lambda table: {name: tuple(map(np.int64, shape)) for name, shape in table.items()},
        lambda table: [tuple(map(torch.tensor, shape)) for shape in table.values()],
        lambda table: ControlNetOutput(
            down_block_res_samples=tuple(torch.empty(each, device="meta") for each in list(table.values())[:-1]),
            mid_block_res_sample=torch.empty(table["mid_block_residual"], device="meta"),
        ),
    ],
)
@pytest.mark.parametrize("geometry", [ODD, None])
def test_right_shapes_have_no_mismatch_in_any_form(form, geometry):
    assert SD15.mismatches(form(RIGHT), geometry) == ()
    assert SD15.verify(form(RIGHT), geometry) is None


@pytest.mark.parametrize(
    ("where", "shape", "kind", "cause"),
    [
        ("down_block_residual_03", (2, 640, 7, 11), "channels", "this is the shape of down_block_residual_04 and 1 more"),
        ("down_block_residual_05", (2, 640, 11, 7), "size", "height and width are exchanged"),
        ("down_block_residual_06", (2, 640, 3, 5), "rounding", "another rounding"),
        ("down_block_residual_08", (2, 1280, 1, 1), "broadcast", "only pooled slots"),
        ("down_block_residual_09", (1, 1280, 2, 3), "batch", "broadcasts a batch of 1"),
        ("mid_block_residual", (1280, 2, 3), "rank", "3 axes"),
        ("mid_block_residual", (2, 1280, 4, 6), "size", "this is the shape of down_block_residual_07 and 1 more"),
    ],
)
def test_one_wrong_shape_is_one_mismatch(where, shape, kind, cause):
    (found,) = SD15.mismatches(RIGHT | {where: shape}, ODD)
    assert (found.where, found.kind, found.observed, found.expected) == (where, kind, shape, RIGHT[where])
    assert cause in found.cause
    assert found.unet_module == SD15.slot(where).producer


def test_every_fault_is_told_at_once():
    given = RIGHT | {"down_block_residual_00": (2, 4, 13, 21), "extra": (2, 1, 1, 1)}
    del given["down_block_residual_11"], given["mid_block_residual"]
    found = SD15.mismatches(given, ODD)
    assert [(each.where, each.kind) for each in found] == [
        ("down_block_residual_00", "channels"),
        ("down_block_residual_11", "missing"),
        ("mid_block_residual", "missing"),
        ("extra", "surplus"),
    ]
    with pytest.raises(ContractError, match="4 mismatches") as caught:
        SD15.verify(given, ODD)
    assert caught.value.mismatches == found
    assert caught.value.contract is SD15
    assert "down_block_residual_11 (UNet down_blocks.3.resnets.1): missing: got nothing, expected 2×1280×2×3" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (None, "not as NoneType"),
        ("abc", "not as str"),
        (5, "not as int"),
        ({"mid_block_residual": 5}, "mid_block_residual: expected a tensor or a shape such as .* got 5"),
        ({"mid_block_residual": (1, 2.5)}, r"mid_block_residual: .* got \(1, 2.5\)"),
        ([1, 2, 3], "down_block_residual_00: expected a tensor or a shape"),
        ((5, 6), "down_block_residual_00: expected a tensor or a shape"),
    ],
)
def test_what_are_no_shapes_is_refused(shapes, said):
    with pytest.raises(ShapecheckError, match=said):
        SD15.mismatches(shapes, ODD)


def test_a_residual_that_is_none_is_missing():
    (found,) = SD15.mismatches(RIGHT | {"down_block_residual_04": None}, ODD)
    assert (found.where, found.kind) == ("down_block_residual_04", "missing")


def test_shapes_at_a_size_the_unet_refuses_are_refused():
    with pytest.raises(ShapecheckError, match="both must be multiples of 8"):
        presets.contract("kandinsky-2.2").mismatches(([], None), ODD)


def test_a_contract_without_slots_takes_nothing():
    empty = replace(SD15, slots=())
    assert empty.mismatches(([], None), ODD) == ()
    assert [each.kind for each in empty.mismatches(RIGHT, ODD)] == ["surplus"] * 13
    with pytest.raises(ShapecheckError, match="a contract without slots gives no size to check against; pass geometry="):
        empty.verify(RIGHT)
    text = render_text(empty, (), ODD)
    assert "UNET ALONE: 0 slots" in text
    assert "Slots\n\nnone" in text


def test_no_residuals_at_all_is_thirteen_missing():
    assert len(SD15.mismatches(([], None), ODD)) == 13
    with pytest.raises(ShapecheckError, match="pass geometry="):
        SD15.mismatches(([], None))


@settings(deadline=None)
@given(st.data())
def test_any_change_of_any_shape_is_found(data):
    where = data.draw(st.sampled_from(sorted(RIGHT)))
    axis = data.draw(st.integers(0, 3))
    changed = list(RIGHT[where])
    changed[axis] += data.draw(st.integers(1, 9))
    (found,) = SD15.mismatches(RIGHT | {where: tuple(changed)}, ODD)
    assert found.where == where


# requested sizes


USUAL = (Geometry(2, 17, 25), Geometry(1, 24, 40))
SQUARE = {"h": (8, 16, 40), "w": (8, 16, 40)}


@pytest.mark.parametrize(
    ("requested", "divisor", "expected"),
    [
        (SizeRequest(), 1, USUAL),
        (SizeRequest((), 8), 1, (Geometry(2, 24, 32), Geometry(1, 24, 40))),
        (SizeRequest((), 3), 2, (Geometry(2, 18, 30), Geometry(1, 24, 42))),
        (SizeRequest(({"batch": (1, 2, 4)},)), 1, (Geometry(1, 17, 25), Geometry(2, 24, 40), Geometry(4, 17, 25))),
        (SizeRequest(({"tokens": (7, 7, 7)},)), 1, (Geometry(2, 17, 25, 7), Geometry(1, 24, 40, 7))),
        (SizeRequest((SQUARE,)), 1, (Geometry(1, 8, 8), Geometry(1, 16, 16), Geometry(1, 40, 40), Geometry(1, 25, 25))),
        (SizeRequest((SQUARE,), 8), 1, (Geometry(1, 8, 8), Geometry(1, 16, 16), Geometry(1, 40, 40), Geometry(1, 24, 24))),
        (SizeRequest.at(Geometry(3, 9, 11, 5)), 1, (Geometry(3, 9, 11, 5),)),
        (SizeRequest(({"batch": (4, 4, 4)},)).with_latent(9, 11), 1, (Geometry(4, 9, 11),)),
    ],
)
def test_what_is_not_requested_is_as_usual(requested, divisor, expected):
    assert requested.list_geometries(USUAL, divisor) == expected
