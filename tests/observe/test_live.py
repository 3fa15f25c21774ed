"""Live modules: a user's subclass, real pipelines, ControlNets that pool, sum, pad and disagree, and nothing left behind."""

from __future__ import annotations

import inspect
import sys
import textwrap

import pytest
import small
import torch
from diffusers import ControlNetModel, MultiControlNetModel, UNet2DConditionModel, UNet3DConditionModel

from shapecheck import ContractError, Geometry, ShapecheckError, probe, record

SLOTS = 7
DOWNS = [f"down_block_residual_{number:02d}" for number in range(SLOTS - 1)]


def hooks_of(*modules) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return sum(len(getattr(each, kind)) for module in modules for each in module.modules() for kind in kinds)


PLAIN = {
    "layers_per_block": 1,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
}
"""Three levels of one layer each, two of them of one width, without attention: 7 slots."""
ATTENDED = {
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
"""Attention only where an image is small."""
SHALLOW = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}
"""The same in two levels: 5 slots."""


def weightless(**changes) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**small.SMALL | PLAIN | changes).eval()


def weightless_controlnet(of: UNet2DConditionModel) -> ControlNetModel:
    with torch.device("meta"):
        return small.controlnet(of)


@pytest.fixture
def unet():
    return small.unet(**PLAIN)


def test_live_modules_on_the_cpu_give_the_contract_the_meta_device_gives():
    unet = small.unet(**PLAIN | ATTENDED)
    live = probe(unet, small.controlnet(unet))
    assert live == probe(weightless(**ATTENDED))
    assert live.shapes(Geometry(3, 13, 17))["down_block_residual_05"] == (3, 16, 4, 5)
    assert live.header.controlnets[0].class_name == "ControlNetModel"


def test_the_weights_and_the_mode_of_live_modules_are_left_alone(unet):
    net = small.controlnet(unet)
    unet.train()
    before = [parameter.clone() for parameter in (*unet.parameters(), *net.parameters())]
    probe(unet, net)
    assert unet.training
    assert not net.training
    assert all(map(torch.equal, before, (*unet.parameters(), *net.parameters())))
    assert hooks_of(unet, net) == 0


def test_a_subclass_that_adds_in_a_module_of_its_own_is_observed_where_it_adds():
    class Doubling(torch.nn.Module):
        def forward(self, skip, residual):
            return skip + residual * 2

    class Gate(UNet2DConditionModel):
        def forward(self, sample, timestep, encoder_hidden_states, *args, mid_block_additional_residual=None, **kwargs):
            self.kept = mid_block_additional_residual
            handle = self.mid_block.register_forward_hook(lambda module, inputs, output: self.gate(output, self.kept))
            try:
                zero = torch.zeros_like(mid_block_additional_residual)
                return super().forward(
                    sample, timestep, encoder_hidden_states, *args, mid_block_additional_residual=zero, **kwargs
                )
            finally:
                handle.remove()

    torch.manual_seed(0)
    unet = Gate(**small.SMALL | PLAIN).eval()
    unet.gate = Doubling()
    contract = probe(unet, small.controlnet(unet))
    assert contract.class_name == "Gate"
    mid = contract.slot("mid_block_residual")
    assert [add.owner for add in mid.adds] == ["gate"]
    assert mid.adds[0].function.endswith("Doubling.forward")
    assert contract.slot("down_block_residual_00").adds[0].owner == ""


def test_hooks_go_even_when_a_forward_raises():
    unet = weightless(**SHALLOW)
    net = weightless_controlnet(unet)

    def explode(*_):
        raise RuntimeError("out of luck")

    handle = unet.up_blocks[1].register_forward_pre_hook(explode)
    with pytest.raises(ShapecheckError, match=r"does not run at any size.*out of luck"):
        probe(unet, net)
    handle.remove()
    assert hooks_of(unet, net) == 0
    net.mid_block.register_forward_pre_hook(explode)
    with pytest.raises(ShapecheckError, match=r"ControlNetModel does not run at batch 2.*out of luck"):
        probe(unet, net)
    assert hooks_of(unet) == 0
    assert hooks_of(net) == 1


