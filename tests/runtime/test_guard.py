"""A guard on a live UNet: every silent fault planted and refused by name, every right call let pass, nothing left behind."""

from __future__ import annotations

import copy
import re
import warnings

import engines
import pytest
import small
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from hypothesis import given, settings
from hypothesis import strategies as st
from living import find_living_tensors

from shapecheck import ContractError, Geometry, ShapecheckError, probe, read_contract
from shapecheck.runtime.guard import GuardError, GuardWarning, guard

DOWNS = [f"down_block_residual_{number:02d}" for number in range(4)]
MID = "mid_block_residual"
SLOTS = [*DOWNS, MID]
AT = Geometry(2, 13, 17)
SQUARE = Geometry(2, 16, 16)


@pytest.fixture(scope="module")
def unet():
    return small.unet(**small.SHALLOW)


@pytest.fixture(scope="module")
def net(unet):
    return small.controlnet(unet)


@pytest.fixture(scope="module")
def contract(unet):
    return read_contract(engines.export_sealed(unet, latent=(17, 25)))


def hooks_of(*modules) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(each, kind)) for module in modules for each in module.modules() for kind in kinds)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base(at=AT, seed=0):
    return {
        "sample": random(at.batch, 4, at.height, at.width, seed=seed),
        "timestep": 1,
        "encoder_hidden_states": random(at.batch, 7, 12),
    }


def residuals(contract, at=AT):
    return {name: random(*shape, seed=number) for number, (name, shape) in enumerate(contract.shapes(at).items())}


def call(unet, given, at=AT, **more):
    """The UNet's answer to residuals by slot name, or as (downs, mid)."""
    downs, mid = given if isinstance(given, tuple) else ([*given.values()][:-1], [*given.values()][-1])
    control = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
    with torch.no_grad():
        return unet(**base(at) | control | more, return_dict=False)[0]


def emitted(net, at=AT, *, step=1, seed=5, **options):
    image = random(at.batch, 3, 8 * at.height, 8 * at.width, seed=seed)
    with torch.no_grad():
        downs, mid = net(**base(at, seed) | {"timestep": step}, controlnet_cond=image, return_dict=False, **options)
    return [*downs], mid


def found(error):
    return [(mismatch.where, mismatch.kind) for mismatch in error.value.mismatches]


# right calls


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_right_call_passes_and_its_result_is_what_it_was(unet, contract, kind):
    downs, mid = [*residuals(contract).values()][:-1], residuals(contract)[MID]
    before = call(unet, (kind(downs), mid))
    with guard(unet, contract):
        assert torch.equal(call(unet, (kind(downs), mid)), before)
        assert torch.equal(call(unet, (kind(downs), mid)), before)


def test_control_switched_off_passes(unet, contract, net):
    with guard(unet, contract, controlnet=net):
        assert not torch.equal(call(unet, (None, None)), call(unet, residuals(contract)))
        with torch.no_grad():
            unet(base()["sample"], 1, base()["encoder_hidden_states"])


def test_the_size_may_change_from_call_to_call(unet, contract):
    with guard(unet, contract):
        for at in (AT, SQUARE, Geometry(1, 9, 22), AT):
            call(unet, residuals(contract, at), at)
            with pytest.raises(GuardError, match=rf"{DOWNS[2]} .*at batch {at.batch}, latent {at.height}×{at.width}"):
                call(unet, residuals(contract, at) | {DOWNS[2]: torch.zeros(at.batch, 8, 3, 50)}, at)
            call(unet, residuals(contract, at), at)


def test_positional_arguments_are_seen(unet, contract):
    *downs, mid = residuals(contract).values()
    text = base()["encoder_hidden_states"]
    between = (None,) * 5
    with guard(unet, contract), torch.no_grad():
        unet(base()["sample"], 1, text, *between, downs, mid)
        with pytest.raises(GuardError, match=f"{DOWNS[3]} .*: missing"):
            unet(base()["sample"], 1, text, *between, downs[:-1], mid)


def test_autocast_makes_its_own_dtype_right(unet, contract, net):
    with torch.autocast("cpu", torch.bfloat16):
        downs, mid = emitted(net)
        assert downs[0].dtype == torch.bfloat16
        with guard(unet, contract, controlnet=net):
            call(unet, (downs, mid))
            call(unet, (downs, mid.float()))
            with pytest.raises(GuardError, match=f"{DOWNS[1]} .*: dtype: got float16, expected bfloat16"):
                call(unet, ([downs[0], downs[1].half(), *downs[2:]], mid))
    with guard(unet, contract):
        with torch.autocast("cpu", torch.bfloat16):
            call(unet, (downs, mid))
        with pytest.raises(GuardError, match=f"{MID} .*: dtype: got bfloat16, expected float32"):
            call(unet, (downs, mid))


def test_a_half_precision_unet_wants_its_own_precision(unet, contract):
    unet = copy.deepcopy(unet).bfloat16()
    right = {name: value.bfloat16() for name, value in residuals(contract).items()}
    sample = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in base().items()}
    with guard(unet, contract):
        call(unet, right, **sample)
        with pytest.raises(GuardError, match=f"{DOWNS[1]} .*: dtype: got float32, expected bfloat16 .*fails late"):
            call(unet, right | {DOWNS[1]: right[DOWNS[1]].float()}, **sample)


