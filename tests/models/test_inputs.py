"""The inputs that a UNet's configuration asks for: PyTorch's own call takes them, and what it refuses is not among them."""

from __future__ import annotations

import pytest
import small
import torch
from diffusers import UNet2DConditionModel

from shapecheck import Geometry, ShapecheckError, probe
from shapecheck.models.inputs import build_zero_arguments, unet_inputs
from shapecheck.onnx.export import export

TEXT_TIME = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
CASES = {
    # attended, projection's input → pooled text, time ids
    "two text encoders": ({"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 80}, (32, 6)),
    "two text encoders and an aesthetic score": (
        {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 72},
        (32, 5),
    ),
    "one text encoder and an aesthetic score": (
        {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 72},
        (32, 5),
    ),
    "one text encoder": ({"cross_attention_dim": 8, "projection_class_embeddings_input_dim": 56}, (8, 6)),
    "a projected text": (
        {"cross_attention_dim": 12, "encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj",
         "projection_class_embeddings_input_dim": 60},
        (20, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_time_ids_and_the_pooled_text_follow_from_what_the_unet_attends_to(case):
    """As diffusers' own pipelines of these UNets give them."""
    changes, (pooled, count) = CASES[case]
    unet = small.unet(**small.TINY | TEXT_TIME | changes)
    given = {entry.name: entry.shape_at(Geometry(2, 9, 7)) for entry in unet_inputs(unet.config, "float32")}
    assert (given["text_embeds"], given["time_ids"]) == ((2, pooled), (2, count))


OTHERS = {
    "DeepFloyd IF": {"encoder_hid_dim": 20, "addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    "Kandinsky": {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"},
    "AudioLDM": {
        "block_out_channels": (8, 16), "cross_attention_dim": (8, 16), "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 24, "class_embeddings_concat": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_a_unet_whose_implied_controlnet_does_not_run_is_observed_alone(case):
    unet = small.unet(**small.TINY | OTHERS[case]).to("meta")
    contract = probe(unet)
    assert len(contract.slots) == 2 + len(unet.config["block_out_channels"]) * 2 - 1
    assert any("UNet side alone" in note for note in contract.header.notes)
    with torch.no_grad():
        unet(**build_zero_arguments(contract.inputs, Geometry(2, 9, 7), unet.device))


class _Cached(UNet2DConditionModel):
    """A fork that returns a cache beside the image."""

    def forward(self, *args, **kwargs):
        image = super().forward(*args, **kwargs)[0]
        return image, [image * 2]


@pytest.mark.full
def test_a_unet_that_returns_more_tensors_is_refused_in_words(tmp_path):
    torch.manual_seed(0)
    unet = _Cached(**small.SMALL | small.TINY)
    with pytest.raises(ShapecheckError, match=r"^_Cached.forward returns 1 more tensors than diffusers' own, such as caches"):
        export(unet, tmp_path / "unet.onnx")


def test_blocks_that_return_more_beside_their_tensor_are_named_as_the_makers_of_skips(monkeypatch):
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    unet = small.unet(**small.SHALLOW).to("meta")
    expected = [slot.producer for slot in probe(unet).slots]
    forward = Transformer2DModel.forward

    def with_cache(self, *args, **kwargs):
        (result,) = forward(self, *args, **kwargs)
        return result, [torch.zeros_like(result)]

    monkeypatch.setattr(Transformer2DModel, "forward", with_cache)
    assert [slot.producer for slot in probe(unet).slots] == expected
    assert "down_blocks.0.attentions.0" in expected


def test_comfyui_joins_what_a_file_of_ours_takes_apart(tmp_path):
    unet = small.unet(**small.TINY | small.TEXT_TIME)
    with pytest.raises(ShapecheckError, match=r"--naming comfyui: there text_embeds and time_ids are one input, y"):
        export(unet, tmp_path / "unet.onnx", naming="comfyui")