def test_the_order_of_residuals_is_followed_through_a_pipeline(unet):
    net = small.controlnet(unet)
    pipe = small.pipeline(unet, net)
    contract = probe(unet, net, run=lambda: small.generate(pipe))
    assert len(contract.slots) == SLOTS
    assert contract.header.handover == ()
    with record(unet, [net]) as recorder:
        small.generate(pipe)
    (trace,) = recorder.traces
    assert trace.geometry == Geometry(2, 13, 17, tokens=7)
    assert [arrival.sources for arrival in trace.arrived] == [((0, index),) for index in (*range(SLOTS - 1), -1)]
    assert [add.index for add in trace.adds] == [*range(SLOTS - 1), -1]


def test_guess_mode_pads_the_unconditional_half_and_the_contract_says_so(unet):
    net = small.controlnet(unet)
    pipe = small.pipeline(unet, net)
    contract = probe(unet, net, run=lambda: small.generate(pipe, guess_mode=True))
    assert [each for each in contract.header.handover if "guess mode" in each]
    with record(unet, [net]) as recorder:
        small.generate(pipe, guess_mode=True)
    (trace,) = recorder.traces
    assert {residual.shape[0] for residual in trace.emitted} == {1}
    assert {arrival.shape[0] for arrival in trace.arrived} == {2}
    assert {arrival.via for arrival in trace.arrived} == {("zeros before it in the batch",)}


def test_several_controlnets_are_summed_and_the_contract_says_so():
    unet = weightless(**SHALLOW)
    nets = [weightless_controlnet(unet), weightless_controlnet(unet)]
    contract = probe(unet, MultiControlNetModel(nets))
    assert contract == probe(unet, nets)
    assert contract.header.handover == ("the residuals of 2 ControlNets are summed",)


def test_several_controlnets_are_followed_through_a_pipeline(unet):
    pipe = small.pipeline(unet, [small.controlnet(unet, seed=1), small.controlnet(unet, seed=2)])
    image = torch.rand(1, 3, 104, 136)
    call = lambda: small.generate(pipe, image=[image, image], controlnet_conditioning_scale=[0.5, 1.5])  # noqa: E731
    handover = probe(unet, pipe.controlnet, run=call).header.handover
    assert handover == ("the residuals of 2 ControlNets are summed",)


def test_one_wrong_controlnet_of_two_is_named():
    unet = weightless()
    wrong = weightless_controlnet(weightless(layers_per_block=2))
    with pytest.raises(ContractError) as caught:
        probe(unet, [weightless_controlnet(unet), wrong])
    assert {each.controlnet for each in caught.value.mismatches} == {"ControlNet 2"}
    assert {each.cause.split(";")[0] for each in caught.value.mismatches} == {
        "the ControlNet's config has another layers_per_block 2 (UNet: 1)"
    }


def test_pooled_residuals_are_a_spatial_kind():
    unet = weightless()
    net = weightless_controlnet(unet)
    net.register_to_config(global_pool_conditions=True)
    contract, ordinary = probe(unet, net), probe(unet)
    assert {slot.spatial for slot in contract.slots} == {"pooled"}
    assert contract.shapes(Geometry(2, 13, 17))["down_block_residual_04"] == (2, 16, 1, 1)
    assert contract.slot("down_block_residual_04").skip == ordinary.slot("down_block_residual_04").skip
    assert contract != ordinary
    assert any("pooled" in each for each in contract.header.handover)


class Rearranging(torch.nn.Module):
    """What a patched pipeline does between the two models, as a UNet that wraps the real one."""

    def __init__(self, pipe, change):
        super().__init__()
        self.inner, self.change = pipe.unet, change
        self.config, self.dtype, self.device = pipe.unet.config, pipe.unet.dtype, pipe.unet.device

    def forward(self, *args, down_block_additional_residuals=None, mid_block_additional_residual=None, **kwargs):
        downs, mid = self.change(list(down_block_additional_residuals), mid_block_additional_residual)
        return self.inner(*args, down_block_additional_residuals=downs, mid_block_additional_residual=mid, **kwargs)


