"""`explained`, and the section in pytest's reports: live tensors at hand, so the answer is exact."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251  # our own errors, to and fro
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import pytest
import small
import torch
from diffusers import MultiControlNetModel, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from searches import layers
from spoilt import KINDS, spoilt

import shapecheck
from shapecheck import ContractError, Geometry, ShapecheckError, explained, presets, probe
from shapecheck.contract import Mismatch
from shapecheck.contract.config import Config
from shapecheck.contract.naming import name_residuals
from shapecheck.explain.call_log import CallLog, EmissionRecord
from shapecheck.explain.explained_error import ExplainedError, describe_failure
from shapecheck.explain.judge_mapping import Match, judge_residuals
from shapecheck.explain.residual_table import Fault, ResidualShapes
from shapecheck.explain.tensor_identity import judge_call
from shapecheck.runtime.unet_call import Call

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


ALSO = {"mid": ("duplicate",)}
"""The first down residual given as mid is one residual in two places, too."""


@layers(25, 100, 1000)
def test_every_fault_that_raises_is_named_first(unet, contract, search):
    @search
    @given(data=st.data())
    def check(data):
        fault = data.draw(spoilt(dict(unet.config), AT.batch, AT.height, AT.width, KINDS))
        downs = [torch.zeros(shape) for shape in fault.downs]
        mid = None if fault.mid is None else torch.zeros(fault.mid)
        try:
            with explained(unet, contract=contract):
                call(unet, downs, mid)
        except ExplainedError as error:
            assert isinstance(error.__cause__, (RuntimeError, IndexError, ValueError))
            assert str(error.__cause__).splitlines()[0][:400] in str(error)
            kinds = {each.kind for each in error.judgement.matches[0].faults}
            assert kinds & {fault.kind, *ALSO.get(fault.kind, ())}
            assert error.mismatches

    check()


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_the_very_tensors_show_what_shapes_cannot(unet, net, contract, left_out):
    """Slots 0 and 1 share a shape: only the tensors tell which of them is left out."""
    message = f"the residual of slot {left_out} is left out"
    with pytest.raises(ExplainedError, match=message), explained(unet, net, contract=contract):
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


def test_dtypes_and_forgotten_mids_are_told(unet, net, contract):
    downs, mid = emitted(net)
    with pytest.raises(ExplainedError, match=r"mid_block_residual.*missing") as caught, explained(unet, contract=contract):
        call(unet, tuple(downs), None)
    assert isinstance(caught.value.__cause__, AttributeError)
    with pytest.raises(ExplainedError, match="the mid residual is forgotten"), explained(unet, contract=contract):
        call(unet, list(downs), None)
    assert len(downs) == 6
    half = copy.deepcopy(unet).bfloat16()
    with (
        pytest.raises(ExplainedError, match="dtype: got float32, expected bfloat16") as caught,
        explained(half, contract=contract),
    ):
        call(half, downs, mid, sample=base()["sample"].bfloat16(), encoder_hidden_states=torch.zeros(2, 7, 12).bfloat16())
    assert len(caught.value.mismatches) == 7


def test_what_residuals_do_not_explain_passes_as_it_is(unet, net, contract):
    downs, mid = emitted(net)
    with pytest.raises(ZeroDivisionError), explained(unet, net, contract=contract):
        _ = 1 // 0
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught, explained(unet, net, contract=contract):
        call(unet, downs, mid, encoder_hidden_states=torch.zeros(2, 7, 16))
    assert not isinstance(caught.value, ShapecheckError)
    with pytest.raises(RuntimeError, match="size of tensor a") as caught, explained(unet, net, contract=contract):
        call(unet, downs, mid)
        torch.zeros(3, 320) + torch.zeros(3, 640)
    assert not isinstance(caught.value, ShapecheckError)
    with explained(unet, net, contract=contract):
        assert call(unet, downs, mid).sample.shape == (2, 4, 13, 18)
    assert hooks_of(unet, net) == 0


def test_it_needs_a_unet():
    with pytest.raises(ShapecheckError, match=r"of a pipeline give pipeline\.unet"), explained(object()):
        pass
    with pytest.raises(ShapecheckError, match=r"Linear\.forward takes no sample"), explained(torch.nn.Linear(1, 1)):
        pass
    assert shapecheck.explained is explained


@contextmanager
def failing(module, error) -> Iterator[None]:
    """The module raises this where it would run."""

    def fail(*_):
        raise error

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def silent(net, at=AT):
    """Residuals of batch 1, which PyTorch adds to every image."""
    downs, mid = emitted(net, at)
    return [each[:1] for each in downs], mid[:1]


def test_a_failure_that_was_caught_is_over(unet, net):
    """What is raised later did not come out of the UNet, whatever its call was given."""
    downs, mid = emitted(net)
    for later in (ValueError("no prompt"), KeyError("steps"), RuntimeError("The size of tensor a (8) must match")):
        with pytest.raises(type(later)) as caught, explained(unet):
            with suppress(RuntimeError):
                call(unet, downs[1:], mid)
            raise later
        assert caught.value is later


def test_another_unet_s_failure_passes(unet, net, contract):
    downs, mid = emitted(net)
    other = copy.deepcopy(unet)
    with pytest.raises(RuntimeError, match="size of tensor a") as caught, explained(unet, contract=contract):
        with suppress(RuntimeError):
            call(unet, downs[1:], mid)
        call(other, downs[::-1], mid)
    assert not isinstance(caught.value, ShapecheckError)


def test_what_a_failure_is_raised_from_is_looked_at(unet, net, contract):
    downs, mid = emitted(net)
    with (
        pytest.raises(ExplainedError, match="the residual of slot 0 is left out") as caught,
        explained(unet, contract=contract),
    ):
        try:
            call(unet, downs[1:], mid)
        except RuntimeError as error:
            raise ValueError("step 3 failed") from error
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="step 4") as caught, explained(unet, contract=contract):
        try:
            call(unet, downs[1:], mid)
        except RuntimeError:
            raise ValueError("step 4 failed") from None
    assert not isinstance(caught.value, ShapecheckError)
    looped = KeyError("loop")
    looped.__cause__ = ValueError("loop")
    looped.__cause__.__cause__ = looped
    with pytest.raises(KeyError, match="loop"), explained(unet, contract=contract):
        raise looped


def test_an_explained_failure_is_not_explained_again(unet, net, contract):
    downs, mid = emitted(net)
    with pytest.raises(ValueError, match="outside") as caught, explained(unet, contract=contract):
        try:
            with explained(unet, contract=contract):
                call(unet, downs[1:], mid)
        except ExplainedError as error:
            raise ValueError("outside") from error
    assert isinstance(caught.value.__cause__, ExplainedError)


def test_calls_of_two_threads_do_not_mix(unet, net, contract):
    downs, mid = emitted(net)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ExplainedError) as caught, explained(unet, net, contract=contract):
            failed = pool.submit(call, unet, downs[:4] + downs[5:], mid)
            failed.exception()
            with suppress(RuntimeError):
                call(unet, downs[1:], mid)
            failed.result()
        assert caught.value.judgement.matches[0].fault.slots == ("down_block_residual_04",)
        with pytest.raises(ExplainedError, match="the residual of slot 0 is left out"), explained(unet, contract=contract):
            try:
                call(unet, downs[1:], mid)
            except RuntimeError:
                pool.submit(call, unet, downs, mid).result()
                raise


LORA = RuntimeError("mat1 and mat2 shapes cannot be multiplied (77x12 and 16x4)")
LORA_SIZES = RuntimeError("The size of tensor a (24) must match the size of tensor b (32) at non-singleton dimension 1")
OTHERS = {
    "CUDA's memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "the host's memory": MemoryError(),
    "the allocator": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "a key": KeyError("scale"),
    "a value": ValueError("unknown processor"),
    "a type": TypeError("forward() got an unexpected keyword argument 'scale'"),
    "an attribute": AttributeError("'NoneType' object has no attribute 'shape'"),
    "dtypes": RuntimeError("expected scalar type Half but found Float"),
    "devices": RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    "a LoRA's widths": LORA,
    "a LoRA's sizes": LORA_SIZES,
}


@pytest.mark.parametrize(
    ("where", "other"),
    [*(("up_blocks", other) for other in OTHERS), *(("down_blocks", other) for other in ("a key", "dtypes"))],
)
def test_residuals_that_are_broadcast_explain_no_other_failure(unet, net, contract, where, other):
    error = copy.copy(OTHERS[other])  # without the traceback of another test
    downs, mid = silent(net)
    with pytest.raises(type(error)) as caught, failing(getattr(unet, where)[1], error), explained(unet, net, contract=contract):
        call(unet, downs, mid)
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyError("scale"), LORA_SIZES], ids=["a key", "a LoRA"])
def test_a_dtype_or_a_number_that_is_added_in_silence_explains_no_other_failure(unet, net, contract, error):
    downs, mid = emitted(net)
    for each in ([each.bfloat16() for each in downs], [0.5, *downs[1:]], [*downs, downs[-1]]):
        raised = copy.copy(error)
        with pytest.raises(type(error)) as caught, failing(unet.up_blocks[0], raised), explained(unet, contract=contract):
            call(unet, each, mid)
        assert caught.value is raised


def test_a_forgotten_mid_does_not_explain_that_memory_ran_out(unet, net, contract):
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError), failing(unet.down_blocks[0], error), explained(unet, contract=contract):
        call(unet, emitted(net)[0], None)


def test_what_fails_before_residuals_are_added_is_not_theirs(unet, net, contract):
    """Also where the text is the very one that these residuals would have given later."""
    downs, mid = emitted(net)
    error = RuntimeError("The size of tensor a (18) must match the size of tensor b (9) at non-singleton dimension 3")
    with pytest.raises(RuntimeError) as caught, failing(unet.down_blocks[1], error), explained(unet, contract=contract):
        call(unet, downs[1:], mid)
    assert caught.value is error
    half = copy.deepcopy(unet).bfloat16()
    downs = [each.bfloat16() for each in downs]
    with pytest.raises(RuntimeError, match=r"dtype|type") as caught, explained(half, contract=contract):
        call(half, downs, mid.bfloat16(), encoder_hidden_states=torch.zeros(2, 7, 12).bfloat16())  # the latents are wrong
    assert not isinstance(caught.value, ShapecheckError)


def test_items_that_are_no_tensors_and_devices_are_told(unet, net, contract):
    downs, mid = emitted(net)
    wrong = {
        "device: got a tensor on meta, expected one on cpu": ([downs[0].to("meta"), *downs[1:]], mid),
        "down_block_residual_01 .*missing: got nothing": ([downs[0], None, *downs[2:]], mid),
        "mid_block_residual .*input: got a str": (downs, "mid_block_res_sample"),
        "down_block_additional_residuals: input: got a tensor": (torch.zeros(6, 2, 8, 13, 17), mid),
    }
    for message, residuals in wrong.items():
        with pytest.raises(ExplainedError, match=message), explained(unet, contract=contract):
            call(unet, *residuals)
    features = (torch.zeros(2, 8, 7, 9),)
    message = r"residuals: input: got a tuple.*list\(features\)"
    with pytest.raises(ExplainedError, match=message), explained(unet, contract=contract):
        call(unet, downs, mid, down_intrablock_additional_residuals=features)


def test_where_nothing_can_be_foretold_a_text_of_shapes_is_explained(unet, net, contract):
    bare = replace(contract, config=Config())
    downs, mid = emitted(net)
    with pytest.raises(ExplainedError, match="down_block_residual_01"), explained(unet, contract=bare):
        call(unet, downs[1:], mid)
    error = KeyError("scale")
    with pytest.raises(KeyError), failing(unet.up_blocks[0], error), explained(unet, contract=bare):
        call(unet, *silent(net))


@pytest.mark.parametrize(("batch", "mid_batch"), [(2, 3), (1, 2)])
def test_a_mid_of_another_batch_is_not_told_as_forgotten(unet, net, contract, batch, mid_batch):
    at = replace(AT, batch=batch)
    downs, mid = emitted(net, at)
    with pytest.raises(ExplainedError) as caught, explained(unet, contract=contract):
        call(unet, downs, mid[:1].repeat(mid_batch, 1, 1, 1), at)
    assert {each.where for each in caught.value.mismatches} == {"mid_block_residual"}
    kinds = {fault.kind for match in caught.value.judgement.matches for fault in match.faults}
    assert "batch" in kinds
    assert "forgotten" not in str(caught.value)


def test_a_mid_of_batch_one_is_told_as_such(contract):
    right = [*contract.shapes(AT).values()]
    received = ResidualShapes(tuple(right[:-1]), (1, *right[-1][1:]))
    judgement = judge_residuals(received, ("small",), contract, AT)
    assert [each.where for each in judgement.mismatches] == ["mid_block_residual"]
    assert "batch" in {fault.kind for fault in judgement.matches[0].faults}


def test_mistakes_that_no_shape_tells_apart_are_all_listed(unet, net, contract):
    downs, mid = emitted(net)
    with pytest.raises(ExplainedError) as caught, explained(unet, contract=contract):
        call(unet, downs[1:], mid)
    lines = [line for line in str(caught.value).splitlines() if line.startswith(("  fault: ", "     or: "))]
    assert len(lines) == len(caught.value.judgement.matches[0].faults) > 1
    assert any("drop: the residual of slot 0 is left out" in line for line in lines)
    assert any("drop: the residual of slot 1 is left out" in line for line in lines)
    with pytest.raises(ExplainedError) as caught, explained(unet, net, contract=contract):
        downs, mid = emitted(net)
        call(unet, downs[1:], mid)
    assert [each.kind for each in caught.value.judgement.matches[0].faults] == ["drop"]
    assert "     or: " not in str(caught.value)


def test_at_most_four_of_them_are_listed(contract):
    received = ResidualShapes((), None)
    judgement = judge_residuals(received, ("small",), contract, AT)
    several = tuple(Fault("drop", f"way {number}", "give all" if number else "take more", received) for number in range(6))
    text = describe_failure(contract, RuntimeError("no"), replace(judgement, matches=(Match(several, 0),)))
    assert [line.strip() for line in text.splitlines()[-7:]] == [
        "fault: drop: way 0",
        "or: drop: way 1",
        "or: drop: way 2",
        "or: drop: way 3",
        "and 2 more with the same shapes",
        "change: take more; or give all",
        "what does not fit",
    ]


@pytest.fixture(scope="module")
def wide():
    """The ControlNet of another UNet, wider at its deepest level."""
    return small.controlnet(small.unet(**THIN | {"block_out_channels": (8, 16, 32)}))


@pytest.fixture(scope="module")
def deep():
    """The ControlNet of another UNet, with more layers: of the first residuals one more has the size of the latents."""
    return small.controlnet(small.unet(**THIN | {"layers_per_block": 2}))


def first_fault(caught) -> str:
    return next(line for line in str(caught.value).splitlines() if line.startswith("  fault: "))


def test_a_controlnet_of_another_unet_is_told_so(unet, net, wide, deep, contract):
    for other in (wide, deep):
        with pytest.raises(ExplainedError) as caught, explained(unet, other, contract=contract):
            call(unet, *emitted(other))
        assert first_fault(caught) == "  fault: family: this ControlNet (ControlNetModel) is made for another UNet"
        assert caught.value.judgement.matches[0].fault.kind == "family"
    with pytest.raises(ExplainedError) as caught, explained(unet, [net, wide], contract=contract):
        emitted(net)
        call(unet, *emitted(wide))
    assert "this ControlNet (ControlNetModel, controlnet[1]) is made for another UNet" in first_fault(caught)


def test_a_controlnet_that_ran_elsewhere_is_told_so(unet, net, contract):
    messages = {
        Geometry(2, 16, 20, 7): "size: this ControlNet (ControlNetModel) ran at another size: at latents of 16×20, the UNet at",
        Geometry(
            3, 13, 18, 7
        ): "batch: this ControlNet (ControlNetModel) ran at another batch: at batch 3, the UNet at batch 2",
        Geometry(
            3, 16, 20, 7
        ): "size: this ControlNet (ControlNetModel) ran at another size: at latents of 16×20 and batch 3, ",
    }
    for at, message in messages.items():
        with pytest.raises(ExplainedError) as caught, explained(unet, net, contract=contract):
            call(unet, *emitted(net, at))
        assert message in first_fault(caught)


def test_the_family_of_its_table_is_named():
    *downs, mid = [torch.empty(shape, device="meta") for shape in presets.contract("sdxl").shapes(Geometry(2, 64, 64)).values()]
    sample, contract = torch.empty(2, 4, 64, 64, device="meta"), presets.contract("sd15")
    judgement = judge_call(
        Call(sample, downs, mid, None), contract, Geometry(2, 64, 64), [EmissionRecord("", "Net", name_residuals((downs, mid)))]
    )
    message = judgement.matches[0].fault.message
    assert message.startswith("this ControlNet (Net) is made for another UNet: this is the table of ")
    assert "sdxl" in message


def test_what_is_given_is_looked_at_before_anything_is_hooked(unet, net):
    pipe = small.pipeline(unet, net)
    wrong = {
        "controlnet[1] is a NoneType": [net, None],
        "controlnet is a str": "x",
        "controlnet is a StableDiffusionControlNetPipeline; of a pipeline give pipeline.controlnet": pipe,
        "controlnet[0] is a str": ["x"],
    }
    for message, given_ in wrong.items():
        with pytest.raises(ShapecheckError) as caught, explained(unet, given_):
            pass
        assert "takes a ControlNet, or several in a list or tuple" in str(caught.value)
        assert message in str(caught.value)
        assert hooks_of(unet, net) == 0
    with pytest.raises(ShapecheckError, match=r"not a StableDiffusion\w+; of a pipeline give pipeline\.unet"), explained(pipe):
        pass
    message = r"takes what shapecheck\.probe\(unet\) returns, not a str"
    with pytest.raises(ShapecheckError, match=message), explained(unet, contract="sd15"):
        pass
    assert hooks_of(unet, net) == 0


def test_no_hook_stays_where_one_cannot_be_set(unet, net, monkeypatch):
    last = copy.deepcopy(net)

    def refuse(*_, **__):
        raise RuntimeError("takes no hooks")

    monkeypatch.setattr(last, "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="takes no hooks"), explained(unet, [net, last]):
        pass
    assert hooks_of(unet, net) == 0
    with ExitStack() as hooks:
        CallLog(unet, torch.nn.ModuleList([net])).install(hooks)
        assert hooks_of(unet, net) == 3
    assert hooks_of(unet, net) == 0


def summed(nets, at=AT):
    """What a MultiControlNetModel makes of its nets."""
    several = nets if isinstance(nets, MultiControlNetModel) else MultiControlNetModel(nets)
    image = torch.rand(at.batch, 3, 8 * at.height, 8 * at.width)
    with torch.no_grad():
        count = len(several.nets)
        return several(**base(at), controlnet_cond=[image] * count, conditioning_scale=[1.0] * count, return_dict=False)


def test_two_controlnets_that_cannot_be_added_are_named(unet, net, wide, contract):
    several = MultiControlNetModel([net, wide])
    for given_, first, second in (
        (several, "controlnet.nets[0]", "controlnet.nets[1]"),
        ([net, wide], "controlnet[0]", "controlnet[1]"),
        ([several], "controlnet[0].nets[0]", "controlnet[0].nets[1]"),
    ):
        with pytest.raises(ExplainedError) as caught, explained(unet, given_, contract=contract):
            call(unet, *summed(several))
        lines = str(caught.value).splitlines()
        assert lines[0].startswith("MultiControlNetModel failed: RuntimeError: The size of tensor a (24) must match")
        one, other = f"{first} (ControlNetModel)", f"{second} (ControlNetModel)"
        assert lines[1] == f"  where: down_block_residual_05: {one} gives 2×24×4×5, {other} 2×32×4×5"
        assert lines[2] == "  fault: these two ControlNets are not for one UNet"
        assert lines[4] == f"  the UNet takes what {one} gives"
        assert [each.where for each in caught.value.mismatches] == ["down_block_residual_05", "mid_block_residual"]
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert hooks_of(unet, several) == 0


def test_sums_of_other_numbers_and_sizes_are_told(unet, net, deep, contract):
    with pytest.raises(ExplainedError) as caught, explained(unet, [net, deep], contract=contract):
        call(unet, *summed([net, deep]))
    assert "these two ControlNets are not for one UNet: they give 6 and 9 down residuals" in str(caught.value)
    assert {each.where for each in caught.value.mismatches if each.kind == "surplus"} == {
        f"down_block_residual_{number:02d}" for number in (6, 7, 8)
    }
    twin = copy.deepcopy(net)
    smaller = twin.register_forward_hook(
        lambda module, args, output: ([each[..., 1:] for each in output[0]], output[1][..., 1:])
    )
    message = "these two ControlNets ran at different sizes"
    with pytest.raises(ExplainedError, match=message), explained(unet, [net, twin], contract=contract):
        call(unet, *summed([net, twin]))
    smaller.remove()
    assert hooks_of(net, twin) == 0


def test_a_sum_that_does_not_fit_is_told_of_the_whole(unet, wide, contract):
    several = MultiControlNetModel([wide, copy.deepcopy(wide)])
    with pytest.raises(ExplainedError) as caught, explained(unet, several, contract=contract):
        call(unet, *summed(several))
    assert "this ControlNet (MultiControlNetModel) is made for another UNet" in first_fault(caught)


def test_what_is_no_sum_of_watched_controlnets_passes(unet, net, wide, contract):
    several = MultiControlNetModel([net, wide])
    with pytest.raises(RuntimeError, match="size of tensor a") as caught, explained(unet, net, contract=contract):
        call(unet, *summed(several))
    assert not isinstance(caught.value, ShapecheckError)
    error = RuntimeError("The size of tensor a (24) must match the size of tensor b (32) at non-singleton dimension 1")
    with pytest.raises(RuntimeError) as caught, failing(wide.mid_block, error), explained(unet, several, contract=contract):
        summed(several)
    assert caught.value is error


def test_our_own_failure_does_not_hide_theirs(unet, net, monkeypatch):
    from shapecheck.explain import explained as module

    def fail(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(module, "contract_of_live", fail)
    downs, mid = emitted(net)
    with pytest.raises(RuntimeError, match="size of tensor a") as caught, explained(unet):
        call(unet, downs[1:], mid)
    assert caught.value.__notes__ == ["shapecheck.explained has no explanation: ZeroDivisionError: ours"]


def test_errors_are_copied_and_pickled_whole(unet, net, contract):
    downs, mid = emitted(net)
    with pytest.raises(ExplainedError) as caught, explained(unet, contract=contract):
        call(unet, downs[1:], mid)
    plain = ContractError((Mismatch("channels", "slot", (1, 2), (3, 4)),), subject="they do not fit", contract=contract)
    for error in (caught.value, plain):
        for again in (copy.copy(error), copy.deepcopy(error), *(pickle.loads(pickle.dumps(error, by)) for by in (2, 5))):
            assert type(again) is type(error)
            assert str(again) == str(error)
            assert (again.mismatches, again.contract, again.subject) == (error.mismatches, contract, error.subject)
            assert getattr(again, "judgement", None) == getattr(error, "judgement", None)
            assert again.exit_status == 1


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

def call_failing(error, batch):
    unet = small.unet(**small.TINY)
    def fail(*_):
        raise error
    unet.up_blocks[0].register_forward_pre_hook(fail)
    unet(
        zeros(2, 4, 13, 18), 1, zeros(2, 7, 12), down_block_additional_residuals=[zeros(batch, 8, 13, 18) for _ in range(2)],
        mid_block_additional_residual=zeros(batch, 8, 13, 18),
    )

def test_of_memory():
    call_failing(torch.OutOfMemoryError("CUDA out of memory"), 1)

def test_of_a_key():
    call_failing(KeyError("scale"), 1)

def test_onnxruntime():
    class Fail(Exception):
        __module__ = "onnxruntime.capi"
    raise Fail("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid input name: input_control_03")
"""


def test_pytest_appends_it_to_failures(pytester, monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(small.__file__).parent))
    pytester.makepyfile(FAILING)
    result = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore")
    text = result.stdout.str()
    result.assert_outcomes(failed=6)
    assert text.count("- shapecheck -") == 3
    first, second, third, memory, key, fourth = text.split("________ test_")[1:7]
    assert "shapecheck" not in memory.replace("--shapecheck", "")
    assert "shapecheck" not in key.replace("--shapecheck", "")
    assert "UNet2DConditionModel failed: RuntimeError" in first
    assert "down_block_residual_03" in first
    assert "mid_block_residual (UNet mid_block): missing" in second
    assert "shapecheck" not in third
    assert "down_block_residual_03: the file has no input of that name" in fourth


def test_a_residual_given_in_two_places_is_told_by_the_very_tensors(unet, net, contract):
    """Its shape alone would say that slot 3 is too narrow."""
    message = "the residual of slot 2 is given for slot 3 too"
    with pytest.raises(ExplainedError, match=message) as caught, explained(unet, net, contract=contract):
        downs, mid = emitted(net)
        downs[3] = downs[2]
        call(unet, downs, mid)
    assert {each.kind for each in caught.value.judgement.matches[0].faults} == {"duplicate"}
