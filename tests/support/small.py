"""Small real models: the topology of SD1.5 at a width that runs on a CPU in milliseconds."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)

torch.set_num_threads(1)  # threads that wait for each other cost more than models this small compute

SMALL = {
    "sample_size": 16,
    "in_channels": 4,
    "block_out_channels": (8, 16, 24, 24),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
SHALLOW = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
"""Two levels, five slots."""
TINY = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
}
"""One level, three slots."""
TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
"""SDXL's conditioning."""


def unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**SMALL | changes).eval()


def controlnet(of: UNet2DConditionModel, *, seed: int = 1) -> ControlNetModel:
    """A ControlNet whose zero convolutions are not zero: a fresh one emits nothing but zeros."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(of, conditioning_embedding_out_channels=(8, 8, 8, 8), load_weights_from_unet=False)
    fill_zero_convolutions(net)
    return net.eval()


def fill_zero_convolutions(net: ControlNetModel) -> None:
    with torch.no_grad():
        for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(convolution.weight, std=0.1)


def pipeline(unet_: UNet2DConditionModel, controlnet_) -> StableDiffusionControlNetPipeline:
    """A real pipeline without a text encoder: give it prompt_embeds."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    )
    pipe = StableDiffusionControlNetPipeline(
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        unet=unet_,
        controlnet=controlnet_,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: StableDiffusionControlNetPipeline, **options):
    """One step of the pipeline at 104×136 pixels, classifier-free guidance on."""
    image = torch.rand(1, 3, 104, 136, generator=torch.Generator().manual_seed(2))
    embeds = torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(3))
    several = {"image": image} | options
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=-embeds,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(4),
        output_type="pt",
        height=104,
        width=136,
        **several,
    )
