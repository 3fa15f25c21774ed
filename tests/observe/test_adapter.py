"""T2I-Adapters: where a UNet adds their features, and what becomes of the contract, the file and the session with them."""

from __future__ import annotations

import json
from pathlib import Path

import artefacts
import onnx
import onnx_files
import pytest
import small
import torch
from click.testing import CliRunner
from diffusers import MultiAdapter, T2IAdapter, UNet2DConditionModel
from onnx_files import check

from shapecheck import (
    Contract,
    ContractError,
    Geometry,
    ShapecheckError,
    export,
    guard,
    load,
    parity,
    presets,
    probe,
    read_contract,
)
from shapecheck.cli import main
from shapecheck.contract.naming import is_feature, name_feature
from shapecheck.models import lookup
from shapecheck.runtime.contract_session import ContractSession
from shapecheck.runtime.dropin_unet import DropInUNet
from shapecheck.tensorrt.profiles import Range, profile_of

FEATURES = [name_feature(number) for number in range(4)]
LIKE_SDXL = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 1,
}
"""No attention in the first block, and a feature for the mid block, as in SDXL."""
LIKE_SD15 = small.SHALLOW | {"up_block_types": ("UpBlock2D", "UpBlock2D"), "mid_block_type": "UNetMidBlock2D"}
"""Attention in the first block, which adds a feature before it halves."""
PLAIN = LIKE_SD15 | {"down_block_types": ("DownBlock2D", "DownBlock2D")}
"""No attention: the first feature is added after the first block has halved."""


def adapter(*channels: int, xl: bool = False) -> T2IAdapter:
    torch.manual_seed(2)
    kind = "full_adapter_xl" if xl else "full_adapter"
    return T2IAdapter(3, list(channels), 1, 16 if xl else 8, kind).eval()


def weightless(**changes) -> UNet2DConditionModel:
    with torch.device("meta"):
        return small.unet(**changes)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return weightless(**LIKE_SD15)


@pytest.fixture(scope="module")
def fitting(unet) -> Contract:
    return probe(unet, adapter=adapter(8, 16))


@pytest.fixture(scope="module")
def like_sdxl() -> UNet2DConditionModel:
    return weightless(**LIKE_SDXL)


@pytest.fixture(scope="module")
def contract(like_sdxl) -> Contract:
    return probe(like_sdxl, adapter=adapter(8, 16, 24, 24, xl=True))


def test_a_feature_is_added_before_a_block_halves(fitting):
    first, last = fitting.features
    assert (first.name, first.producer, first.stride, first.adds[0].owner) == (
        "down_intrablock_residual_00", "down_blocks.0.attentions.0", 1, "down_blocks.0"
    )  # fmt: skip
    assert (last.name, last.producer, last.stride, last.up_block) == (
        "down_intrablock_residual_01", "down_blocks.1.resnets.0", 2, "mid_block"
    )  # fmt: skip
    assert fitting.header.adapter == "T2IAdapter"
    assert fitting.header.notes == ()


def test_after_it_halves_where_there_is_no_attention_and_after_the_mid_block(contract):
    producers = ["down_blocks.0.downsamplers.0", "down_blocks.1.attentions.0", "down_blocks.2.attentions.0", "mid_block"]
    assert [each.producer for each in contract.features] == producers
    assert [each.up_block for each in contract.features] == [
        "down_blocks.1", "down_blocks.1.downsamplers.0", "mid_block", "up_blocks.0"
    ]  # fmt: skip
    assert contract.feature_shapes(Geometry(3, 13, 18)) == dict(
        zip(FEATURES, [(3, 8, 7, 9), (3, 16, 7, 9), (3, 24, 4, 5), (3, 24, 4, 5)], strict=True)
    )
    assert "multiples of 16 pixels, 2 latent cells" in contract.header.notes[0]


def test_the_slots_are_what_they_are_without_one(like_sdxl, contract):
    alone = probe(like_sdxl)
    assert alone.slots == contract.slots
    assert alone.features == ()
    assert alone != contract
    assert alone.digest != contract.digest