def swapped(downs, mid):
    downs[0], downs[1] = downs[1], downs[0]
    return downs, mid


def one_short(downs, mid):
    return [*downs[:-1], downs[-2]], mid


def nothing(downs, mid):
    return None, None


def halved(downs, mid):
    return [down.half() for down in downs], mid


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (swapped, {("down_block_residual_00", "order"), ("down_block_residual_01", "order")}),
        (one_short, {("down_block_residual_05", "order")}),
        (nothing, {(name, "unused") for name in (*DOWNS, "mid_block_residual")}),
        (halved, {(name, "dtype") for name in DOWNS}),
    ],
)
def test_a_pipeline_that_changes_residuals_on_the_way_is_found_out(unet, change, found):
    net = small.controlnet(unet)
    pipe = small.pipeline(unet, net)
    wrapper = Rearranging(pipe, change)
    pipe.unet = wrapper
    with pytest.raises(ContractError) as caught:
        probe(unet, net, run=lambda: small.generate(pipe))
    assert {(each.where, each.kind) for each in caught.value.mismatches} == found


def test_a_run_that_raises_is_explained_where_a_mismatch_explains_it_and_raised_where_not(unet):
    net = small.controlnet(unet)
    pipe = small.pipeline(unet, net)

    def fail():
        small.generate(pipe)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        probe(unet, net, run=fail)
    with pytest.raises(ShapecheckError, match="never called the UNet"):
        probe(unet, net, run=lambda: None)
    assert hooks_of(unet, net) == 0


def test_half_precision_models_have_half_precision_inputs():
    unet = weightless(**SHALLOW).bfloat16()
    contract = probe(unet, weightless_controlnet(unet).bfloat16())
    assert {each.name: each.dtype for each in contract.inputs} == {
        "sample": "bfloat16",
        "timestep": "float32",
        "encoder_hidden_states": "bfloat16",
    }


def test_what_is_no_unet_or_no_controlnet_is_refused(unet):
    with pytest.raises(ShapecheckError, match="Linear has no diffusers config"):
        probe(torch.nn.Linear(2, 2))
    with pytest.raises(ShapecheckError, match="class ControlNetModel is not supported yet: expected a UNet2D"):
        probe(small.controlnet(unet))
    with pytest.raises(ShapecheckError, match="class UNet2DConditionModel is not supported yet: expected a ControlNetModel"):
        probe(unet, unet)


def test_a_controlnet_that_rounds_otherwise_is_found_at_odd_sizes_only():
    unet, net = weightless(), weightless_controlnet(weightless(downsample_padding=0))
    with pytest.raises(ContractError) as caught:
        probe(unet, net)
    assert {each.where for each in caught.value.mismatches} == {*DOWNS[2:], "mid_block_residual"}
    assert {each.kind for each in caught.value.mismatches} == {"rounding"}
    assert all(each.geometry.height % 4 or each.geometry.width % 4 for each in caught.value.mismatches)


@pytest.mark.full
def test_a_size_refused_only_five_levels_down_is_found():
    six = {"block_out_channels": (8,) * 6, "down_block_types": ("ResnetDownsampleBlock2D",) * 6}
    assert probe(weightless(**six, up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * 5))).divisor == 32


def test_what_two_models_do_at_sizes_the_unet_refuses_is_no_mismatch():
    doubling = {"up_block_types": ("ResnetUpsampleBlock2D",) * 3}
    net = weightless_controlnet(weightless(downsample_padding=0))
    assert probe(weightless(**doubling), net).divisor == 4


def test_a_unet_that_cannot_run_is_named_rather_than_its_controlnet():
    kinds = {"down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2, "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2}
    with pytest.raises(ShapecheckError, match=r"^UNet2DConditionModel does not run at batch 2, latent 17×63"):
        probe(weightless(**SHALLOW | kinds, attention_head_dim=3))


