"""What surrounds the UNets of Stable Diffusion in a pipeline: the usual VAE and text encoders, by the width of the text.

Configs hold what differs from the defaults of diffusers' and transformers' classes. They are those of stable-diffusion-v1-5,
stable-diffusion-2-1-base and stable-diffusion-xl-base-1.0: vae/, text_encoder/ and text_encoder_2/config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
}
_CLIP_L: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_OPENCLIP_H = _CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPENCLIP_BIGG = _CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
TEXT_ENCODERS: Mapping[int, tuple[Mapping[str, Any], ...]] = {
    768: (_CLIP_L,),
    1024: (_OPENCLIP_H,),
    2048: (_CLIP_L, _OPENCLIP_BIGG),
}
"""From a UNet's `cross_attention_dim` to the encoders whose texts it takes."""
