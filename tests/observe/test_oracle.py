"""An independent closed form against what shapecheck observes, for drawn configs, planted faults and recorded models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import strategies
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from strategies import LARGE, MIDDLING, SMALL, Config, Fault, Limits

import shapecheck
from shapecheck import Contract, ContractError, Geometry, ShapecheckError, presets
from shapecheck.contract import Dim
from shapecheck.observe import sizes

FACTS = json.loads((Path(__file__).parents[1] / "support" / "data" / "slot_tables.json").read_text(encoding="utf-8"))
PRESET_OF = {"sdxl_base": "sdxl", "sd21_768v": "sd21"}
"""Recorded names that differ from the preset's by more than their dashes."""

SIDES = st.integers(17, 99)
PROPERTY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes, and what is drawn is small
)


@dataclass(frozen=True, slots=True)
class Length:
    """How many examples a property is tried on, how large, and whether they are the same in every run."""

    examples: int
    most: Limits
    derandomize: bool = True


def at_length(quick: int, full: int, nightly: int) -> pytest.MarkDecorator:
    """A few small examples always (none where other tests show it), more and larger ones with the marks of that name."""
    lengths = [
        pytest.param(Length(full, MIDDLING), id="full", marks=pytest.mark.full),
        pytest.param(Length(nightly, LARGE, derandomize=False), id="nightly", marks=pytest.mark.nightly),
    ]
    if quick:
        lengths.insert(0, pytest.param(Length(quick, SMALL), id="quick"))
    return pytest.mark.parametrize("length", lengths)