@pytest.mark.parametrize(
    ("labelled", "shape"),
    [
        ({"class_embed_type": "identity"}, (3, 32)),
        ({"class_embed_type": "identity", "time_embedding_type": "fourier"}, (3, 16)),
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 17}, (3, 17)),
        ({"class_embed_type": "timestep"}, (3,)),
        ({"num_class_embeds": 5}, (3,)),
    ],
)
def test_class_labels_are_as_wide_as_what_embeds_them(labelled, shape):
    one_level = small.TINY | {"up_block_types": ("UpBlock2D",), "mid_block_type": None}
    assert probe(weightless(**one_level | labelled)).input_shapes(Geometry(3, 8, 8))["class_labels"] == shape


# ways to add


def adding(down: str, mid: str | None = None):
    """A UNet class whose additions are written otherwise: `{s}` is the skip, `{r}` the residual."""
    source = textwrap.dedent(inspect.getsource(UNet2DConditionModel.forward)).replace("@apply_lora_scale", "@plain")
    for skip, residual, expression in (
        ("down_block_res_sample", "down_block_additional_residual", down),
        ("sample", "mid_block_additional_residual", mid or down),
    ):
        line = f"{skip} = {skip} + {residual}\n"
        assert source.count(line) == 1
        source = source.replace(line, f"{skip} = {expression.format(s=skip, r=residual)}\n")
    names = dict(vars(sys.modules[UNet2DConditionModel.__module__])) | {"plain": lambda _: lambda forward: forward}
    exec(source, names)
    return type("Adding", (UNet2DConditionModel,), {"forward": names["forward"]})


@pytest.mark.parametrize(
    "expression",
    [
        "{r} + {s}",
        "{s} - (-{r})",
        "torch.add({s}, {r}, out=torch.empty_like({s}))",
        "torch.addcmul({s}, {r}, torch.ones_like({r}))",
        "torch.lerp({s}, {r}, 0.5)",
        "torch._foreach_add([{s}], [{r}])[0]",
        "sum([{s}, {r}])",
        "{s} + {r} * torch.sigmoid({s})",
        "{s} + torch.ones_like({s}) * {r}",
        "{s} + torch.relu({r}).clamp(-1, 1)",
        "{s} + torch.cat({r}.chunk(2, 0))",
        "{s} + ({r} + {r})",
        "torch.where({r} == 0, {s}, {s} + {r})",
    ],
)
def test_an_addition_is_found_however_it_is_written(expression, expected):
    with torch.device("meta"):
        model = adding(expression)(**small.SMALL | PLAIN | SHALLOW).eval()
    assert described(probe(model)) == expected


def described(contract):
    return [(slot.name, slot.skip, slot.producer, slot.up_block) for slot in contract.slots]


@pytest.fixture(scope="module")
def expected():
    return described(probe(weightless(**SHALLOW)))


def test_an_addition_in_place_also_changes_what_the_next_block_takes(expected):
    with torch.device("meta"):
        model = adding("{s}.add_({r})")(**small.SMALL | PLAIN | SHALLOW).eval()
    found = described(probe(model))
    assert [each[:3] for each in found] == [each[:3] for each in expected]
    assert found[3][3] == "mid_block"


@pytest.mark.parametrize(
    ("expression", "kinds", "cause"),
    [
        ("{s}", {"surplus"}, "the UNet ignores it in silence"),
        ("torch.stack([{s}, {r}]).sum(0)", {"unused"}, "not understood"),
        ("({s}.flatten(2) + {r}.flatten(2)).reshape({s}.shape)", {"rank"}, "a layout that is not understood"),
    ],
)
def test_what_is_no_addition_of_a_slot_is_told_as_such(expression, kinds, cause):
    with torch.device("meta"):
        model = adding(expression)(**small.SMALL | PLAIN | SHALLOW).eval()
    with pytest.raises(ContractError) as caught:
        probe(model)
    assert {each.kind for each in caught.value.mismatches} == kinds
    assert len(caught.value.mismatches) == 5
    assert all(cause in each.cause for each in caught.value.mismatches)


# between the two


def masked(downs, mid):
    return [torch.rand_like(down) * down for down in downs], mid.clamp(-1, 1)


def summed_with_another(downs, mid):
    return [sum([down, torch.ones_like(down)]) for down in downs], mid