def test_a_forward_that_wraps_diffusers_is_understood(unet, contract):
    class Wrapping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = unet

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    *downs, mid = residuals(contract).values()
    wrapping = Wrapping()
    with guard(wrapping, contract), torch.no_grad():
        wrapping(base()["sample"], 1, base()["encoder_hidden_states"], *[None] * 5, downs, mid)
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: batch"):
            wrapping(base()["sample"], 1, base()["encoder_hidden_states"], *[None] * 5, [downs[0][:1], *downs[1:]], mid)


def test_probing_a_guarded_unet_gives_the_same_contract(unet, contract, net):
    with guard(unet, contract, controlnet=net):
        assert probe(unet, net) == contract


# faults that the call shows


def scalar(value):
    return 0.5


FAULTS = [
    (lambda r: r[:1], "batch", "PyTorch broadcasts a batch of 1 in silence"),
    (lambda r: r[0], "rank", "3 axes where .* PyTorch broadcasts it in silence"),
    (lambda r: r[:, :1], "channels", "PyTorch broadcasts it in silence"),
    (lambda r: r[:, :, :1, :1], "broadcast", "only pooled slots may do that"),
    (lambda r: r[:, :, :, :1], "size", "PyTorch broadcasts it in silence"),
    (lambda r: r[0, 0, 0, 0], "rank", "0 axes where"),
    (scalar, "input", r"got a float, 0.5, expected .* PyTorch broadcasts a number in silence"),
    (lambda r: r.transpose(2, 3), "size", "height and width are exchanged"),
    (lambda r: r[:, :, 1:], "rounding", "off by one"),
    (lambda r: torch.cat([r, r]), "batch", "expected 2×"),
    (lambda r: torch.cat([r, r], 1), "channels", "got 2×"),
    (lambda r: r.half(), "dtype", r"got float16, expected float32 .*\.to\(torch\.float32\)"),
    (lambda r: r.bfloat16(), "dtype", "got bfloat16, expected float32"),
    (lambda r: r.double(), "dtype", "got float64, expected float32"),
    (lambda r: r.int(), "dtype", "got int32, expected float32"),
    (lambda r: r.bool(), "dtype", "got bool, expected float32"),
    (lambda r: r.to("meta"), "device", "got a tensor on meta, expected one on cpu, where the sample is"),
    (lambda r: None, "missing", "got nothing"),
]


@pytest.mark.parametrize(("change", "kind", "text"), FAULTS)
def test_a_residual_that_is_not_its_slots_is_refused_by_name(unet, contract, change, kind, text):
    right, name = residuals(contract), DOWNS[2]
    wrong = right | {name: change(right[name])}
    with guard(unet, contract), pytest.raises(GuardError, match=rf"{name} \(UNet .*: {kind}: .*{text}") as error:
        call(unet, wrong)
    assert found(error) == [(name, kind)]


@pytest.mark.parametrize(("change", "kind", "text"), [each for each in FAULTS if each[1] != "missing"])
def test_the_mid_residual_is_checked_alike(unet, contract, change, kind, text):
    right = residuals(contract)
    with guard(unet, contract), pytest.raises(GuardError, match=rf"{MID} \(UNet mid_block\): {kind}: .*{text}") as error:
        call(unet, right | {MID: change(right[MID])})
    assert found(error) == [(MID, kind)]


def test_a_residual_too_few_or_too_many_is_named(unet, contract):
    *downs, mid = residuals(contract).values()
    with guard(unet, contract):
        with pytest.raises(GuardError, match=rf"{DOWNS[3]} \(UNet .*: missing: got nothing, expected 2×16×7×9"):
            call(unet, (downs[:-1], mid))
        with pytest.raises(GuardError, match=r"down_block_residual_04: surplus: .* ignores it in silence"):
            call(unet, ([*downs, downs[-1]], mid))
        with pytest.raises(GuardError, match=r"down_block_residual_04: surplus: got a float, 1\.0"):
            call(unet, ([*downs, 1.0], mid))


@pytest.mark.parametrize(
    ("downs", "text"),
    [
        (torch.zeros(4, 2, 8, 13, 17), f"got a tensor of 4×2×8×13×17, expected a list or tuple of 4 tensors, {DOWNS[0]} to"),
        ({"down_block_res_samples": 1}, "got a dict, "),
        (0.0, "got a float, 0.0"),
        ("down_block_res_samples", "got a str, "),
    ],
)
def test_down_residuals_that_are_no_sequence_are_refused(unet, contract, net, downs, text):
    with guard(unet, contract, controlnet=net):
        emitted(net)
        with pytest.raises(GuardError, match=f"down_block_additional_residuals: input: {text}"):
            call(unet, (downs, residuals(contract)[MID]))