def test_without_features_the_file_is_as_it_was(unet, contract):
    record = json.loads(presets.contract("sd15").to_json())
    assert "features" not in record
    assert "adapter" not in record["header"]
    text = contract.to_json()
    assert Contract.from_json(text) == contract
    assert Contract.from_json(text).header == contract.header
    assert json.loads(text)["features"][0]["skip"] == ["batch", "8", "ceil(h/2)", "ceil(w/2)"]


def test_a_contract_knows_features_by_name_and_as_inputs(contract):
    assert contract.slot(FEATURES[3]).producer == "mid_block"
    at = Geometry(2, 9, 12)
    assert list(contract.input_shapes(at))[-5:] == ["mid_block_residual", *FEATURES]
    assert not contract.shapes(at).keys() & set(FEATURES)
    assert [*map(is_feature, (*FEATURES, "mid_block_residual", "down_intrablock_residual_1"))] == [True] * 4 + [False] * 2


def test_profiles_hold_features_too(contract):
    profile = profile_of(contract, Range(Geometry(1, 8, 8), Geometry(2, 16, 16), Geometry(2, 17, 32)))
    bounds = profile.bounds(FEATURES[2])
    assert bounds.shapes == ((1, 24, 2, 2), (2, 24, 4, 4), (2, 24, 5, 8))


def test_the_adapter_a_unet_implies_is_the_one_that_fits(unet, fitting, like_sdxl, contract):
    assert probe(like_sdxl, adapter=True) == contract
    assert probe(unet, adapter=True) == fitting


def test_a_unet_that_implies_none_says_so():
    unet = weightless(**LIKE_SD15 | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")})
    with pytest.raises(ShapecheckError, match="none of diffusers' T2I-Adapters has features that fit UNet2D"):
        probe(unet, adapter=True)


@pytest.mark.parametrize(
    ("channels", "xl", "found"),
    [
        ((8, 24), False, ("down_intrablock_residual_01", "channels")),
        ((8, 16, 24), False, ("down_intrablock_residual_02", "channels")),
        ((8, 16), True, ("down_intrablock_residual_00", "size")),
    ],
)
def test_one_that_does_not_fit_is_told_feature_by_feature(unet, fitting, channels, xl, found):
    with pytest.raises(ContractError) as caught:
        probe(unet, adapter=adapter(*channels, xl=xl))
    first = caught.value.mismatches[0]
    assert (first.where, first.kind) == found
    assert "adapter adapter.body." in str(caught.value)
    assert caught.value.contract.slots == fitting.slots


def test_more_features_than_places_are_ignored_in_silence_and_told():
    unet = weightless(**small.TINY | {"up_block_types": ("UpBlock2D",), "mid_block_type": "UNetMidBlock2D"})
    with pytest.raises(ContractError, match=r"down_intrablock_residual_02.*: surplus: .* ignores it in silence"):
        probe(unet, adapter=adapter(8, 8, 8))


def test_a_wrong_adapter_and_a_wrong_controlnet_are_told_together(unet):
    with torch.device("meta"):
        net = small.controlnet(small.unet(**PLAIN | {"block_out_channels": (8, 24)}))
    with pytest.raises(ContractError) as caught:
        probe(unet, net, adapter=adapter(8, 24))
    kinds = {each.where: each.kind for each in caught.value.mismatches}
    assert kinds["mid_block_residual"] == kinds["down_intrablock_residual_01"] == "channels"


def test_hooks_go_and_weights_stay(unet):
    module = adapter(8, 16)
    before = [parameter.clone() for parameter in module.parameters()]
    probe(unet, adapter=module)
    assert all(map(torch.equal, before, module.parameters()))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in (*module.modules(), *unet.modules()))


