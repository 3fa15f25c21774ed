"""A small Stable Diffusion pipeline of the real classes: SD1.5's topology in a hundredth of its width, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shapecheck.logs import silence_logger


def build_tiny_pipeline(*, seed: int = 0) -> Any:
    """Return a StableDiffusionControlNetPipeline in evaluation mode, without gradients, the same for the same seed.

    Its UNet and ControlNet take (batch, 4, height, width) latent cells and text of (batch, 77, 32), and the ControlNet an image
    of (batch, 3, 8·height, 8·width).
    """
    with silence_logger("transformers"):
        from diffusers import StableDiffusionControlNetPipeline
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            norm_num_groups=8,
            block_out_channels=(32, 64, 96, 96),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=8,
            cross_attention_dim=32,
        )
        # Noise of deviation 0.9, as a trained UNet predicts: what changes the noise has to change the image.
        unet.conv_out.weight *= 3
        # CLIP's vocabulary before the merges: every byte is a word.
        letters = sorted(ByteLevel.alphabet())
        words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,  # where the pooled text is read
            pad_token_id=tokenizer.pad_token_id,
        )
        text_encoder = CLIPTextModel(text_config)
        controlnet = build_controlnet(unet, seed + 1)
        # No norm is scaled: the last one keeps pixels apart, by a deviation of 45/255, whatever the latents' size.
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
            sample_size=128,
            force_upcast=False,  # else the XL pipelines cast it at each call, and diffusers logs a warning
        )
    for module in (unet, text_encoder, vae):
        module.eval().requires_grad_(False)
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return StableDiffusionControlNetPipeline(
        vae=vae,
        unet=unet,
        controlnet=controlnet,
        scheduler=DDIMScheduler(**betas, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_controlnet(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """Return a ControlNet of the UNet's topology with its own weights, for images of (batch, 3, 8·height, 8·width)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 24, 32), load_weights_from_unet=False)
        # These are zero in a new ControlNet: nothing would be emitted.
        for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(convolution.weight, std=0.1)
        # Of these the last is zero, and the others fade the image to nothing.
        for layer in net.controlnet_cond_embedding.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.normal_(layer.weight, std=1.7 * layer.weight[0].numel() ** -0.5)
        return net.eval().requires_grad_(False)
