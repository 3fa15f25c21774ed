"""What decides what a model computes is in its description, or named as unseen: whatever way it was changed in."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import small
import torch
import transformers
from diffusers.models import activations, attention, embeddings, resnet
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

from shapecheck.models.computation import describe_computation


class Scaled(AttnProcessor2_0):
    """A processor that is no module, with a number of its own."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def __call__(self, *arguments, **options):
        return super().__call__(*arguments, **options) * self.scale


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, _types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        return 2 * result if function is nn.functional.silu else result


class Holder:
    """An object of the user's that a model holds."""

    factor = 2


def double(*outputs):
    return 2 * outputs[-1]


def find(unet, kind):
    return next(module for module in unet.modules() if isinstance(module, kind))


def exchange_class(unet):
    """As ToMe does."""
    base = type(unet.conv_out)
    unet.conv_out.__class__ = type("Patched", (base,), {"forward": lambda self, image: 2 * base.forward(self, image)})


def hold_in_list(unet):
    unet.extra = [nn.Linear(2, 2)]


def add_buffer(unet, value):
    unet.register_buffer("extra", torch.full((3,), value), persistent=False)


ON_MODEL = {
    "a hook": lambda unet: unet.conv_out.register_forward_hook(double),
    "a hook before": lambda unet: unet.conv_out.register_forward_pre_hook(lambda _module, given: (2 * given[0],)),
    "a hook of PyTorch's with a number": lambda unet: unet.conv_out.register_forward_hook(functools.partial(torch.add, 3)),
    "a processor of the user's": lambda unet: unet.set_attn_processor(Scaled(3.0)),
    "another processor": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "FreeU": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "a class made at run time": exchange_class,
    "a class of PyTorch's": lambda unet: setattr(find(unet, nn.SiLU), "__class__", nn.Identity),
    "forward of the model": lambda unet: setattr(unet, "forward", functools.partial(unet.forward, class_labels=None)),
    "forward of a block": lambda unet: setattr(unet.mid_block, "forward", lambda *given, **_: given[0]),
    "forward bound": lambda unet: setattr(unet.conv_out, "forward", types.MethodType(double, unet.conv_out)),
    "a method of PyTorch's bound": lambda unet: setattr(find(unet, nn.SiLU), "forward", nn.Tanh().forward),
    "another activation": lambda unet: setattr(unet, "conv_act", nn.Tanh()),
    "a module exchanged": lambda unet: setattr(unet.conv_out, "bias", None),
    "a number": lambda unet: setattr(find(unet, resnet.ResnetBlock2D), "output_scale_factor", 2.0),
    "a number of attention": lambda unet: setattr(find(unet, Attention), "scale", 0.5),
    "a norm's": lambda unet: setattr(find(unet, nn.GroupNorm), "eps", 0.1),
    "a private number": lambda unet: setattr(unet.conv_out, "_padding_of_mine", 3),
    "stride": lambda unet: setattr(unet.conv_in, "dilation", (2, 2)),
    "the config": lambda unet: unet.register_to_config(center_input_sample=True),
    "an embedding's": lambda unet: setattr(unet.time_proj, "flip_sin_to_cos", not unet.time_proj.flip_sin_to_cos),
    "fused projections": lambda unet: unet.fuse_qkv_projections(),
    "sliced attention": lambda unet: unet.set_attention_slice("max"),
    "a tensor": lambda unet: setattr(unet.conv_out, "extra", torch.ones(3)),
    "a buffer that is not saved": lambda unet: add_buffer(unet, 2.0),
    "a module in a list": hold_in_list,
    "an object": lambda unet: setattr(unet, "holder", Holder()),
    "weight norm": lambda unet: parametrizations.weight_norm(unet.conv_out),
    "another precision": lambda unet: unet.half(),
    "one weight for two": lambda unet: setattr(unet.mid_block.resnets[0].norm1, "bias", unet.mid_block.resnets[0].norm1.weight),
    "a weight of another class": lambda unet: setattr(
        unet.conv_out, "bias", nn.Parameter(unet.conv_out.bias.data.as_subclass(type("Odd", (torch.Tensor,), {})))
    ),
}  # fmt: skip
EVERYWHERE = {
    "a class's forward": lambda patch: patch.setattr(attention.BasicTransformerBlock, "forward", double),
    "a class's forward by another of diffusers'": lambda patch: patch.setattr(
        attention.FeedForward, "forward", resnet.ResnetBlock2D.forward
    ),
    "a class's forward, wrapped": lambda patch: patch.setattr(
        resnet.ResnetBlock2D, "forward", torch.no_grad()(lambda self, sample, temb: sample)
    ),
    "code": lambda patch: patch.setattr(
        resnet.ResnetBlock2D.forward, "__code__", (lambda self, input_tensor, temb, *args, **kwargs: input_tensor).__code__
    ),
    "defaults": lambda patch: patch.setattr(embeddings.get_timestep_embedding, "__defaults__", (True, 1, 1, 10)),
    "a class's number": lambda patch: patch.setattr(Attention, "of_mine", 3, raising=False),
    "attention of PyTorch": lambda patch: patch.setattr(nn.functional, "scaled_dot_product_attention", double),
    "a function of PyTorch by another": lambda patch: patch.setattr(nn.functional, "silu", nn.functional.relu),
    "a method of tensors": lambda patch: patch.setattr(torch.Tensor, "softmax", double),
    "a function of torch": lambda patch: patch.setattr(torch, "cat", torch.stack),
    "a function of diffusers": lambda patch: patch.setattr(embeddings, "get_timestep_embedding", double),
    "a linear layer's forward": lambda patch: patch.setattr(nn.Linear, "forward", double),
    "an activation": lambda patch: patch.setattr(activations.GEGLU, "gelu", double),
    "every module": lambda patch: patch.setitem(torch.nn.modules.module._global_forward_hooks, 0, double),
    "a call of every module": lambda patch: patch.setattr(nn.Module, "__call__", double),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    return describe_computation(small.unet(**small.TINY))


def test_a_plain_model_is_seen_in_full(plain):
    assert plain.unseen == ()
    assert describe_computation(small.controlnet(small.unet(**small.TINY))).unseen == ()


@pytest.mark.parametrize("way", ON_MODEL)
def test_a_change_to_a_model_is_another_description_or_unseen(way, plain):
    unet = small.unet(**small.TINY)
    ON_MODEL[way](unet)
    changed = describe_computation(unet)
    assert changed.unseen or changed.digest != plain.digest


@pytest.mark.parametrize("way", EVERYWHERE)
def test_a_change_to_every_model_is_another_description_or_unseen(way, plain):
    unet = small.unet(**small.TINY)
    with pytest.MonkeyPatch.context() as patch:
        EVERYWHERE[way](patch)
        changed = describe_computation(unet)
    assert changed.unseen or changed.digest != plain.digest
    assert describe_computation(unet) == plain


def test_what_is_unseen_is_named():
    unet = small.unet(**small.TINY)
    unet.conv_out.register_forward_hook(double)
    unet.set_attn_processor(Scaled(2.0))
    with Doubling():
        unseen = describe_computation(unet).unseen
    assert "a forward hook of conv_out is a function of test_computation.py, double" in unseen
    assert any("test_computation.Scaled is not of torch, diffusers" in each for each in unseen)
    assert "a Doubling is active" in unseen


def test_values_that_are_not_saved_are_told_apart():
    one, same, other = (small.unet(**small.TINY) for _ in range(3))
    for unet, value in ((one, 2.0), (same, 2.0), (other, 3.0)):
        add_buffer(unet, value)
    assert describe_computation(one) == describe_computation(same) != describe_computation(other)


def test_what_changes_no_number_changes_no_description(plain, tmp_path):
    unet = small.unet(**small.TINY)
    unet.train()
    with torch.no_grad():
        unet.conv_out.weight.add_(1)  # weights have an identity of their own
    unet.register_to_config(_name_or_path="elsewhere")
    with torch.device("cpu"):
        assert describe_computation(copy.deepcopy(unet)) == plain
    unet.save_pretrained(tmp_path)
    assert describe_computation(type(unet).from_pretrained(tmp_path)) == plain


@pytest.mark.full
def test_another_process_says_the_same(plain):
    code = "import small; from shapecheck.models import computation\n"
    code += "print(computation.describe_computation(small.unet(**small.TINY)).digest)"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split()[-1] == plain.digest


def test_a_text_encoder_in_the_process_changes_nothing(monkeypatch):
    """transformers gives `nn.Module` a method of its own when it makes a model."""
    monkeypatch.delattr(nn.Module, "smart_apply", raising=False)
    unet = small.unet(**small.TINY)
    before = describe_computation(unet)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=9, **sizes))
    assert hasattr(nn.Module, "smart_apply"), "nothing was put there"
    assert describe_computation(unet) == before


@pytest.mark.full
def test_packages_may_be_installed_elsewhere(tmp_path, plain):
    """As by `pip install --target`, or for the user alone: what is installed is known there too."""
    found = importlib.metadata.distribution("diffusers")
    for folder in ("diffusers", Path(str(found.locate_file(""))) / f"diffusers-{found.version}.dist-info"):
        source = Path(str(found.locate_file(str(folder))))
        (tmp_path / source.name).symlink_to(source)
    code = "import diffusers, small; from shapecheck.models import computation\n"
    code += "found = computation.describe_computation(small.unet(**small.TINY)); print(diffusers.__file__, found.unseen)"
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == f"{tmp_path / 'diffusers' / '__init__.py'} ()"