def test_what_a_call_of_the_users_gives_is_followed():
    unet = small.unet(**PLAIN)
    module, net = adapter(8, 16, xl=True), small.controlnet(unet)
    latent, text = torch.randn(2, 4, 10, 14), torch.randn(2, 7, 12)

    def steps(change):
        features = [torch.cat([each * 0.8] * 2) for each in module(torch.rand(1, 3, 80, 112))]
        for _ in range(2):
            downs, mid = net(latent, 1, text, torch.rand(2, 3, 80, 112), return_dict=False)
            unet(latent, 1, text, down_block_additional_residuals=downs, mid_block_additional_residual=mid,
                 down_intrablock_additional_residuals=change(features))  # fmt: skip

    observed = probe(unet, net, adapter=module, run=lambda: steps(list))
    assert [each.producer for each in observed.features] == ["down_blocks.0.downsamplers.0", "down_blocks.1.resnets.0"]
    assert observed.header.handover == ("on their way the residuals go through: repeated in the batch",)
    with pytest.raises(
        ContractError, match=r"down_intrablock_residual_00 .*: channels: .* the shape of down_intrablock_residual_01"
    ):
        probe(unet, net, adapter=module, run=lambda: steps(lambda features: features[::-1]))
    with pytest.raises(ContractError, match=r"down_intrablock_residual_01 .*: missing: got nothing"):
        probe(unet, net, adapter=module, run=lambda: steps(lambda features: features[:1]))


def test_a_half_precision_adapter_is_a_mismatch(unet):
    with pytest.raises(ContractError, match=r"down_intrablock_residual_00 .*: dtype: got bfloat16, expected float32"):
        probe(unet, adapter=adapter(8, 16).to(torch.bfloat16))


def test_what_is_no_adapter_is_refused(unet, tmp_path):
    with pytest.raises(ShapecheckError, match=r"class MultiAdapter is not supported yet: .* of a MultiAdapter give one"):
        probe(unet, adapter=MultiAdapter([adapter(8, 16), adapter(8, 16)]))
    with pytest.raises(ShapecheckError, match=r"controlnet-sd15 is a ControlNet; .* give this one with --controlnet"):
        lookup.find("controlnet-sd15", "adapter")
    with pytest.raises(
        ShapecheckError, match=r"t2iadapter-sd15 is a T2I-Adapter; name the UNet as MODEL and give .* --adapter"
    ):
        lookup.find("t2iadapter-sd15", "unet")
    unet.save_config(tmp_path / "unet")
    with pytest.raises(ShapecheckError, match="is a UNet; --adapter takes a T2IAdapter"):
        lookup.find(str(tmp_path / "unet"), "adapter")
    adapter(8, 16).save_config(tmp_path / "adapter")
    with pytest.raises(ShapecheckError, match="is a T2I-Adapter; name the UNet as MODEL and give this one with --adapter"):
        lookup.find(str(tmp_path / "adapter"), "controlnet")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "T2IAdapter", "channels": [8] * 99}), encoding="utf-8")
    with pytest.raises(ShapecheckError, match="describes 99 levels"):
        lookup.find(str(tmp_path / "config.json"), "adapter")


def test_the_command_says_where_features_land(unet, tmp_path):
    unet.save_config(tmp_path / "unet")
    adapter(8, 16).save_config(tmp_path / "adapter")
    done = CliRunner().invoke(main, ["probe", str(tmp_path), "--adapter", str(tmp_path), "--latent", "9x13"])
    assert done.exit_code == 0
    assert "AGREE: 5 slots and 2 features, both sides observed" in done.stdout
    assert "features at    unet_2d_blocks.py:" in done.stdout
    assert "down_intrablock_residual_01        16       2  1×16×5×7  down_blocks.1.resnets.0" in done.stdout


def test_the_command_refuses_an_adapter_that_does_not_fit(unet, tmp_path):
    unet.save_config(tmp_path / "unet")
    adapter(8, 24).save_config(tmp_path / "adapter")
    done = CliRunner().invoke(main, ["probe", str(tmp_path), "--adapter", str(tmp_path), "--format", "json"])
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert (report["report"]["verdict"], report["report"]["mismatches"][0]["where"]) == ("mismatch", FEATURES[1])
    assert report["report"]["shapes"][FEATURES[1]] == [1, 16, 8, 8]