def test_the_names_that_a_multicontrolnet_returns_by_default_are_refused(unet, contract, net):
    several = MultiControlNetModel([net])
    image = random(2, 3, 104, 136)
    with torch.no_grad():
        downs, mid = several(**base(), controlnet_cond=[image], conditioning_scale=[1.0])
    with guard(unet, contract), pytest.raises(GuardError, match=f"{MID} .*: input: got a str, .* return_dict=False"):
        call(unet, ([downs] * 4, mid))


def test_the_mid_residual_alone_is_refused(unet, contract):
    right = residuals(contract)
    with guard(unet, contract):
        with pytest.raises(GuardError, match=rf"{MID} .*: unused: .* 4 down residuals .* ignores all control: give both"):
            call(unet, (None, right[MID]))
        with pytest.raises(GuardError) as error:
            call(unet, (None, right[MID][:1].half()))
    assert found(error) == [(MID, "unused"), (MID, "batch"), (MID, "dtype")]


def test_down_residuals_alone_are_refused(unet, contract):
    downs = [*residuals(contract).values()][:-1]
    with guard(unet, contract):
        with pytest.raises(GuardError, match=rf"{MID} \(UNet mid_block\): missing: .* for T2I-Adapter features, .* give both"):
            call(unet, (downs, None))
        with pytest.raises(GuardError, match=f"{MID} .*: missing: .* ignores the down residuals"):
            call(unet, (downs, None), down_intrablock_additional_residuals=features())
        with pytest.raises(GuardError) as error:
            call(unet, ([downs[0][:1], *downs[1:]], None))
    assert found(error) == [(DOWNS[0], "batch"), (MID, "missing")]


def test_an_emptied_list_of_down_residuals_is_explained(unet, contract):
    downs, mid = [*residuals(contract).values()][:-1], residuals(contract)[MID]
    with guard(unet, contract):
        with pytest.raises(GuardError) as error:
            call(unet, ([], mid))
        assert found(error) == [(name, "missing") for name in DOWNS]
        assert "pops" not in str(error.value)
        call(unet, (downs, mid))
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: missing: .* pops T2I-Adapter features from the caller's list"):
            call(unet, ([], mid))


def features():
    """What a T2I-Adapter gives for each of the two down blocks."""
    return [random(2, 8, 13, 17), random(2, 16, 7, 9)]


def test_features_in_a_list_that_a_step_emptied_are_refused(unet, contract):
    given, text = (
        features(),
        "down_intrablock_additional_residuals: missing: got an empty list, .* list\\(features\\) at each call",
    )
    with guard(unet, contract):
        first = call(unet, (None, None), down_intrablock_additional_residuals=given)
        assert given == []
        with pytest.raises(GuardError, match=text):
            call(unet, (None, None), down_intrablock_additional_residuals=given)
        with pytest.raises(GuardError, match=text):
            call(unet, residuals(contract), down_intrablock_additional_residuals=given)
        kept = features()
        for _ in range(2):
            assert torch.equal(call(unet, (None, None), down_intrablock_additional_residuals=list(kept)), first)
        call(unet, residuals(contract), down_intrablock_additional_residuals=list(kept))
        with pytest.raises(GuardError, match=f"{DOWNS[1]} .*: dtype"):
            right = residuals(contract)
            call(unet, right | {DOWNS[1]: right[DOWNS[1]].half()}, down_intrablock_additional_residuals=list(kept))


def test_features_in_a_list_that_a_step_shortened_are_refused(unet, contract):
    given = [*features(), *features()]
    with guard(unet, contract):
        call(unet, (None, None), down_intrablock_additional_residuals=given)
        assert len(given) == 2
        with pytest.raises(GuardError, match="missing: got a list with 2 left in it"):
            call(unet, (None, None), down_intrablock_additional_residuals=given)
        with pytest.raises(GuardError, match=r"input: got a tuple, .* diffusers pops from it"):
            call(unet, (None, None), down_intrablock_additional_residuals=tuple(features()))


@pytest.mark.parametrize("sample", [torch.zeros(4, 13, 17), torch.zeros(0, 4, 13, 17), None])
def test_a_sample_without_a_size_is_refused_where_there_is_control(unet, contract, net, sample):
    with guard(unet, contract, controlnet=net), pytest.raises(GuardError, match=r"sample: (rank|size): got"):
        call(unet, residuals(contract), sample=sample)


def test_a_size_that_the_unet_refuses_is_a_mismatch_of_the_sample():
    kinds = {"down_block_types": ["ResnetDownsampleBlock2D"] * 2, "up_block_types": ["ResnetUpsampleBlock2D"] * 2}
    unet = small.unet(**small.SHALLOW | kinds | {"mid_block_type": "UNetMidBlock2D"})
    contract = probe(unet)
    assert contract.divisor == 2
    with guard(unet, contract):
        call(unet, residuals(contract, SQUARE), SQUARE)
        with pytest.raises(GuardError, match=r"sample: size: got 2×4×13×17, .* multiples of 2"):
            call(unet, residuals(contract, SQUARE), AT)


