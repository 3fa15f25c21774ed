"""The weights of a model with LoRAs, read as they are once merged, while the model stays as it is."""

from __future__ import annotations

import copy

import pytest
import small
import torch
from loras import add_lora, count_changed

from shapecheck import ShapecheckError
from shapecheck.models import weights
from shapecheck.models.adapters import find_adapted, read_state, remove_adapters
from shapecheck.models.computation import describe_computation

TO_Q = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def unet():
    return small.unet(**small.TINY)


def read_values(model):
    """Every tensor as it would be written."""
    state = read_state(model)
    chunks = {name: list(weights.read_chunks(value)) for name, value in state.items()}
    return {name: torch.cat(parts).reshape(state[name].shape) for name, parts in chunks.items()}


def fuse(model):
    """What diffusers makes of a copy of the model: an oracle that merges all layers in place, and takes the LoRAs away."""
    fused = copy.deepcopy(model)
    fused.fuse_lora()
    fused.unload_lora()
    return fused.state_dict()


def two_loras(unet):
    add_lora(unet, "one", seed=1)
    add_lora(unet, "two", ("to_q", "conv1", "proj_in"), seed=2)
    unet.set_adapters(["one", "two"], [0.5, 1.25])


def one_of_two(unet):
    two_loras(unet)
    unet.set_adapters("two", 0.75)


def of_direction_and_magnitude(unet):
    add_lora(unet, "one", ("to_q", "conv1"), seed=1, use_dora=True)


def with_biases(unet):
    add_lora(unet, "one", ("to_out.0", "conv1"), seed=1, lora_bias=True)


@pytest.mark.parametrize("load", [two_loras, one_of_two, of_direction_and_magnitude, with_biases])
def test_what_is_read_is_what_diffusers_fuses_bit_by_bit_and_the_model_stays(unet, load):
    plain = unet.state_dict()
    load(unet)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    found, expected = read_values(unet), fuse(unet)
    assert found.keys() == expected.keys() == plain.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert count_changed(unet, before) == 0
    assert len(find_adapted(unet)) > 0 and not any(layer.merged for layer in find_adapted(unet).values())
    assert not torch.equal(found[f"{TO_Q}.weight"], plain[f"{TO_Q}.weight"]) or load is with_biases


def test_loras_that_are_off_or_fused_already_add_nothing(unet):
    plain = {name: value.clone() for name, value in unet.state_dict().items()}
    two_loras(unet)
    unet.disable_lora()
    assert all(torch.equal(value, plain[name]) for name, value in read_values(unet).items())
    unet.enable_lora()
    fused = fuse(unet)
    unet.fuse_lora()
    assert all(torch.equal(value, fused[name]) for name, value in read_values(unet).items())


def test_without_its_loras_a_model_is_described_as_if_it_had_never_had_any(unet):
    expected = describe_computation(unet)
    two_loras(unet)
    assert describe_computation(unet) != expected
    plain = remove_adapters(unet)
    assert describe_computation(plain) == expected
    assert plain.state_dict().keys() == small.unet(**small.TINY).state_dict().keys()
    assert len(find_adapted(unet)) > 0, "the model itself keeps them"
    unet.fuse_lora(0.5)
    unet.unload_lora()
    assert describe_computation(remove_adapters(unet)) == expected


def test_identities_tell_loras_and_their_scales_apart(unet):
    def identify():
        return weights.digest_live(read_state(unet))

    found = [identify()]
    two_loras(unet)
    for names, scales in ((["one"], [1.0]), (["one"], [0.5]), (["two"], [1.0]), (["one", "two"], [1.0, 1.0])):
        unet.set_adapters(names, scales)
        found.append(identify())
    unet.fuse_lora(0.25)
    found.append(identify())
    assert len(set(found)) == len(found)


def test_what_peft_would_not_merge_is_refused_by_name(unet, monkeypatch):
    two_loras(unet)
    layer = unet.get_submodule(TO_Q)
    handle = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ShapecheckError, match=rf"{TO_Q} is of a LoRA and has a hook"):
        read_state(unet)
    handle.remove()
    handle = layer.lora_A["one"].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ShapecheckError, match=rf"{TO_Q}.lora_A.one is of a LoRA and has a hook"):
        read_state(unet)
    handle.remove()
    with monkeypatch.context() as patched:
        patched.setattr(type(layer), "forward", lambda self, x: self.base_layer(x))
        with pytest.raises(ShapecheckError, match="another forward than peft's"):
            read_state(unet)
    monkeypatch.setattr(type(layer), "merge", lambda *_, **__: 1 / 0)
    with pytest.raises(ShapecheckError, match=rf"the adapters of {TO_Q} cannot be merged into its weights: division"):
        read_values(unet)
