"""A model told by the header of its checkpoint: what is read is the model's own configuration, what does not fit is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import headers
import pytest
import torch
from click.testing import CliRunner
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shapecheck import ShapecheckError, presets, probe
from shapecheck.cli import main
from shapecheck.contract import Config
from shapecheck.models import diffusers_models, lookup
from shapecheck.models.ldm_names import rename_tensors
from shapecheck.presets.families import find_families, find_sharing

PREFIX = {"unet": "model.diffusion_model.", "controlnet": "control_model."}
UNTOLD = {"sample_size", "upcast_attention"}
"""No shape depends on these, and presets that are otherwise the same do not agree on them."""
USUAL = ("sd15", "sdxl", "controlnet-sd15")
TOLD = ("UNet2DConditionModel", "ControlNetModel")
NOT_TOLD = ("kandinsky-2.2", "controlnet-sdxl-small")


@cache
def model(preset: str) -> torch.nn.Module:
    return headers.module(preset)


def told(config: Any) -> Config:
    """A configuration less what no header tells, spelt as diffusers registers it."""
    return Config({key: value for key, value in config.items() if key not in UNTOLD})


def read(path: Path, role: str) -> torch.nn.Module:
    """The module that a file is told to be of; building it proves it."""
    return diffusers_models.build(lookup.find(str(path), role))


def refused(path: Path, role: str = "unet") -> str:
    with pytest.raises(ShapecheckError) as error:
        read(path, role)
    return str(error.value)


# well-known models


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        *((each, "original") for each in USUAL),
        ("sd15", "diffusers"),
        *(
            pytest.param(each, "original", marks=pytest.mark.full)
            for each in presets.names()
            if each not in (*USUAL, *NOT_TOLD) and presets.load(each).config["_class_name"] in TOLD
        ),
    ],
)
def test_the_header_of_a_well_known_model_tells_its_configuration(tmp_path, preset, layout):
    role = presets.load(preset).kind
    table = headers.original(model(preset), PREFIX[role]) if layout == "original" else headers.shapes(model(preset))
    found = read(headers.write(tmp_path / "model.safetensors", table), role)
    assert headers.shapes(found) == headers.shapes(model(preset))
    here, there = told(found.config), told(model(preset).config)
    different = {key for key in there if Config({"": here.get(key)}) != Config({"": there[key]})}
    # of a level without attention; [2, 2] for 2; the mirror image spelt out
    assert different <= {"transformer_layers_per_block", "reverse_transformer_layers_per_block"}


@pytest.mark.full
@pytest.mark.parametrize("preset", ["sd15", "sdxl"])
def test_the_contract_read_from_a_checkpoint_is_the_well_known_models(tmp_path, preset):
    file = headers.write(tmp_path / "model.safetensors", headers.original(model(preset), PREFIX["unet"]))
    net = None
    if preset == "sd15":
        assert "the presets with the same tensors (sd15);" in lookup.find(str(file), "unet").notes[0]
        net = headers.write(tmp_path / "net.safetensors", headers.original(model("controlnet-sd15"), PREFIX["controlnet"]))
    found, known = probe(str(file), net and str(net)), presets.contract(preset)
    assert (found.inputs, found.slots, found.divisor, found.class_name) == (
        known.inputs,
        known.slots,
        known.divisor,
        known.class_name,
    )
    assert preset in find_families(found)
    assert told(found.config) == told(known.config)
    assert (found.header.source, found.header.native, found.header.parameters) == (str(file), None, known.header.parameters)
    assert any("native size unknown; shown at 64×64" in note for note in found.header.notes)
    assert replace(found, config=known.config).digest == known.digest


def test_what_else_a_checkpoint_holds_tells_the_size_of_a_latent_cell(tmp_path):
    table = headers.original(model("sd15"), PREFIX["unet"])
    vae = {f"first_stage_model.encoder.down.{level}.downsample.conv.weight": (4, 4, 3, 3) for level in range(2)}
    text = {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)}
    averages = {f"model_ema.{name.replace('.', '')}": shape for name, shape in list(table.items())[:200]}
    source = lookup.find(str(headers.write(tmp_path / "all.safetensors", {**text, **averages, **table, **vae})), "unet")
    assert source.vae_factor == 4
    assert len(source.tensors) == len(table)
    assert lookup.find(str(headers.write(tmp_path / "unet.safetensors", table)), "unet").vae_factor == 8
    upscaler = headers.write(tmp_path / "x4.safetensors", headers.original(model("sd-x4-upscaler"), "diffusion_model."))
    source = lookup.find(str(upscaler), "unet")
    assert (source.vae_factor, source.config["attention_head_dim"]) == (4, 8)
    assert "Attention heads are not in a header: as in the presets with the same tensors (sd-x4-upscaler);" in source.notes[0]


def test_presets_with_the_same_tensors_have_the_same_heads():
    open_to_shapes = {"attention_head_dim", "only_cross_attention"}
    for name, contract in presets.contracts().items():
        alike = find_sharing(contract.config, contract.config.keys() - open_to_shapes - UNTOLD)
        assert name in alike
        assert len({Config({key: presets.contract(each).config[key] for key in open_to_shapes}) for each in alike}) == 1


@pytest.mark.full
@pytest.mark.parametrize("preset", [each for each in presets.contracts() if each not in NOT_TOLD])
def test_the_presets_that_are_named_have_these_tensors(tmp_path, preset):
    file = headers.write(tmp_path / "model.safetensors", headers.original(model(preset), PREFIX["unet"]))
    (named,) = [each for note in lookup.find(str(file), "unet").notes for each in re.findall(r"same tensors \((.+?)\)", note)]
    assert preset in named.split(", ")
    for each in named.split(", "):
        assert headers.shapes(model(each)) == headers.shapes(model(preset))


# the names


@pytest.mark.parametrize("preset", ["sd15", "sdxl", "sd-x4-upscaler", "ssd-1b"])
def test_names_are_translated_as_diffusers_does(preset):
    names = headers.original(model(preset), PREFIX["unet"])
    theirs = convert_ldm_unet_checkpoint({name: name for name in names}, model(preset).config)
    labels = "add_embedding" if "xl" in preset or "ssd" in preset else "class_embedding"
    ours = rename_tensors([name.removeprefix(PREFIX["unet"]) for name in names], labels=labels)
    assert {new: PREFIX["unet"] + old for new, old in ours.items()} == theirs
    assert theirs.keys() == headers.shapes(model(preset)).keys()


def test_names_of_a_controlnet_are_translated_as_diffusers_does():
    names = headers.original(model("controlnet-sd15"), PREFIX["controlnet"])
    theirs = convert_controlnet_checkpoint({name: name for name in names}, model("controlnet-sd15").config)
    ours = rename_tensors([name.removeprefix(PREFIX["controlnet"]) for name in names], labels="class_embedding")
    assert {new: PREFIX["controlnet"] + old for new, old in ours.items()} == theirs


# models that nobody knows


@st.composite
def unets(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of small UNets as Stable Diffusion has them, of one to four levels."""
    levels = draw(st.integers(1, 4))
    attended = draw(st.lists(st.booleans(), min_size=levels, max_size=levels).filter(any))
    linear = draw(st.booleans())
    widths = draw(st.lists(st.sampled_from([64, 128, 192]), min_size=levels, max_size=levels))
    layers = draw(st.integers(1, 2))
    depths = draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels))
    kinds: list[dict[str, Any]] = [
        {},
        {"num_class_embeds": 10},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 24},
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1544,
            "cross_attention_dim": draw(st.sampled_from([1280, 2048])),
        },
        {"time_cond_proj_dim": 5},
        {"conv_in_kernel": 1, "conv_out_kernel": 5},
    ]
    return {
        "in_channels": draw(st.sampled_from([4, 5, 9])),
        "out_channels": draw(st.sampled_from([4, 8])),
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in attended[::-1]],
        "layers_per_block": layers,
        "transformer_layers_per_block": depths,
        "attention_head_dim": [each // 64 for each in widths] if linear else 8,
        "use_linear_projection": linear,
        "cross_attention_dim": 48,
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])),
        **draw(st.sampled_from(kinds)),
    }


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unets(), st.booleans())
def test_any_unet_of_the_family_is_told_by_its_header(tmp_path, config, in_ldm):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    table = headers.original(unet, "model.diffusion_model.") if in_ldm else headers.shapes(unet)
    found = read(headers.write(tmp_path / "model.safetensors", table), "unet")
    assert headers.shapes(found) == headers.shapes(unet)
    free = {"transformer_layers_per_block", "reverse_transformer_layers_per_block"}
    assert {key: value for key, value in told(found.config).items() if key not in free} == {
        key: value for key, value in told(unet.config).items() if key not in free
    }


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([8, 16, 24]), min_size=2, max_size=4), st.integers(1, 6), st.integers(1, 2))
def test_any_controlnet_of_the_family_is_told_by_its_header(tmp_path, widths, channels, layers):
    small = {"block_out_channels": [64, 128], "cross_attention_dim": 48, "layers_per_block": layers}
    blocks = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    with torch.device("meta"):
        net = ControlNetModel(
            **small, **blocks, conditioning_channels=channels, conditioning_embedding_out_channels=[*widths, 32]
        )
    found = read(headers.write(tmp_path / "net.safetensors", headers.shapes(net)), "controlnet")
    assert headers.shapes(found) == headers.shapes(net)
    assert told(found.config) == told(net.config)