def made_anew(downs, mid):
    return [torch.zeros_like(down) for down in downs], torch.zeros_like(mid)


def turned(downs, mid):
    return [down.transpose(2, 3) for down in downs], mid


@pytest.mark.parametrize("change", [masked, summed_with_another])
def test_a_pipeline_may_mask_and_add_to_residuals(unet, change):
    net = small.controlnet(unet)
    pipe = small.pipeline(unet, net)
    pipe.unet = Rearranging(pipe, change)
    told = probe(unet, net, run=lambda: small.generate(pipe)).header.handover
    assert told == (
        ("on their way the residuals go through: addition of something else",) if change is summed_with_another else ()
    )


@pytest.mark.parametrize(("change", "kind", "count"), [(made_anew, "unused", SLOTS), (turned, "size", SLOTS - 1)])
def test_residuals_that_are_not_the_controlnets_or_lie_otherwise_are_found_out(unet, change, kind, count):
    net = small.controlnet(unet)
    pipe = small.pipeline(unet, net)
    pipe.unet = Rearranging(pipe, change)
    with pytest.raises(ContractError) as caught:
        probe(unet, net, run=lambda: small.generate(pipe))
    assert [each.kind for each in caught.value.mismatches] == [kind] * count


def test_probing_while_an_exception_is_handled_changes_nothing():
    unet = weightless()
    net = weightless_controlnet(unet)
    try:
        raise RuntimeError("The size of tensor a (320) must match the size of tensor b (640)")
    except RuntimeError:
        assert len(probe(unet, net).slots) == SLOTS


def test_a_controlnet_of_another_precision_is_a_mismatch():
    unet = weightless()
    net = weightless_controlnet(unet)
    with pytest.raises(ContractError) as caught:
        probe(unet.bfloat16(), net)
    assert {(each.kind, each.observed, each.expected) for each in caught.value.mismatches} == {("dtype", "float32", "bfloat16")}
    assert len(caught.value.mismatches) == SLOTS


def test_a_controlnet_that_takes_more_latent_channels_is_a_mismatch():
    unet, wider = weightless(**SHALLOW), weightless(**SHALLOW, in_channels=9)
    net, wider_net = weightless_controlnet(unet), weightless_controlnet(wider)
    with pytest.raises(ContractError, match="sample: input: got batch×9×h×w, expected batch×4×h×w"):
        probe(unet, wider_net)
    assert any("diffusers' own pipelines give a ControlNet 4" in note for note in probe(wider).header.notes)
    assert any("its own" in note for note in probe(wider, net).header.notes)


def test_a_tensor_that_is_given_for_two_slots_is_seen_in_both(unet):
    net = small.controlnet(unet)
    latent, text = torch.zeros(2, 4, 13, 17), torch.zeros(2, 7, 12)
    with record(unet, [net]) as recorder, torch.no_grad():
        downs, mid = net(latent, 1, text, torch.zeros(2, 3, 104, 136), return_dict=False)
        twice = [downs[0], downs[0], *downs[2:]]
        unet(latent, 1, text, down_block_additional_residuals=twice, mid_block_additional_residual=mid)
    (trace,) = recorder.traces
    assert [add.index for add in trace.adds] == [*range(SLOTS - 1), -1]


def test_numbers_in_place_of_residuals_do_not_break_the_run(unet):
    net = small.controlnet(unet)
    latent, text = torch.zeros(2, 4, 13, 17), torch.zeros(2, 7, 12)
    with record(unet, [net]) as recorder, torch.no_grad():
        unet(latent, 1, text, down_block_additional_residuals=[0.0] * (SLOTS - 1), mid_block_additional_residual=0.0)
    (trace,) = recorder.traces
    assert (trace.refused, trace.arrived, trace.adds) == ("", (), ())


def test_other_kinds_of_models_are_named():
    with torch.device("meta"):
        other = UNet3DConditionModel(block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
                                     down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                                     up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"))  # fmt: skip
    with pytest.raises(ShapecheckError, match="class UNet3DConditionModel is not supported yet"):
        probe(other)
