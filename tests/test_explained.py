"""`explained`, and the section in pytest's reports: live tensors at hand, so the answer is exact."""

from __future__ import annotations

import copy
import warnings

import pytest
import small
import torch
from diffusers import UNet2DConditionModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from spoilt import KINDS, spoilt

import shapecheck
from shapecheck import ContractError, Geometry, ShapecheckError, explained, probe
from shapecheck.verify.explained import ExplainedError

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("one_thread")
AT = Geometry(2, 13, 18, 7)
THIN = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}


@pytest.fixture(scope="module")
def unet():
    return small.unet(**THIN)


@pytest.fixture(scope="module")
def net(unet):
    return small.controlnet(unet)


@pytest.fixture(scope="module")
def contract(unet):
    return probe(copy.deepcopy(unet).to("meta"))


def base(at=AT):
    return {
        "sample": torch.zeros(at.batch, 4, at.height, at.width),
        "timestep": 1,
        "encoder_hidden_states": torch.zeros(at.batch, 7, 12),
    }


def emitted(net, at=AT):
    downs, mid = net(**base(at), controlnet_cond=torch.rand(at.batch, 3, 8 * at.height, 8 * at.width), return_dict=False)
    return list(downs), mid


def call(unet, downs, mid, at=AT, **more):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return unet(**base(at) | more, down_block_additional_residuals=downs, mid_block_additional_residual=mid)


def hooks_of(*modules) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for module in modules for each in module.modules())


@given(data=st.data())
@settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_every_fault_that_raises_is_named_first(unet, contract, data):
    fault = data.draw(spoilt(dict(unet.config), AT.batch, AT.height, AT.width, KINDS))
    downs = [torch.zeros(shape) for shape in fault.downs]
    mid = None if fault.mid is None else torch.zeros(fault.mid)
    try:
        with explained(unet, contract=contract):
            call(unet, downs, mid)
    except ExplainedError as error:
        assert isinstance(error.__cause__, (RuntimeError, IndexError))
        assert str(error.__cause__) in str(error)
        assert fault.kind in {each.kind for each in error.judgement.matches[0].faults}
        assert error.mismatches


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_the_very_tensors_show_what_shapes_cannot(unet, net, left_out):
    """Slots 0 and 1 share a shape: only the tensors tell which of them is left out."""
    with pytest.raises(ExplainedError, match=f"the residual of slot {left_out} is left out"), explained(unet, net):
        downs, mid = emitted(net)
        call(unet, downs[:left_out] + downs[left_out + 1 :], mid)
    assert hooks_of(unet, net) == 0


def test_the_error_says_slot_cause_and_change(unet, net):
    with pytest.raises(ExplainedError) as caught, explained(unet, net):
        downs, mid = emitted(net)
        call(unet, downs[::-1], mid)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("UNet2DConditionModel failed: RuntimeError: The size of tensor a (18) must match")
    assert lines[1] == "  where: down_block_residual_00 (conv_in)"
    assert lines[2].startswith("  fault: reverse: ")
    assert lines[3].startswith("  change: give them from the first to the last")
    assert lines[4] == "  what does not fit: 6 mismatches"
    assert caught.value.exit_status == 1
    assert isinstance(caught.value, ContractError)


def test_dtypes_and_forgotten_mids_are_told(unet, net):
    downs, mid = emitted(net)
    with pytest.raises(ExplainedError, match=r"mid_block_residual.*missing") as caught, explained(unet):
        call(unet, tuple(downs), None)
    assert isinstance(caught.value.__cause__, AttributeError)
    with pytest.raises(ExplainedError, match="the mid residual is forgotten"), explained(unet):
        call(unet, list(downs), None)
    assert len(downs) == 6
    half = copy.deepcopy(unet).bfloat16()
    with pytest.raises(ExplainedError, match="dtype: got float32, expected bfloat16") as caught, explained(half):
        call(half, downs, mid, sample=base()["sample"].bfloat16(), encoder_hidden_states=torch.zeros(2, 7, 12).bfloat16())
    assert len(caught.value.mismatches) == 7


def test_what_residuals_do_not_explain_passes_as_it_is(unet, net):
    downs, mid = emitted(net)
    with pytest.raises(ZeroDivisionError), explained(unet, net):
        _ = 1 // 0
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught, explained(unet, net):
        call(unet, downs, mid, encoder_hidden_states=torch.zeros(2, 7, 16))
    assert not isinstance(caught.value, ShapecheckError)
    with pytest.raises(RuntimeError, match="size of tensor a") as caught, explained(unet, net):
        call(unet, downs, mid)
        torch.zeros(3, 320) + torch.zeros(3, 640)
    assert not isinstance(caught.value, ShapecheckError)
    with explained(unet, net):
        assert call(unet, downs, mid).sample.shape == (2, 4, 13, 18)
    assert hooks_of(unet, net) == 0


def test_it_needs_a_unet():
    with pytest.raises(ShapecheckError, match=r"of a pipeline give pipeline\.unet"), explained(object()):
        pass
    with pytest.raises(ShapecheckError, match=r"Linear\.forward takes no sample"), explained(torch.nn.Linear(1, 1)):
        pass
    assert shapecheck.explained is explained


class Renamed(UNet2DConditionModel):
    """A subclass is observed itself: its forward may be another."""


def test_subclasses_and_compiled_unets_are_explained(unet):
    own = Renamed.from_config(unet.config).eval()
    downs = [torch.zeros(2, 16, 13, 18)]
    with pytest.raises(ExplainedError, match="down_block_residual_00"), explained(own):
        call(own, downs, torch.zeros(2, 24, 4, 5))


@pytest.mark.full
def test_a_compiled_unet_is_explained(unet):
    compiled = torch.compile(unet, backend="eager")
    with pytest.raises(ExplainedError, match="down_block_residual_00"), explained(compiled):
        call(compiled, [torch.zeros(2, 16, 13, 18)], torch.zeros(2, 24, 4, 5))
    torch.compiler.reset()


FAILING = """
import small, torch, warnings

def zeros(*shape):
    return torch.zeros(shape)

def call(downs, mid):
    unet = small.unet(**small.SHALLOW)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet(zeros(2, 4, 13, 18), 1, zeros(2, 7, 12), down_block_additional_residuals=downs, mid_block_additional_residual=mid)

def test_dropped():
    call([zeros(2, 8, 13, 18), zeros(2, 8, 7, 9), zeros(2, 16, 7, 9)], zeros(2, 16, 7, 9))

def test_without_mid():
    call([zeros(2, 8, 13, 18), zeros(2, 8, 13, 18), zeros(2, 8, 7, 9), zeros(2, 16, 7, 9)], None)

def test_of_another_thing():
    zeros(320) + zeros(640)

def test_onnxruntime():
    class Fail(Exception):
        __module__ = "onnxruntime.capi"
    raise Fail("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid input name: input_control_03")
"""


def test_pytest_appends_it_to_failures(pytester, monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    pytester.makepyfile(FAILING)
    result = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore")
    text = result.stdout.str()
    result.assert_outcomes(failed=4)
    assert text.count("- shapecheck -") == 3
    first, second, third, fourth = text.split("________ test_")[1:5]
    assert "UNet2DConditionModel failed: RuntimeError" in first
    assert "down_block_residual_03" in first
    assert "mid_block_residual (UNet mid_block): missing" in second
    assert "shapecheck" not in third
    assert "down_block_residual_03: the file has no input of that name" in fourth