# what does not fit is told


TINY = {
    "block_out_channels": [64, 128],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 48,
}


@cache
def tiny() -> headers.Shapes:
    with torch.device("meta"):
        return headers.original(UNet2DConditionModel(**TINY), "model.diffusion_model.")


DEEP = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.2.weight"
FAULTS = {
    "missing": ({DEEP: None}, "no down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight of 64×256"),
    "of another shape": (
        {DEEP: (64, 128)},
        f"down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight ({DEEP}) is 64×128, expected 64×256",
    ),
    "a tensor more": (
        {"model.diffusion_model.task_embedding": (6, 320)},
        "model.diffusion_model.task_embedding of 6×320 has no",
    ),
    "a layer more": (
        {"model.diffusion_model.input_blocks.1.1.transformer_blocks.1.norm1.weight": (64,)},
        "no down_blocks.0.attentions.0.transformer_blocks.1.norm1.bias of 64",
    ),
    "quantized": ({"model.diffusion_model.out.2.weight": (1440, 1)}, "is 1440×1, expected 4 axes; is it quantized?"),
    "no output": ({"model.diffusion_model.out.2.weight": None}, "the model in it has no conv_out.weight"),
    "two text widths": (
        {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (128, 50)},
        "attention to text of one width; found 48 and 50",
    ),
    "a scale beside": ({"model.diffusion_model.scaled_fp8": (2,)}, "model.diffusion_model.scaled_fp8 of 2 has no place"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(tmp_path, fault):
    changes, said = FAULTS[fault]
    table = {name: shape for name, shape in {**tiny(), **changes}.items() if shape is not None}
    file = headers.write(tmp_path / "model.safetensors", table)
    message = refused(file)
    assert message.startswith(str(file))
    assert said in message
    assert "config.json" in message or fault == "no output"


def test_the_contract_read_from_the_file_whose_faults_these_are_is_the_models(tmp_path):
    file = headers.write(tmp_path / "model.safetensors", tiny())
    with torch.device("meta"):
        found, known = probe(str(file)), probe(UNet2DConditionModel(**TINY))
    assert (found.inputs, found.slots, found.divisor) == (known.inputs, known.slots, known.divisor)
    assert told(found.config) == told(known.config)
    assert (found.header.source, found.header.parameters) == (str(file), known.header.parameters)
    assert any("native size unknown; shown at 64×64" in note for note in found.header.notes)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "it looks like a LoRA, which is not a model by itself"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "it looks like a LoRA"),
        (
            ["model.diffusion_model.joint_blocks.0.x_block.weight", "model.diffusion_model.x_embedder.proj.weight"],
            "its 2 tensors begin with model.diffusion_model.joint_blocks, model.diffusion_model.x_embedder",
        ),
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "begin with double_blocks.0.img_attn, img_in.weight"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "begin with encoder.block.0"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "begin with encoder.conv_in.weight"),
        (["evil\x1b[2J.weight"], r"evil\x1b[2J.weight"),
        ([], "it is empty"),
    ],
)
def test_a_file_without_a_unet_says_what_it_holds(tmp_path, names, said):
    file = headers.write(tmp_path / "model.safetensors", dict.fromkeys(names, (2, 2)))
    for role in ("unet", "controlnet"):
        message = refused(file, role)
        assert message.startswith(f"{file} holds no Stable Diffusion UNet or ControlNet")
        assert said in message


