"""Presets and topologies at reduced width and depth, exported and compared with PyTorch at an odd size."""

from __future__ import annotations

import copy

import exports
import numpy as np
import onnx
import pytest
import small
import torch
from comparison import difference, every_output, inputs_for, session
from small import SHALLOW

from shapecheck import Geometry, export, presets

_SHAPING = (
    "use_linear_projection", "time_cond_proj_dim", "addition_embed_type", "transformer_layers_per_block", "num_class_embeds",
)  # fmt: skip
CONTROLNETS = ("controlnet-sd15", "controlnet-sd21", "controlnet-sdxl-full", "controlnet-sdxl-small")
"""The one between those for SDXL differs from both in depth alone."""
_FLAGS = (
    "addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds", "only_cross_attention",
    "resnet_time_scale_shift", "reverse_transformer_layers_per_block", "time_cond_proj_dim", "upcast_attention",
    "use_linear_projection",
)  # fmt: skip
"""What adds operators to a graph or takes others, beside the kinds of blocks."""


def choose_distinct_presets():
    """One preset of each topology: those that differ in nothing but the width of an input are one."""
    topologies = {}
    for name, contract in sorted(presets.contracts().items(), key=lambda pair: len(pair[0])):
        slots = tuple((slot.skip, slot.producer) for slot in contract.slots)
        topologies.setdefault((slots, *(contract.config.get(key) or None for key in _SHAPING)), name)
    return sorted((*topologies.values(), *CONTROLNETS))


def kinds_of(config):
    """Return what decides a model's operators: the kinds of blocks, embeddings and attention that its config names."""
    role = "unet" if "up_block_types" in config else "controlnet"
    flags = {key: config.get(key) for key in _FLAGS}
    return {
        *config["down_block_types"],
        *config.get("up_block_types", ()),
        ("mid", config.get("mid_block_type", "UNetMidBlock2DCrossAttn")),
        (role, flags["addition_embed_type"]),
        ("attention without layers", config.get("transformer_layers_per_block") == [0, 0, 0]),
        *((key, value if isinstance(value, (bool, str)) else value is not None) for key, value in flags.items() if value),
        ("use_linear_projection", bool(flags["use_linear_projection"])),
    }


def choose_covering(names, shown):
    """Choose presets that have every kind that is not shown otherwise: always the one that adds most, of two such the first."""
    kinds = {name: kinds_of(presets.load(name).config) for name in names}
    chosen, missing = [], set().union(*kinds.values()) - shown
    while missing:
        best = max(names, key=lambda name: len(kinds[name] & missing))
        chosen.append(best)
        missing -= kinds[best]
    return sorted(chosen)


def choose_odd_size(contract):
    """Odd, or odd multiples of what the model's sizes must be multiples of."""
    return Geometry(2, 17, 25, 5) if contract.divisor == 1 else Geometry(2, 3 * contract.divisor, 5 * contract.divisor, 5)


def agrees_with_torch(model, done):
    """Whether float32 is within 2e-6 of the largest value, and float16 within twice PyTorch's own error."""
    half = done.dtype == "float16"
    given = inputs_for(done.contract, choose_odd_size(done.contract), dtype=torch.float16 if half else torch.float32)
    if done.contract.config.get("num_class_embeds"):
        given["class_labels"] = torch.tensor([7, 940])
    found = session(done.path).run(None, {name: value.numpy() for name, value in given.items()})
    exact = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    expected = every_output(copy.deepcopy(model).float(), done.contract, exact)
    allowed = [2e-6] * len(expected)
    if half:
        own = every_output(copy.deepcopy(model).half(), done.contract, given)
        allowed = [2 * difference(*pair) for pair in zip(own, expected, strict=True)]
    errors = [difference(each.astype(np.float32), wanted) for each, wanted in zip(found, expected, strict=True)]
    assert np.isfinite(allowed).all()
    return all(error <= most for error, most in zip(errors, allowed, strict=True))


ODD = {"mid_block_type": None, "downsample_padding": 0, "class_embed_type": "timestep", "time_cond_proj_dim": 6}
"""Kinds that go together in one small UNet, though in no preset."""
with torch.device("meta"):
    _small = small.unet(**SHALLOW)
    SHOWN = kinds_of(_small.config) | kinds_of(small.unet(**SHALLOW | ODD).config) | kinds_of(small.controlnet(_small).config)
"""The kinds of the small models that are exported here and in `test_exported.py`."""
DISTINCT = choose_distinct_presets()
CHOSEN = choose_covering(DISTINCT, SHOWN)


def test_few_presets_have_every_kind_of_block_embedding_and_attention():
    chosen, every = (set().union(*(kinds_of(presets.load(name).config) for name in names)) for names in (CHOSEN, DISTINCT))
    assert every <= chosen | SHOWN
    assert {presets.load(name).kind for name in CHOSEN} == {"unet", "controlnet"}
    assert len(CHOSEN) <= len(DISTINCT) // 2


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.full if name in CHOSEN else pytest.mark.nightly) for name in DISTINCT],
)
def test_a_preset_is_right_at_an_odd_size(name):
    model = exports.reduced(name)
    done = exports.exported_once(model)
    assert done.weights == "link"
    assert agrees_with_torch(model, done)


@pytest.mark.parametrize(
    "name",
    [pytest.param("sdxl", marks=pytest.mark.full), pytest.param("controlnet-sdxl-small", marks=pytest.mark.nightly)],
)
def test_a_preset_in_half_precision_is_right_at_an_odd_size(name):
    model = exports.reduced(name).half()
    done = exports.exported_once(model)
    assert (done.weights, done.dtype) == ("link", "float16")
    assert agrees_with_torch(model, done)


@pytest.mark.full
@pytest.mark.parametrize("opset", [18, 21, 23])
def test_other_opsets_are_right_at_an_odd_size(tmp_path, opset):
    """A ControlNet, the smallest with attention and group normalisation, whose operators changed between them."""
    net = small.controlnet(small.unet(**small.TINY))
    net.save_pretrained(tmp_path / "net")
    done = export(str(tmp_path / "net"), tmp_path / "net.onnx", opset=opset)
    assert {each.version for each in onnx.load(done.path, load_external_data=False).opset_import if not each.domain} == {opset}
    assert agrees_with_torch(net, done)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(ODD, marks=pytest.mark.full),
        *(pytest.param({key: value}, marks=pytest.mark.nightly) for key, value in ODD.items()),
        pytest.param(
            small.TEXT_TIME | {"transformer_layers_per_block": (1, 2), "use_linear_projection": True}, marks=pytest.mark.nightly
        ),
    ],
)
def test_topologies_that_no_preset_has_are_right_at_an_odd_size(changes):
    unet = small.unet(**SHALLOW | changes)
    assert agrees_with_torch(unet, exports.exported_once(unet))