def test_a_probe_file_names_an_adapter(tmp_path):
    from shapecheck.observe import request as requests

    file = tmp_path / "mine.toml"
    file.write_text('model = "sd15"\nadapter = "t2iadapter-sd15"\n', encoding="utf-8")
    assert requests.read_request(file).adapter == "t2iadapter-sd15"
    refused = CliRunner().invoke(main, ["probe", str(file), "--adapter", "t2iadapter-sd15"])
    assert "says itself what to probe" in refused.stderr


# the file, and the session


@pytest.fixture(scope="module")
def computing() -> UNet2DConditionModel:
    return small.unet(**LIKE_SDXL)


@pytest.fixture(scope="module")
def session(computing, contract) -> DropInUNet:
    """The same checks as of a file, in PyTorch."""
    return DropInUNet(ContractSession.of_module(computing, contract))


@pytest.fixture(scope="module")
def exported(computing) -> Path:
    """A file that every worker reads and none changes."""
    recipe = {"exporter": "shapecheck", "adapter": True, **artefacts.identify(computing)}
    return artefacts.make_once(recipe, lambda folder: export(computing, folder / "unet.onnx", adapter=True)) / "unet.onnx"


def call(contract: Contract, at: Geometry) -> dict[str, torch.Tensor]:
    """A number for everything the contract names."""
    generator = torch.Generator().manual_seed(3)
    given = {name: torch.randn(shape, generator=generator) for name, shape in contract.input_shapes(at).items()}
    return given | {"timestep": torch.linspace(7, 900, at.batch)}


def forward_arguments(given: dict[str, torch.Tensor], *, features: bool = True) -> dict[str, object]:
    named = {name: given[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    downs = [value for name, value in given.items() if name.startswith("down_block_residual")]
    control = {"down_block_additional_residuals": downs, "mid_block_additional_residual": given["mid_block_residual"]}
    beside = {"down_intrablock_additional_residuals": [given[name] for name in FEATURES]} if features else {}
    return named | control | beside


@pytest.mark.full
def test_features_are_inputs_of_the_file(exported, contract):
    held = read_contract(exported)
    assert held == contract
    inputs = {each.name: each for each in onnx.load(exported, load_external_data=False).graph.input}
    assert list(inputs)[-5:] == ["mid_block_residual", *FEATURES]
    shape = inputs["down_intrablock_residual_02"].type.tensor_type.shape.dim
    assert [each.dim_param or each.dim_value for each in shape] == ["batch", 24, "ceil(h/4)", "ceil(w/4)"]


@pytest.mark.full
@pytest.mark.parametrize("at", [Geometry(2, 9, 13, 5), Geometry(1, 16, 12, 5)], ids=str)
def test_the_file_computes_what_pytorch_does(computing, exported, at):
    given = call(read_contract(exported), at)
    session = load(exported)
    with torch.no_grad():
        expected = computing(**forward_arguments(given), return_dict=False)[0]
        without = computing(**forward_arguments(given, features=False), return_dict=False)[0]
    assert relative(session(**forward_arguments(given)).sample, expected) < 1e-5
    assert relative(session(**forward_arguments(given, features=False)).sample, without) < 1e-5
    assert relative(without, expected) > 1e-3


@pytest.mark.full
def test_every_feature_acts_where_it_belongs(computing, exported):
    session, given = load(exported), call(read_contract(exported), Geometry(2, 9, 13, 5))
    for name in FEATURES:
        changed = given | {name: given[name] + 3}
        with torch.no_grad():
            expected = computing(**forward_arguments(changed), return_dict=False)[0]
        assert relative(session(**forward_arguments(changed)).sample, expected) < 1e-5, name


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_callers_list_stays_whole_and_nothing_stays_behind(session):
    given = call(session.contract, Geometry(2, 9, 13, 5))
    arguments = forward_arguments(given)
    features = arguments["down_intrablock_additional_residuals"]
    first = session(**arguments).sample
    assert len(features) == len(FEATURES)
    off = session(**forward_arguments(given, features=False)).sample
    assert torch.equal(session(**arguments).sample, first)
    assert not torch.equal(off, first)
    none = forward_arguments(given) | {"down_intrablock_additional_residuals": [torch.zeros_like(each) for each in features]}
    assert torch.equal(session(**none).sample, off)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda features: [], r"down_intrablock_additional_residuals: missing: got an empty list(.|\n)*give list\(features\)"),
        (lambda features: features[:3], r"down_intrablock_residual_03.*: missing: got nothing"),
        (lambda features: [*features, features[0]], "down_intrablock_residual_04: surplus"),
        (lambda features: features[::-1], r"down_intrablock_residual_00 \(UNet down_blocks.0.downsamplers.0\): channels"),
        (lambda features: [each[:1] for each in features], r"down_intrablock_residual_00 .*: batch"),
        (lambda features: [each.half() for each in features], "down_intrablock_residual_00 .*: dtype"),
    ],
)
def test_features_that_do_not_fit_are_refused_and_the_next_call_is_served(session, change, told):
    arguments = forward_arguments(call(session.contract, Geometry(2, 9, 13, 5)))
    features = arguments["down_intrablock_additional_residuals"]
    with pytest.raises(ContractError, match=told):
        session(**arguments | {"down_intrablock_additional_residuals": change(features)})
    assert session(**arguments).sample.shape == (2, 4, 9, 13)


