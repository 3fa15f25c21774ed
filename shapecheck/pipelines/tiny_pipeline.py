"""Everything a Stable Diffusion pipeline is made of, small: the real classes and topologies with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Kind = Literal["sd15", "sdxl"]


TextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection


Module = TypeVar("Module", bound=torch.nn.Module)


_COMMON: dict[str, Any] = {"sample_size": 16, "norm_num_groups": 8, "layers_per_block": 2}


_UNETS: dict[Kind, dict[str, Any]] = {
    "sd15": _COMMON
    | {
        "block_out_channels": (32, 64, 96, 96),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
    },
    "sdxl": _COMMON
    | {
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "transformer_layers_per_block": (1, 2, 2),
        "attention_head_dim": (4, 8, 12),
        "use_linear_projection": True,
        "cross_attention_dim": 32 + 48,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 40,
    },
}


@dataclass(frozen=True, slots=True)
class Parts:
    """What a pipeline is built from; SD1.5 has one text encoder and tokenizer, SDXL two of each."""

    kind: Kind
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: AutoencoderKL
    text_encoders: tuple[TextEncoder, ...]
    tokenizers: tuple[CLIPTokenizer, ...]


def parts(kind: Kind = "sd15", *, seed: int = 0) -> Parts:
    """All parts of a pipeline of this kind, in evaluation mode, without gradients, the same for the same seed.

    The UNet and the ControlNet take (batch, 4, height, width) latent cells, and the latter an image of
    (batch, 3, 8·height, 8·width); the text is (batch, 77, 32) for SD1.5, and (batch, 77, 80) with (batch, 40) pooled for SDXL.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _frozen(UNet2DConditionModel(**_UNETS[kind]))
        unet.conv_out.weight *= 3  # noise of deviation 0.9, as a trained UNet predicts: what changes it changes the image
        words = _tokenizer()
        encoders: list[TextEncoder] = [CLIPTextModel(_text(words, 32, "quick_gelu"))]
        if kind == "sdxl":
            encoders.append(CLIPTextModelWithProjection(_text(words, 48, "gelu", projection_dim=40)))
        return Parts(
            kind=kind,
            unet=unet,
            controlnet=another_controlnet(unet, seed + 1),
            vae=_vae(kind),
            text_encoders=tuple(_frozen(encoder) for encoder in encoders),
            tokenizers=tuple(_tokenizer() for _ in encoders),
        )


def another_controlnet(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """A ControlNet with the UNet's topology and its own weights; image (batch, 3, 8·height, 8·width) for that many cells."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 24, 32), load_weights_from_unet=False)
        for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(convolution.weight, std=0.1)  # fresh, they are zero: nothing would be emitted
        for layer in net.controlnet_cond_embedding.modules():
            if isinstance(layer, torch.nn.Conv2d):  # fresh, the last is zero and the others fade the image to nothing
                torch.nn.init.normal_(layer.weight, std=1.7 * layer.weight[0].numel() ** -0.5)
        return _frozen(net)


def _frozen(module: Module) -> Module:
    return module.eval().requires_grad_(False)


def _vae(kind: Kind) -> AutoencoderKL:
    # nothing scaled: its last normalisation keeps pixels apart, by a deviation of 45/255, whatever the latents' size
    return _frozen(
        AutoencoderKL(
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=128,
            force_upcast=False,  # else the XL pipelines cast it at each call, and diffusers logs a warning
            scaling_factor=0.18215 if kind == "sd15" else 0.13025,
        )
    )


def _tokenizer() -> CLIPTokenizer:
    """Every byte is a word: CLIP's vocabulary before its merges."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)


def _text(words: CLIPTokenizer, width: int, activation: str, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act=activation,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,  # where the pooled text is read
        pad_token_id=words.pad_token_id,
        **more,
    )
