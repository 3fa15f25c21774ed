"""ControlNets for several kinds of control in one model: observed and reconciled as any other, and not exported."""

from __future__ import annotations

import json

import pytest
import small
import torch
from click.testing import CliRunner
from diffusers import ControlNetUnionModel, UNet2DConditionModel

from shapecheck import Contract, ContractError, ShapecheckError, export, guard, presets, probe
from shapecheck.cli import main
from shapecheck.models import lookup
from shapecheck.observe.controlnet_fit import find_misfits
from shapecheck.parity.cases import load_controlnet

KINDS = 3
PLAIN = small.SHALLOW | {
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2D",
}
"""Two levels without attention."""


def union(**changes) -> ControlNetUnionModel:
    """As small as the UNet of two levels, and not zero."""
    torch.manual_seed(1)
    left_out = ("sample_size", "up_block_types", "mid_block_type")
    shape = {key: value for key, value in (small.SMALL | PLAIN).items() if key not in left_out}
    fuser = {"num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8, "addition_time_embed_dim": 8}
    embedding = {"conditioning_embedding_out_channels": (8, 8, 8, 8), "num_control_type": KINDS}
    net = ControlNetUnionModel(**shape | fuser | embedding | changes)
    small.fill_zero_convolutions(net)
    return net.eval()


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return small.unet(**PLAIN)


@pytest.fixture(scope="module")
def contract(unet) -> Contract:
    return probe(unet, small.controlnet(unet))


def test_it_fits_the_unet_that_an_ordinary_controlnet_fits(unet, contract):
    observed = probe(unet, union())
    assert observed == contract
    assert observed.header.controlnets[0].class_name == "ControlNetUnionModel"


def test_it_is_summed_with_an_ordinary_one(unet):
    contract = probe(unet, [union(), small.controlnet(unet)])
    assert contract.header.handover == ("the residuals of 2 ControlNets are summed",)


def test_one_of_another_width_is_told_slot_by_slot(unet):
    with pytest.raises(ContractError) as caught:
        probe(unet, union(block_out_channels=(8, 24)))
    found = {(each.where, each.kind) for each in caught.value.mismatches}
    assert {("down_block_residual_03", "channels"), ("mid_block_residual", "channels")} <= found


def test_a_saved_one_is_read_by_its_class(contract, tmp_path):
    union().save_config(tmp_path)
    source = lookup.find(str(tmp_path), "controlnet")
    assert (source.class_name, source.role, source.notes) == ("ControlNetUnionModel", "controlnet", ())
    assert find_misfits(contract, [str(tmp_path)], progress=str) == ()
    with pytest.raises(ShapecheckError, match="is a ControlNet; name the UNet as MODEL"):
        lookup.find(str(tmp_path), "unet")


@pytest.mark.parametrize("named", ["ControlNetModel", "ControlNetModel_Union", None])
def test_configs_older_than_diffusers_class_are_known_by_their_keys(tmp_path, named):
    union().save_config(tmp_path)
    file = tmp_path / "config.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record = {key: value for key, value in record.items() if key != "_class_name"} | ({"_class_name": named} if named else {})
    file.write_text(json.dumps(record), encoding="utf-8")
    source = lookup.find(str(file), "controlnet")
    told = f"_class_name {named}" if named else "no _class_name"
    assert source.class_name == "ControlNetUnionModel"
    assert source.notes == (f"{told} in {file}: taken for a ControlNetUnionModel by its keys",)


def test_a_pipelines_own_is_taken_with_it(unet, tmp_path):
    unet.save_config(tmp_path / "unet")
    union().save_config(tmp_path / "controlnet")
    contract = probe(str(tmp_path))
    assert [each.class_name for each in contract.header.controlnets] == ["ControlNetUnionModel"]


def test_it_is_guarded_by_what_it_emits(unet, contract):
    net, latent, text = union(), torch.randn(2, 4, 9, 13), torch.randn(2, 7, 12)
    picture, kinds = torch.rand(2, 3, 72, 104), torch.eye(KINDS)[[1, 1]]
    with guard(unet, contract, controlnet=net), torch.no_grad():
        downs, mid = net(latent, 1, text, [picture], kinds, [1], return_dict=False)
        unet(latent, 1, text, down_block_additional_residuals=downs, mid_block_additional_residual=mid)
        with pytest.raises(ContractError, match=r"down_block_residual_01.*: order: got down_block_residual_00"):
            swapped = [downs[0], downs[0], *downs[2:]]
            unet(latent, 1, text, down_block_additional_residuals=swapped, mid_block_additional_residual=mid)


def test_its_residuals_can_be_those_of_a_parity_run(tmp_path):
    net = union()
    net.save_pretrained(tmp_path)
    base = {"sample": torch.randn(2, 4, 9, 13), "timestep": torch.ones(2), "encoder_hidden_states": torch.randn(2, 7, 12)}
    given = load_controlnet(str(tmp_path), offline=True)(base, 0)
    picture = torch.rand(2, 3, 72, 104, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, mid = net(**base, controlnet_cond=[picture], control_type=torch.eye(KINDS)[[0, 0]], control_type_idx=[0],
                     return_dict=False)  # fmt: skip
    assert torch.equal(given["mid_block_residual"], mid)


def test_it_is_not_exported_and_the_message_says_what_to_do(tmp_path):
    with pytest.raises(ShapecheckError, match=r"^a ControlNetUnionModel is not exported: .* run it in PyTorch beside"):
        export(union(), tmp_path / "union.onnx")
    result = CliRunner().invoke(main, ["export", "controlnet-union-sdxl", "-o", str(tmp_path / "union.onnx")])
    assert result.exit_code == 2
    assert "preset controlnet-union-sdxl: a ControlNetUnionModel is not exported" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_what_diffusers_derives_from_a_unet_at_its_real_size_fits_it():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(presets.load("sdxl").config)).eval()
        net = ControlNetUnionModel.from_unet(unet, load_weights_from_unet=False).eval()
    assert probe(unet, net) == presets.contract("sdxl")


@pytest.mark.full
def test_one_made_for_sd15_does_not_fit_sdxl(tmp_path):
    kinds = {"_class_name": "ControlNetUnionModel", "num_control_type": 6, "addition_time_embed_dim": 256}
    record = dict(presets.load("controlnet-sd15").config) | kinds
    (tmp_path / "config.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ContractError, match=r"this ControlNet was made for .*SD1\.5") as caught:
        probe("sdxl", str(tmp_path))
    found = {(each.where, each.kind) for each in caught.value.mismatches}
    assert {("mid_block_residual", "size"), ("down_block_residual_09", "surplus"), ("encoder_hidden_states", "input")} <= found
    assert not any(each.where == "control_type" for each in caught.value.mismatches)