def test_everything_is_said_at_once_and_the_text_is_fixed(unet, contract):
    right = residuals(contract)
    wrong = right | {DOWNS[0]: right[DOWNS[0]][:1].half(), DOWNS[2]: 0.0, MID: right[MID].double()}
    with guard(unet, contract), pytest.raises(GuardError) as error:
        call(unet, wrong)
    assert str(error.value).splitlines() == [
        "UNet2DConditionModel is called with control that does not fit: 4 mismatches",
        (
            "  down_block_residual_00 (UNet conv_in): batch: got 1×8×13×17, expected 2×8×13×17 at batch 2, latent 13×17; "
            "PyTorch broadcasts a batch of 1 in silence"
        ),
        (
            "  down_block_residual_00 (UNet conv_in): dtype: got float16, expected float32 at batch 2, latent 13×17; "
            "PyTorch promotes it in silence, or fails late, in an up block; give it with .to(torch.float32)"
        ),
        (
            "  down_block_residual_02 (UNet down_blocks.0.downsamplers.0): input: got a float, 0.0, expected 2×8×7×9 at "
            "batch 2, latent 13×17; PyTorch broadcasts a number in silence"
        ),
        (
            "  mid_block_residual (UNet mid_block): dtype: got float64, expected float32 at batch 2, latent 13×17; "
            "PyTorch promotes it in silence, or fails late, in an up block; give it with .to(torch.float32)"
        ),
    ]
    assert isinstance(error.value, ContractError)
    assert (error.value.exit_status, error.value.contract) == (1, contract)


def test_a_pooled_contract_wants_pooled_residuals_and_no_other_does(unet, contract):
    net = small.controlnet(unet)
    net.register_to_config(global_pool_conditions=True)
    pooled = probe(unet, net)
    downs, mid = emitted(net)
    assert downs[0].shape == (2, 8, 1, 1)
    with guard(unet, pooled, controlnet=net):
        downs, mid = emitted(net)
        call(unet, (downs, mid))
        with pytest.raises(GuardError, match=rf"{DOWNS[1]} .*: size: got 2×8×13×17, expected 2×8×1×1"):
            call(unet, residuals(contract))
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: order: got {DOWNS[1]}"):
            call(unet, ([downs[1], downs[0], *downs[2:]], mid))
    with guard(unet, contract), pytest.raises(GuardError, match=f"{DOWNS[0]} .*: broadcast") as error:
        call(unet, (downs, mid))
    assert len(error.value.mismatches) == 5


def test_where_hooks_of_accelerate_move_what_is_given_the_device_is_not_looked_at(contract):
    accelerate_hooks = pytest.importorskip("accelerate.hooks")
    unet = small.unet(**small.SHALLOW)
    accelerate_hooks.add_hook_to_module(unet, accelerate_hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    right = residuals(contract)
    with guard(unet, contract):
        call(unet, right)
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: batch"):
            call(unet, right | {DOWNS[0]: right[DOWNS[0]][:1]})
        with pytest.raises(NotImplementedError, match="meta"):  # refused by accelerate, which cannot move it
            call(unet, right | {DOWNS[0]: right[DOWNS[0]].to("meta")})


@pytest.fixture(scope="module")
def guarded(unet, contract):
    twin = copy.deepcopy(unet)
    with guard(twin, contract):
        yield twin


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_single_fault_at_any_slot_is_refused_by_name(guarded, contract, data):
    at = Geometry(data.draw(st.integers(2, 3)), data.draw(st.integers(9, 20)), data.draw(st.integers(21, 30)))
    values = [*residuals(contract, at).values()]
    kind = data.draw(st.sampled_from(["drop", "duplicate", "add", "dtype", "batch", "rank", "channel", "pool", "transpose"]))
    index = data.draw(st.integers(0, 3 if kind in ("drop", "duplicate", "add") else 4))
    value = values[index]
    match kind:
        case "drop":
            del values[index]
            name = DOWNS[-1]
        case "duplicate" | "add":
            values.insert(index, value if kind == "duplicate" else torch.zeros(at.batch, 5, 3, 3))
            name = "down_block_residual_04"
        case "dtype":
            values[index] = value.to(data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.int64, torch.bool])))
        case "batch" | "rank" | "channel" | "pool":
            values[index] = {"batch": value[:1], "rank": value[0], "channel": value[:, :1], "pool": value[..., :1, :1]}[kind]
        case "transpose":
            values[index] = value.transpose(2, 3)
    if kind not in ("drop", "duplicate", "add"):
        name = SLOTS[index]
    with pytest.raises(GuardError, match=re.escape(name)):
        call(guarded, (values[:-1], values[-1]), at)


# warnings


def test_in_warn_mode_the_call_goes_on_and_its_result_is_what_it_was(unet, contract):
    right = residuals(contract)
    wrong = right | {DOWNS[0]: right[DOWNS[0]][:1], DOWNS[1]: right[DOWNS[1]].half()}
    before = call(unet, wrong)
    with guard(unet, contract, mode="warn"):
        with pytest.warns(GuardWarning, match=f"2 mismatches\n  {DOWNS[0]} .*: batch: .*\n  {DOWNS[1]} .*: dtype") as caught:
            assert torch.equal(call(unet, wrong), before)
        assert [each.filename for each in caught] == [__file__]
        call(unet, right)