def for_all(length: Length, **drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Run the decorated check on that many examples."""
    chosen = settings(PROPERTY, max_examples=length.examples, derandomize=length.derandomize, print_blob=not length.derandomize)
    return lambda check: chosen(given(**drawn)(check))()


# the oracle itself


@at_length(6, 25, 100)
def test_oracle_is_what_diffusers_does(length):
    """Slots and refusals against the real modules, with shapecheck out of the way."""

    @for_all(length, config=strategies.unet_configs(length.most), height=SIDES, width=SIDES)
    def check(config, height, width):
        with skips_of(build_unet(config)) as (unet, seen):
            ran = runs(unet, height, width)
        assert seen == list(oracle.shapes(config, 2, height, width).values())
        assert ran is not oracle.refuses(config, height, width)


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.nightly)])
def test_oracle_divisor_is_the_smallest_that_is_never_refused(examples):
    @for_all(Length(examples, LARGE), config=strategies.unet_configs())
    def check(config):
        divisor = oracle.divisor(config)
        assert not any(oracle.refuses(config, height, 64) for height in range(0, 256, divisor))
        assert divisor == 1 or any(oracle.refuses(config, height, 64) for height in range(0, 256, divisor // 2))


@pytest.mark.parametrize("name", FACTS)
def test_oracle_gives_the_recorded_tables(name):
    fact = FACTS[name]
    expected = oracle.slots(fact["config"])
    for slot, row in zip(expected[:-1], fact["slots"][:-1], strict=True):
        assert (slot.producer, slot.channels, slot.stride) == (row["producer"], row["channels"], row["stride"])
    assert [list(slot.shape(2, 65, 97)[1:]) for slot in expected] == fact["at_65x97"]
    mid = fact["slots"][-1]
    assert list(expected[-1].shape(2, *fact["native_latent"])) == mid["shape"]
    assert expected[-1].producer.startswith(mid["producer"].removesuffix(" (mid_block is None)"))


@pytest.mark.parametrize("name", FACTS)
def test_saved_contracts_give_the_recorded_tables(name):
    fact, contract = FACTS[name], saved(name)
    for slot, row in zip(contract.slots[:-1], fact["slots"][:-1], strict=True):
        assert (slot.producer, slot.channels, slot.stride) == (row["producer"], row["channels"], row["stride"])
    assert [list(shape[1:]) for shape in contract.shapes(Geometry(2, 65, 97)).values()] == fact["at_65x97"]
    mid = fact["slots"][-1]
    assert list(contract.shapes(Geometry(2, *fact["native_latent"]))[oracle.MID]) == mid["shape"]
    assert contract.slots[-1].producer.startswith(mid["producer"].removesuffix(" (mid_block is None)"))


@pytest.mark.parametrize("name", sorted(presets.contracts()))
def test_saved_contracts_agree_with_the_oracle(name):
    contract = presets.contract(name)
    agree(contract, contract.config, 3, 65, 97)


# what is drawn


FEATURES: dict[str, Callable[[Config], object]] = {
    **{kind: lambda config, kind=kind: kind in config["down_block_types"] for kind in strategies.MIRRORED},
    **{kind: lambda config, kind=kind: kind in config["up_block_types"] for kind in strategies.MIRRORED.values()},
    **{f"mid {mid}": lambda config, mid=mid: config["mid_block_type"] == mid for mid in strategies.MID_TYPES},
    **{f"{levels} levels": lambda config, levels=levels: len(config["down_block_types"]) == levels for levels in range(1, 6)},
    **{f"divisor {each}": lambda config, each=each: oracle.divisor(config) == each for each in (1, 2, 4, 8, 16)},
    "a list of layers": lambda config: isinstance(config["layers_per_block"], list),
    "a list of heads": lambda config: isinstance(config["attention_head_dim"], list),
    "narrower further down": lambda config: config["block_out_channels"][-1] < config["block_out_channels"][0],
    "a mixed chain": lambda config: len(set(oracle.slots(config)[-1].halvings)) == 2,
    "no padding": lambda config: config["downsample_padding"] == 0,
    "a centred sample": lambda config: config["center_input_sample"],
    "text and time": lambda config: config.get("addition_embed_type") == "text_time",
    "class labels": lambda config: config.get("class_embed_type") == "identity",
    "an implied ControlNet": oracle.implies_controlnet,
    "no implied ControlNet": lambda config: not oracle.implies_controlnet(config),
}  # fmt: skip


@pytest.mark.full
def test_drawn_configs_have_every_feature():
    missing = set(FEATURES)

    @for_all(Length(500, LARGE), config=strategies.unet_configs())
    def check(config):
        missing.difference_update([feature for feature, has in FEATURES.items() if has(config)])

    assert not missing


# shapecheck against the oracle


@at_length(5, 20, 80)
def test_observed_contract_agrees_with_the_oracle(length):
    @for_all(length, config=strategies.unet_configs(length.most), height=SIDES, width=SIDES)
    def check(config, height, width):
        contract = shapecheck.probe(build_unet(config))
        agree(contract, config, 3, height * contract.divisor, width * contract.divisor)
        assert len(contract.header.controlnets) == oracle.implies_controlnet(config)


@pytest.mark.parametrize(
    ("ups", "divisor"),
    [
        (["UpBlock2D"] * 5, 1),
        (["ResnetUpsampleBlock2D"] + ["UpBlock2D"] * 4, 16),
        pytest.param(["AttnUpBlock2D"] * 5, 16, marks=pytest.mark.full),
    ],
    ids=["any size", "refused at the deepest", "refused at each"],
)
def test_five_levels_agree_with_the_oracle(ups, divisor):
    config = plain_config(["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D", "DownBlock2D"])
    config |= {"up_block_types": ups, "mid_block_type": None, "layers_per_block": [1, 2, 1, 1, 2]}
    contract = shapecheck.probe(build_unet(config))
    assert contract.divisor == divisor
    agree(contract, config, 2, 336, 464)


def test_divisor_is_where_a_written_out_unet_stops_refusing():
    config = plain_config(["DownBlock2D", "DownBlock2D"]) | {"up_block_types": ["ResnetUpsampleBlock2D", "UpBlock2D"]}
    stops_refusing(config, (31, 45), 2)


def test_a_rounding_that_no_size_shows_is_not_made_up():
    """Of a UNet that never runs at an odd size nobody knows how it would round."""
    sides = (16, 24)
    assert sizes.derive_rules("h", sides, [(8, 12)]) == {sides: Dim("h"), (8, 12): Dim("h", 1, ("exact",))}
    sides = (17, 24)
    assert sizes.derive_rules("h", sides, [(8, 12), (9, 12), (5, 8)]) == {
        sides: Dim("h"),
        (9, 12): Dim("h", 1, ("ceil",)),
        (8, 12): Dim("h", 1, ("floor",)),
    }


@at_length(0, 8, 40)
def test_divisor_is_where_the_real_unet_stops_refusing(length):
    refusing = strategies.unet_configs(length.most).filter(lambda config: oracle.divisor(config) > 1)

    @for_all(length, config=refusing, sides=st.tuples(SIDES, SIDES))
    def check(config, sides):
        stops_refusing(config, sides, oracle.divisor(config))


def stops_refusing(config: Config, sides: tuple[int, int], divisor: int) -> None:
    unet = build_unet(config)
    contract = shapecheck.probe(unet)
    assert contract.divisor == divisor
    half = divisor // 2
    height, width = (half * (2 * (side // 2) + 1) for side in sides)  # odd multiples of half the divisor
    assert runs(unet, 2 * height, 2 * width)
    assert not runs(unet, height, width)
    with pytest.raises(ShapecheckError, match=f"both must be multiples of {divisor}$"):
        contract.shapes(Geometry(2, height, width))


@at_length(2, 12, 60)
def test_a_unet_agrees_with_its_own_controlnet(length):
    @for_all(length, config=strategies.unet_configs_with_controlnet(length.most), height=SIDES, width=SIDES)
    def check(config, height, width):
        unet = build_unet(config)
        contract = shapecheck.probe(unet, build_controlnet(unet))
        agree(contract, config, 1, height * contract.divisor, width * contract.divisor)
        assert [net.class_name for net in contract.header.controlnets] == ["ControlNetModel"]


WRITTEN_OUT = {
    "layer fewer": ({"layers_per_block": 2}, {"layers_per_block": 1}),
    "layer more": ({}, {"layers_per_block": 2}),
    "width changed": ({}, {"block_out_channels": [8, 16]}),
    "padding changed": ({}, {"downsample_padding": 0}),
    "level dropped": ({}, {"down_block_types": ["DownBlock2D"], "block_out_channels": [8]}),
}
"""Of a plain UNet of two levels: what is otherwise in the UNet, and what in its ControlNet."""


@pytest.mark.parametrize("fault", strategies.FAULTS)
def test_written_out_fault_is_told_slot_by_slot(fault):
    of_unet, changes = WRITTEN_OUT[fault]
    told_slot_by_slot(Fault(plain_config(["DownBlock2D"] * 2) | of_unet, changes))


@at_length(0, 5, 30)
@pytest.mark.parametrize("fault", strategies.FAULTS)
def test_planted_fault_is_told_slot_by_slot(fault, length):
    for_all(length, planted=strategies.FAULTS[fault](length.most))(told_slot_by_slot)


def told_slot_by_slot(planted: Fault) -> None:
    expected = oracle.wrong_slots(planted.unet, planted.unet | planted.changes)
    assert expected, "the fault changes no slot"
    unet = build_unet(planted.unet)
    controlnet = build_controlnet(unet, planted.changes)
    with pytest.raises(ContractError, match="mismatch") as caught:
        shapecheck.probe(unet, controlnet)
    assert {each.where for each in caught.value.mismatches if each.kind != "input"} == expected
    agree(caught.value.contract, planted.unet, 1, 64, 96)


def test_a_mixed_chain_is_neither_ceil_nor_floor_of_the_whole():
    """33→16→8 and 39→19→10 in one UNet: an average pool, then a padded convolution."""
    config = plain_config(["ResnetDownsampleBlock2D", "DownBlock2D", "DownBlock2D"])
    contract = shapecheck.probe(build_unet(config))
    assert contract.slot(oracle.MID).roundings == ("floor", "ceil")
    mid_of = {side: contract.shapes(Geometry(1, side, 64))[oracle.MID][2] for side in (33, 39)}
    half_of = {side: contract.shapes(Geometry(1, side, 64))["down_block_residual_02"][2] for side in (33, 39)}
    assert (half_of, mid_of) == ({33: 16, 39: 19}, {33: 8, 39: 10})
    agree(contract, config, 2, 39, 33)


# the two sides of every comparison


def agree(contract: Contract, config: oracle.Config, batch: int, height: int, width: int) -> None:
    """Every statement of the contract about its slots against the closed form."""
    expected = oracle.slots(config)
    observed = [(slot.name, slot.channels, slot.stride, slot.producer, slot.up_block) for slot in contract.slots]
    assert observed == [(slot.name, slot.channels, slot.stride, slot.producer, slot.up_block) for slot in expected]
    assert contract.divisor == oracle.divisor(config)
    height, width = (side - side % contract.divisor for side in (height, width))
    shapes = contract.shapes(Geometry(batch, height, width))
    assert shapes == oracle.shapes(config, batch, height, width)


def plain_config(downs: list[str]) -> Config:
    return {
        "down_block_types": downs,
        "up_block_types": ["UpBlock2D"] * len(downs),
        "mid_block_type": "UNetMidBlock2D",
        "block_out_channels": [8 + 4 * level for level in range(len(downs))],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 8,
    }


def saved(fact: str) -> Contract:
    return presets.contract(PRESET_OF.get(fact, fact.replace("_", "-")))


def build_unet(config: Config) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config).eval()


def build_controlnet(unet: UNet2DConditionModel, changes: Config | None = None) -> ControlNetModel:
    """The ControlNet diffusers makes for this UNet, or that with parts of its config changed."""
    with torch.device("meta"):
        implied = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        return ControlNetModel.from_config({**implied.config, **changes}).eval() if changes else implied.eval()


def runs(unet: UNet2DConditionModel, height: int, width: int) -> bool:
    """Whether the bare UNet runs at this latent size; anything but a clash of sizes is an error here."""
    try:
        with torch.no_grad(), torch.device("meta"):
            unet(torch.zeros(2, unet.config.in_channels, height, width), torch.zeros(2), **conditioning(unet.config))
    except RuntimeError as error:
        assert "Sizes of tensors must match" in str(error)
        return False
    return True


def conditioning(config: Config) -> dict[str, Any]:
    """Text, class labels and added embeddings of batch 2 for a drawn config."""
    given = {"encoder_hidden_states": torch.zeros(2, 7, config["cross_attention_dim"])}
    time_width = 4 * config["block_out_channels"][0]
    labels = {"timestep": (2,), "identity": (2, time_width), "projection": (2, config["projection_class_embeddings_input_dim"])}
    if config["class_embed_type"]:
        given["class_labels"] = torch.zeros(labels[config["class_embed_type"]])
    elif config["num_class_embeds"]:
        given["class_labels"] = torch.zeros(2, dtype=torch.int64)
    if config["addition_embed_type"] == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        given["added_cond_kwargs"] = {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}
    return given


@contextmanager
def skips_of(unet: UNet2DConditionModel) -> Iterator[tuple[UNet2DConditionModel, list[tuple[int, ...]]]]:
    """Collect, in slot order, the shapes of what the UNet keeps for its up blocks, and of what it hands to the first."""
    seen: list[tuple[int, ...]] = []

    def see(*tensors: torch.Tensor) -> None:
        seen.extend(tuple(tensor.shape) for tensor in tensors)

    with ExitStack() as hooks:
        hooks.callback(unet.conv_in.register_forward_hook(lambda module, args, output: see(output)).remove)
        for block in unet.down_blocks:
            hooks.callback(block.register_forward_hook(lambda module, args, output: see(*output[1])).remove)
        entered = unet.up_blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: see(kwargs["hidden_states"]), with_kwargs=True
        )
        hooks.callback(entered.remove)
        yield unet, seen