def test_a_live_unet_in_a_sessions_place_takes_them_too(computing, session):
    given = call(session.contract, Geometry(2, 9, 13, 5))
    with torch.no_grad():
        expected = computing(**forward_arguments(given), return_dict=False)[0]
    assert torch.equal(session(**forward_arguments(given)).sample, expected)


def test_the_guard_lets_features_pass_beside_residuals(computing, contract):
    arguments = forward_arguments(call(contract, Geometry(2, 9, 13, 5)))
    features = arguments["down_intrablock_additional_residuals"]
    with guard(computing, contract), torch.no_grad():
        computing(**arguments)
        assert features == []
        with pytest.raises(ContractError, match="pops T2I-Adapter features"):
            computing(**arguments)


@pytest.mark.full
def test_check_knows_features(exported, tmp_path):
    checked = check(exported)
    assert checked.mismatches == ()
    assert checked.limits.divisor == 1
    assert {each.name: each.slot for each in checked.slots if is_feature(each.name)} == {name: name for name in FEATURES}
    swapped = onnx_files.planted(exported, tmp_path / "swapped.onnx", onnx_files.exchange(FEATURES[2], FEATURES[3]))
    assert {each.where for each in check(swapped).mismatches} == {FEATURES[2], FEATURES[3]}
    dead = onnx_files.planted(exported, tmp_path / "dead.onnx", onnx_files.unconsume(FEATURES[1]))
    assert [(each.where, each.kind) for each in check(dead).mismatches] == [(FEATURES[1], "unused")]
    told = CliRunner().invoke(main, ["check", str(exported)])
    assert told.exit_code == 0
    assert "down_intrablock_residual_03" in told.stdout


@pytest.mark.full
def test_parity_proves_every_feature_and_slot(exported, computing):
    found = parity(computing, onnx=exported, sizes=("72x112",), batch=("2",))
    (side,) = found.sides
    assert found.passes, found
    assert {each.status for each in side.results} == {"passed"}, side.results
    proven = {each.check.where for each in side.results if each.check.kind == "slot"}
    assert proven == {slot.name for slot in found.contract.residuals} > set(FEATURES)


def test_a_controlnet_takes_no_features(tmp_path):
    with pytest.raises(ShapecheckError, match=r"--adapter is for UNets, .* is a ControlNet"):
        export(small.controlnet(small.unet(**small.TINY)), tmp_path / "net.onnx", adapter=True)


@pytest.mark.full
def test_features_without_slots_from_the_command_line(tmp_path):
    small.unet(**small.TINY | {"mid_block_type": "UNetMidBlock2D"}).save_pretrained(tmp_path / "model" / "unet")
    command = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "unet.onnx"), "--adapter", "--no-control", "--verify"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "no slots, named as by shapecheck, and 1 feature of a T2I-Adapter" in done.stdout
    assert "PyTorch and ONNX Runtime agree" in done.stdout
    checked = check(tmp_path / "unet.onnx")
    assert checked.mismatches == ()
    assert len(checked.contract.features) == 1