def test_in_warn_mode_lone_sides_do_what_diffusers_does_with_them(unet, contract):
    mid = residuals(contract)[MID]
    with guard(unet, contract, mode="warn"):
        with pytest.warns(GuardWarning, match="ignores all control"):
            assert torch.equal(call(unet, (None, mid)), call(unet, (None, None)))
        downs = features()
        with pytest.warns(FutureWarning), pytest.warns(GuardWarning, match=f"{MID} .*: missing"):
            call(unet, (downs, None))
        assert downs == []
        with pytest.warns(FutureWarning), pytest.warns(GuardWarning, match=f"{DOWNS[0]} .* pops T2I-Adapter features"):
            call(unet, (downs, None))


# installing and removing


def test_no_hook_remains(unet, contract, net):
    with pytest.raises(ZeroDivisionError), guard(unet, contract, controlnet=[net, net]):
        assert hooks_of(unet, net) > 0
        call(unet, residuals(contract), timestep=1 / 0)
    assert hooks_of(unet, net) == 0
    wrong = residuals(contract) | {DOWNS[0]: torch.zeros(2, 8, 13, 17).half()}
    with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: dtype"), guard(unet, contract, controlnet=net):
        call(unet, wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), guard(unet, contract, controlnet=net):
        call(unet, residuals(contract), encoder_hidden_states=torch.zeros(2, 7, 13))
    assert hooks_of(unet, net) == 0
    call(unet, wrong)


def test_a_guard_is_removed_as_often_as_one_likes_and_put_on_again(unet, contract):
    wrong = residuals(contract) | {DOWNS[0]: torch.zeros(1, 8, 13, 17)}
    for _ in range(2):
        put = guard(unet, contract)
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: batch"):
            call(unet, wrong)
        put.remove()
        put.remove()
        call(unet, wrong)
    assert hooks_of(unet) == 0


def test_after_removal_no_tensor_is_kept(unet, contract, net):
    before = len(find_living_tensors())
    put = guard(unet, contract, controlnet=net)
    call(unet, emitted(net))
    assert len(find_living_tensors()) > before
    put.remove()
    assert len(find_living_tensors()) == before


def test_two_guards_do_not_disturb_each_other(unet, contract):
    wrong = residuals(contract) | {DOWNS[0]: torch.zeros(1, 8, 13, 17)}
    first, second = guard(unet, contract), guard(unet, contract)
    first.remove()
    with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: batch"):
        call(unet, wrong)
    second.remove()
    call(unet, wrong)


def test_a_copy_of_a_guarded_unet_can_be_made(unet, contract):
    with guard(unet, contract):
        twin = copy.deepcopy(unet)
    assert torch.equal(call(twin, residuals(contract)), call(unet, residuals(contract)))


def test_what_cannot_be_guarded_is_refused(unet, contract, net):
    refused = [
        (lambda: guard(unet, contract, mode="raise"), 'no guard mode \'raise\'; known: "error", "warn"'),
        (lambda: guard(small.pipeline(unet, net), contract), "not on a StableDiffusionControlNetPipeline; .* pipeline.unet"),
        (lambda: guard(unet, replaced(contract, role="controlnet")), "that of a controlnet"),
        (lambda: guard(unet, replaced(contract, slots=())), "no slots"),
        (lambda: guard(torch.nn.Linear(2, 2), contract), "Linear.forward takes no sample, down_block_additional_residuals"),
        (
            lambda: guard(unet, contract, controlnet=[net, "lllyasviel/canny"]),
            "controlnet= takes .* not a str, 'lllyasviel/canny'",
        ),
    ]
    for refuse, text in refused:
        with pytest.raises(ShapecheckError, match=text):
            refuse()
    assert hooks_of(unet, net) == 0


def replaced(contract, **fields):
    return type(contract)(
        **{name: getattr(contract, name) for name in ("class_name", "inputs", "slots", "config", "divisor", "role")} | fields
    )


def test_the_contract_of_another_model_is_refused_and_both_values_told(unet, contract):
    other = small.unet(**small.SHALLOW | {"in_channels": 9, "layers_per_block": 2, "cross_attention_dim": 16})
    with pytest.raises(ShapecheckError) as error:
        guard(other, contract)
    assert str(error.value).splitlines() == [
        "this is the contract of another model; probe this UNet",
        "  in_channels: the UNet has 9, the contract 4",
        "  cross_attention_dim: the UNet has 16, the contract 12",
        "  layers_per_block: the UNet has 2, the contract 1",
    ]
    with torch.device("meta"):
        guard(small.unet(**small.SHALLOW | {"sample_size": 99}), contract).remove()


# compiled modules


class Adding(torch.nn.Module):
    """Takes what a UNet takes and adds it up: compiles in no time."""

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        down_block_additional_residuals,
        mid_block_additional_residual,
        return_dict,
    ):
        return (sample + sum(each.mean() for each in (*down_block_additional_residuals, mid_block_additional_residual)),)