@pytest.mark.parametrize("preset", NOT_TOLD)
def test_what_shapes_do_not_tell_is_refused(tmp_path, preset):
    file = headers.write(tmp_path / "model.safetensors", headers.shapes(model(preset)))
    assert "give the diffusers folder or its config.json" in refused(file, presets.load(preset).kind)


def test_a_unet_is_no_controlnet_and_the_other_way_round(tmp_path):
    unet = headers.write(tmp_path / "unet.safetensors", tiny())
    net = headers.write(tmp_path / "net.safetensors", headers.original(model("controlnet-sd15"), PREFIX["controlnet"]))
    assert refused(net) == f"{net} is a ControlNet; name the UNet as MODEL and give this one with --controlnet"
    assert refused(unet, "controlnet").startswith(f"{unet} is a UNet; --controlnet takes a ControlNet")
    both = headers.write(
        tmp_path / "both.safetensors", {**tiny(), **headers.original(model("controlnet-sd15"), "control_model.")}
    )
    assert read(both, "unet").config["block_out_channels"] == [64, 128]
    assert read(both, "controlnet").config["block_out_channels"] == [320, 640, 1280, 1280]


def raw(path: Path, header: bytes, length: int | None = None, data: int = 0) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data))
    return path


def entry(name: str, shape: list[int], end: int) -> str:
    return f'{json.dumps(name)}:{{"dtype":"F16","shape":{shape},"data_offsets":[0,{end}]}}'


FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("header", "length", "said"),
    [
        (b"{}", 2**62, "2 bytes|expected a header of"),
        (b"{}", 0x80, "expected a header of"),
        (b"not JSON", None, "does not start with an object"),
        (b'{"a":' + b"[" * 100_000, None, "nested too deeply|is not a valid"),
        (f"{{{entry('a', [1], 2)},{entry('a', [1], 2)}}}".encode(), None, "a is given twice"),
        (f"{{{entry(FIRST, [-1, 4, 3, 3], 2)}}}".encode(), None, "holds a value that is not a size"),
        (f"{{{entry(FIRST, [2**62, 2**62], 2)}}}".encode(), None, "data_offsets span 2 bytes"),
        (f"{{{entry(FIRST, [0, 2**62], 0)}}}".encode(), None, "holds no Stable Diffusion UNet"),
    ],
)
def test_a_hostile_header_is_one_message(tmp_path, header, length, said):
    message = refused(raw(tmp_path / "model.safetensors", header, length))
    assert any(each in message for each in said.split("|"))
    assert len(message) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"model.diffusion_model.input_blocks.9999.0.in_layers.0.weight": (1,)},
        {f"model.diffusion_model.input_blocks.1.1.transformer_blocks.{9**99}.norm1.weight": (1,)},
        {f"model.diffusion_model.input_blocks.{level}.0.op.weight": (1,) for level in range(2, 400)},
        {f"model.diffusion_model.input_blocks.1.1.transformer_blocks.{layer}.norm1.weight": (1,) for layer in range(5000)},
        {f"model.diffusion_model.{'9.' * 5000}weight": (1,)},
        {"model.diffusion_model.out.2.weight": (0, 0, 0, 0)},
        {"model.diffusion_model.input_blocks.0.0.weight": (2**20, 2**20, 0, 0)},
        {FIRST: (64, 2**40, 0, 3)},
        {"model.diffusion_model.input_blocks.1.1.proj_in.weight": ()},
        {"model.diffusion_model.": (1,), "model.diffusion_model..": (1,)},
    ],
)
def test_names_and_sizes_made_up_are_refused(tmp_path, changes):
    message = refused(headers.write(tmp_path / "model.safetensors", {**tiny(), **changes}))
    assert len(message) < 2000


# the command


def test_the_command_says_what_was_read_and_what_is_not_known(tmp_path):
    file = headers.write(tmp_path / "tiny.safetensors", tiny())
    done = CliRunner().invoke(main, ["probe", str(file), "--latent", "13x21"])
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    assert "note: tiny.safetensors: settings read from the shapes in its header, and they build exactly its tensors." in said
    assert "Attention heads are not in a header: as in Stable Diffusion, 8 in each level" in said
    assert "8 pixels per latent cell assumed" in said


@pytest.mark.parametrize(
    "command",
    [["export", "-o", "unet.onnx", "--weights", "none"], ["parity", "--onnx", "unet.onnx"]],
)
def test_what_needs_more_than_shapes_says_so(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    headers.write(tmp_path / "tiny.safetensors", tiny())
    done = CliRunner().invoke(main, [command[0], "tiny.safetensors", *command[1:]])
    assert (done.exit_code, done.stdout) == (2, "")
    assert (
        "Give a diffusers folder; in Python this makes one, with a configuration from the hub: diffusers.UNet2D" in done.stderr
    )
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_the_config_beside_the_weights_goes_before_their_header(tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**TINY, sample_size=48)
    unet.save_config(tmp_path)
    file = raw(tmp_path / "diffusion_pytorch_model.fp16.safetensors", b"never read", 2**60)
    source = lookup.find(str(file), "unet")
    assert source.config["sample_size"] == 48
    assert source.notes == (f"read from the config.json beside {file.name}, which was not opened",)
    assert not source.tensors
    assert "expected a header" in refused(file.rename(tmp_path / "other.safetensors"))