class Emitting(torch.nn.Module):
    """Returns residuals as a ControlNet does."""

    def forward(self, scale, given):
        *downs, mid = given
        return [each * scale for each in downs], mid * scale


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, when it resets on a GPU
def test_a_wrapper_of_torch_compile_is_guarded(contract):
    unet = Adding()
    compiled = torch.compile(unet, backend="eager")
    right = residuals(contract)
    with guard(compiled, contract):
        assert torch.allclose(call(compiled, right), call(unet, right))
        with pytest.raises(GuardError, match=f"{DOWNS[1]} .*: batch"):
            call(compiled, right | {DOWNS[1]: right[DOWNS[1]][:1]})
        call(compiled, right)
    assert hooks_of(compiled, unet) == 0
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, when it resets on a GPU
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_guard_set_before_compiling_sees_every_call(unet, net, contract, inplace, real):
    unet, net = (copy.deepcopy(unet), copy.deepcopy(net)) if real else (Adding(), Emitting())
    with guard(unet, contract, controlnet=net):
        if inplace:
            unet.compile(backend="eager")
            net.compile(backend="eager")
        else:
            unet, net = torch.compile(unet, backend="eager"), torch.compile(net, backend="eager")
        for step in (1, 2, 3):
            downs, mid = emitted(net, step=step) if real else net(step, [*residuals(contract).values()])
            call(unet, (downs, mid))
            with pytest.raises(GuardError, match=f"{DOWNS[1]} .*: batch"):
                call(unet, ([downs[0], downs[1][:1], *downs[2:]], mid))
            with pytest.raises(GuardError, match=f"{DOWNS[1]} .*: order"):
                call(unet, swapped(downs, mid))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_an_exporter_does_not_meet_the_guard(contract):
    unet = Adding()
    wrong = residuals(contract) | {DOWNS[0]: torch.zeros(1, 8, 13, 17)}
    *downs, mid = wrong.values()
    with guard(unet, contract):
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: batch"):
            call(unet, wrong)
        torch.export.export(unet, (*base().values(), downs, mid, False), strict=False)
        torch.jit.trace(
            unet,
            (random(2, 4, 13, 17), torch.tensor(1), random(2, 7, 12), tuple(downs), mid, torch.tensor(0)),
            check_trace=False,
        )
    assert hooks_of(unet) == 0


# through pipelines


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guess_mode": True},
        {"controlnet_conditioning_scale": 0.3},
        {"control_guidance_end": 1e-9},
        {"guess_mode": True, "control_guidance_end": 1e-9},
    ],
    ids=["plain", "guess", "strength", "ended", "guess-ended"],
)
def test_pipelines_pass(unet, contract, net, options):
    pipe = small.pipeline(unet, net)
    before = small.generate(pipe, **options).images
    with guard(unet, contract, controlnet=net):
        for _ in range(2):
            assert torch.equal(small.generate(pipe, **options).images, before)


@pytest.mark.parametrize("watched", ["multi", "each"])
def test_a_pipeline_with_two_controlnets_passes(unet, contract, net, watched):
    pipe = small.pipeline(unet, [net, small.controlnet(unet, seed=2)])
    image = torch.rand(1, 3, 104, 136)
    options = {"image": [image, image], "controlnet_conditioning_scale": [0.5, 1.5]}
    with guard(unet, contract, controlnet=pipe.controlnet if watched == "multi" else pipe.controlnet.nets):
        for more in ({}, {"guess_mode": True}, {"control_guidance_end": [1e-9, 1.0]}):
            small.generate(pipe, **options | more)
    assert hooks_of(unet, pipe.controlnet) == 0


def test_a_patched_pipeline_that_swaps_residuals_is_found_out(unet, contract, net):
    class Swapping(ControlNetModel):
        def forward(self, *args, **kwargs):
            (first, second, *rest), mid = net(*args, **kwargs)
            return [second, first, *rest], mid

    pipe = small.pipeline(unet, Swapping(**{key: value for key, value in net.config.items() if not key.startswith("_")}))
    small.generate(pipe)
    with guard(unet, contract, controlnet=net), pytest.raises(GuardError, match=f"{DOWNS[0]} .*: order") as error:
        small.generate(pipe)
    assert found(error) == [(DOWNS[0], "order"), (DOWNS[1], "order")]
    with guard(unet, contract, controlnet=net), pytest.raises(GuardError, match=f"{DOWNS[0]} .*: order"):
        small.generate(pipe, guess_mode=True)


# faults of value order


def swapped(downs, mid):
    return [downs[1], downs[0], *downs[2:]], mid


def swapped_with_mid(downs, mid):
    return [*downs[:3], mid], downs[3]


def repeated(downs, mid):
    return [downs[0], downs[0], *downs[2:]], mid


def halves_exchanged(downs, mid):
    return [each.roll(1, 0) for each in downs], mid.roll(1, 0)


def transposed(downs, mid):
    return [each.mT for each in downs], mid.mT


def zeros(downs, mid):
    return [torch.zeros_like(each) for each in downs], mid


ORDER = [
    (swapped, DOWNS[:2], "order", f"got {DOWNS[1]}, expected {DOWNS[0]} .* this is what the ControlNet gave for {DOWNS[1]}"),
    (swapped_with_mid, [DOWNS[3], MID], "order", f"got {MID}, expected {DOWNS[3]}"),
    (repeated, [DOWNS[1]], "order", f"got {DOWNS[0]}, expected {DOWNS[1]}"),
    (halves_exchanged, SLOTS, "order", "got the halves of the batch exchanged"),
    (transposed, SLOTS, "order", "got height and width exchanged"),
    (zeros, DOWNS, "unused", "got zeros, .* switch control off"),
]


@pytest.mark.parametrize(("change", "slots", "kind", "text"), ORDER)
def test_faults_of_value_order_are_seen_only_where_the_controlnet_is_watched(unet, contract, net, change, slots, kind, text):
    """As they are, in memory of their own, and scaled."""
    with guard(unet, contract):
        call(unet, change(*emitted(net, SQUARE)), SQUARE)
    with guard(unet, contract, controlnet=net):
        right = emitted(net, SQUARE)
        downs, mid = change(*right)
        for strength in (None, 1.0, 0.25):
            given = (downs, mid) if strength is None else ([strength * down for down in downs], strength * mid)
            with pytest.raises(GuardError, match=rf"{slots[0]} \(UNet .*: {kind}: {text}") as error:
                call(unet, given, SQUARE)
            assert found(error) == [(name, kind) for name in slots]
            assert {mismatch.geometry for mismatch in error.value.mismatches} == {SQUARE}
            call(unet, right, SQUARE)


def test_stale_residuals_are_seen_once_the_controlnet_has_run_again(unet, contract, net):
    with guard(unet, contract, controlnet=net):
        old = emitted(net)
        call(unet, old)
        call(unet, old)  # the ControlNet may run less often than the UNet
        new = emitted(net, step=500, seed=6)
        with pytest.raises(
            GuardError, match=f"{DOWNS[0]} .*: order: got what the ControlNet gave for an earlier call"
        ) as error:
            call(unet, old)
        assert [each.where for each in error.value.mismatches] == SLOTS
        with pytest.raises(GuardError, match="has run again since"):
            call(unet, ([2 * each for each in old[0]], 2 * old[1]))
        call(unet, new)


def test_two_runs_of_the_controlnet_before_two_of_the_unet_are_right(unet, contract, net):
    with guard(unet, contract, controlnet=net):
        for step in (1, 500):
            first, second = emitted(net, step=step), emitted(net, step=step, seed=6)
            call(unet, first)
            call(unet, ([0.3 * each for each in first[0]], 0.3 * first[1]))
            with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: order: got {DOWNS[1]}"):
                call(unet, swapped(*first))
            call(unet, second)


def test_a_blend_with_an_earlier_emission_passes(unet, contract):
    emit = Emitting()
    old = [*residuals(contract).values()]
    new = [random(*each.shape, seed=7) for each in old]
    with guard(unet, contract, controlnet=emit):
        call(unet, emit(1, old))
        emit(1, new)
        for share in (0.5, 0.9, 0.95):
            *downs, mid = [share * one + (1 - share) * two for one, two in zip(old, new, strict=True)]
            call(unet, (downs, mid))
        *downs, mid = old
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: order: got what the ControlNet gave for an earlier call"):
            call(unet, (downs, mid))


def test_value_order_is_checked_beside_other_faults(unet, contract, net):
    with guard(unet, contract, controlnet=net):
        downs, mid = swapped(*emitted(net))
        downs[2] = downs[2].half()
        with pytest.raises(GuardError) as error:
            call(unet, (downs[:3], mid))
    assert found(error) == [(DOWNS[0], "order"), (DOWNS[1], "order"), (DOWNS[2], "dtype"), (DOWNS[3], "missing")]


@pytest.mark.parametrize("form", ["pair", "output"])
def test_either_form_of_a_controlnets_output_is_understood(unet, contract, net, form):
    with guard(unet, contract, controlnet=net):
        image = random(2, 3, 104, 136)
        with torch.no_grad():
            output = net(**base(), controlnet_cond=image, return_dict=form == "output")
        downs, mid = output if form == "pair" else (output.down_block_res_samples, output.mid_block_res_sample)
        call(unet, (downs, mid))
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: order"):
            call(unet, swapped(list(downs), mid))


@pytest.mark.parametrize(("change", "slots", "kind", "text"), ORDER[:4])
def test_faults_are_seen_in_the_sum_of_two_controlnets(unet, contract, net, change, slots, kind, text):
    other = small.controlnet(unet, seed=2)
    with guard(unet, contract, controlnet=[net, other]):
        (downs, mid), (more, more_mid) = emitted(net), emitted(other)
        right = [one + two for one, two in zip(downs, more, strict=True)], mid + more_mid
        for given in (right, (downs, mid), (more, more_mid), ([3 * each for each in right[0]], 3 * right[1])):
            call(unet, given)
        with pytest.raises(GuardError, match=f"{slots[0]} .*: {kind}: {text}") as error:
            call(unet, change(*right))
        assert found(error) == [(name, kind) for name in slots]


def test_faults_in_guess_mode_are_seen(unet, contract, net):
    half = Geometry(1, AT.height, AT.width)
    with guard(unet, contract, controlnet=net):
        downs, mid = emitted(net, half)
        *padded, padded_mid = [torch.cat([torch.zeros_like(each), each]) for each in (*downs, mid)]
        call(unet, (padded, padded_mid))
        repeated = [each.repeat(2, 1, 1, 1) for each in downs], mid.repeat(2, 1, 1, 1)
        call(unet, repeated)
        for wrong in (swapped(padded, padded_mid), swapped(*repeated)):
            with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: order: got {DOWNS[1]}"):
                call(unet, wrong)
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: order: got the halves of the batch exchanged"):
            call(unet, halves_exchanged(padded, padded_mid))


def masked(downs, mid):
    return [(random(*each.shape, seed=9) > 0) * each for each in downs], mid


def blended(downs, mid):
    return [0.5 * each + 0.5 * each.roll(1, 0) for each in downs], mid


def negative(downs, mid):
    return [-each for each in downs], -mid


def another_origin(downs, mid):
    return [random(*each.shape, seed=9) for each in downs], random(*mid.shape, seed=9)


def half_precision_and_back(downs, mid):
    return [(each * 0.37).bfloat16().float() for each in downs], mid.half().float()


def other_memory_format(downs, mid):
    return [each.contiguous(memory_format=torch.channels_last) for each in downs], mid


def in_place(downs, mid):
    for each in downs:
        each *= 0.5
    return downs, mid


def not_a_number(downs, mid):
    return [each * float("nan") for each in downs], mid * float("inf")


@pytest.mark.parametrize(
    "change",
    [masked, blended, negative, another_origin, half_precision_and_back, other_memory_format, in_place, not_a_number],
)
def test_what_is_not_recognised_as_a_fault_passes(unet, contract, net, change):
    with guard(unet, contract, controlnet=net):
        call(unet, change(*emitted(net, SQUARE)), SQUARE)


def test_on_the_meta_device_no_values_are_read(unet, contract, net):
    unet, net = copy.deepcopy(unet).to("meta"), copy.deepcopy(net).to("meta")
    with torch.device("meta"), guard(unet, contract, controlnet=net):
        control = {name: torch.empty(shape) for name, shape in contract.shapes(AT).items()}
        inputs = {"sample": torch.empty(2, 4, 13, 17), "timestep": 1, "encoder_hidden_states": torch.empty(2, 7, 12)}
        net(**inputs, controlnet_cond=torch.empty(2, 3, 104, 136))
        call(unet, control, **inputs)
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: batch"):
            call(unet, control | {DOWNS[0]: torch.empty(1, 8, 13, 17)}, **inputs)


def test_a_controlnet_that_gives_zeros_raises_no_false_alarm(unet, contract):
    torch.manual_seed(1)
    fresh = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    with guard(unet, contract, controlnet=fresh):
        for change, *_ in ORDER:
            downs, mid = emitted(fresh, SQUARE)
            assert not mid.any()
            call(unet, change(downs, mid), SQUARE)


def test_a_controlnet_whose_residuals_are_alike_raises_no_false_alarm(unet, contract):
    class Alike(torch.nn.Module):
        def forward(self, value):
            same = {name: torch.full(shape, value) for name, shape in contract.shapes(SQUARE).items()}
            return [same[name] for name in DOWNS], same[MID]

    net = Alike()
    with guard(unet, contract, controlnet=net):
        for value in (1.0, 2.0, float("nan"), float("inf"), 3.0):
            for change, *_ in ORDER[:-1]:
                call(unet, change(*net(value)), SQUARE)


def test_the_gradients_of_a_watched_controlnet_are_left_alone(unet, contract, net):
    sample, image = base(), random(2, 3, 104, 136)
    with guard(unet, contract, controlnet=net):
        downs, mid = net(**sample, controlnet_cond=image, return_dict=False)
        control = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
        unet(**sample, **control).sample.sum().backward()
        wrong = swapped([down.detach() for down in downs], mid.detach())
        assert [tensor for tensor in find_living_tensors() if tensor.grad_fn is not None]
        del downs, mid, control
        assert not [tensor for tensor in find_living_tensors() if tensor.grad_fn is not None], (
            "what the guard keeps has no graph"
        )
        with pytest.raises(GuardError, match=f"{DOWNS[0]} .*: order"):
            call(unet, wrong)
    assert net.controlnet_mid_block.weight.grad.any()
    net.zero_grad()
    unet.zero_grad()


def test_without_an_emission_nothing_is_compared(unet, contract, net):
    with guard(unet, contract, controlnet=net), warnings.catch_warnings():
        call(unet, swapped(*[*(lambda r: ([*r.values()][:-1], r[MID]))(residuals(contract))]))
        net(**base(), controlnet_cond=random(2, 3, 104, 136))
        call(unet, residuals(contract, SQUARE), SQUARE)


@pytest.mark.parametrize("output", [None, 3, ("a", "b"), (1, 2, 3), ([None], None), torch.zeros(2)])
def test_what_a_watched_module_returns_otherwise_is_let_be(unet, contract, output):
    class Other(torch.nn.Module):
        def forward(self):
            return output

    other = Other()
    with guard(unet, contract, controlnet=other):
        other()
        call(unet, residuals(contract))
