"""Pipelines whose UNet takes more than noise: masks, images, a noise level, guidance as an embedding.

Each with its UNet's session in place, against PyTorch's picture. The session computes in PyTorch, which takes no export; by
night it is ONNX Runtime's, with the file of our exporter.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import diffusers
import exports
import numpy as np
import pytest
import real_pipelines
import small
import torch

import shapecheck

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]
ALLOWED = 1e-4
SEEN = 2 / 255
PLAIN = small.SHALLOW | {"cross_attention_dim": 32}
XL = small.TEXT_TIME | small.SHALLOW | {"use_linear_projection": True}
WIDE, HIGH = real_pipelines.WIDTH, real_pipelines.HEIGHT
KINDS = {
    "inpaint": (diffusers.StableDiffusionInpaintPipeline, "sd15", PLAIN | {"in_channels": 9}, {}, {"strength": 0.6}),
    "inpaint-of-text": (diffusers.StableDiffusionInpaintPipeline, "sd15", PLAIN, {}, {"strength": 0.6}),
    "img2img": (diffusers.StableDiffusionImg2ImgPipeline, "sd15", PLAIN, {}, {"strength": 0.6}),
    "instruct-pix2pix": (
        diffusers.StableDiffusionInstructPix2PixPipeline,
        "sd15",
        PLAIN | {"in_channels": 8},
        {},
        {"image_guidance_scale": 2.5},
    ),
    "latent-consistency": (
        diffusers.LatentConsistencyModelPipeline,
        "sd15",
        PLAIN | {"time_cond_proj_dim": 12},
        {"scheduler": "lcm"},
        {"guidance_scale": 2.0, "original_inference_steps": 20},
    ),
    "upscale": (
        diffusers.StableDiffusionUpscalePipeline,
        "sd15",
        PLAIN | {"in_channels": 7, "num_class_embeds": 40},
        {"low_res_scheduler": diffusers.DDPMScheduler(num_train_timesteps=40), "max_noise_level": 35},
        {"noise_level": 33},
    ),
    "xl-img2img": (
        diffusers.StableDiffusionXLImg2ImgPipeline,
        "sdxl",
        XL | {"cross_attention_dim": 80, "projection_class_embeddings_input_dim": 6 * 8 + 40},
        {},
        {"denoising_start": 0.4},
    ),
    "xl-inpaint": (
        diffusers.StableDiffusionXLInpaintPipeline,
        "sdxl",
        XL | {"cross_attention_dim": 80, "projection_class_embeddings_input_dim": 6 * 8 + 40, "in_channels": 9},
        {},
        {"strength": 0.6},
    ),
}
"""Name → pipeline, whose other parts, what its UNet has, what else the pipeline is made of, and an argument that acts."""


def build(name, unet):
    class_, kind, _changes, others, _options = KINDS[name]
    parts = replace(real_pipelines.take_parts(kind), unet=unet)
    scheduler = real_pipelines.new_scheduler(others.get("scheduler", "ddim"))
    if name == "upscale":
        vae = copy.deepcopy(parts.vae)
        vae.register_to_config(scaling_factor=0.08333)
        parts = replace(parts, vae=vae)
    extra = {key: value for key, value in others.items() if key != "scheduler"}
    return real_pipelines.build(class_, parts, scheduler=scheduler, **extra)


def draw(name, unet, **options):
    pipe = build(name, unet)
    size = {"height": HIGH // 4, "width": WIDE // 4} if name == "upscale" else {"height": HIGH, "width": WIDE}
    return real_pipelines.images(pipe, **size, **options)


def worst(one, other):
    assert one.shape == other.shape
    assert np.isfinite(one).all()
    assert one.std() > 10 / 255  # no grey plane
    return float(np.abs(one - other).max())


def compare(name, session, unet):
    options = KINDS[name][-1]
    expected = draw(name, unet, **options)
    assert worst(draw(name, session, **options), expected) <= ALLOWED
    assert worst(expected, draw(name, unet)) > SEEN


def make_unet(name):
    unet = small.unet(**KINDS[name][2]).requires_grad_(False)
    with torch.no_grad():
        unet.conv_out.weight *= 3  # what changes the noise has to change the image
    return unet


@pytest.mark.parametrize("name", KINDS)
def test_what_else_a_unet_takes_reaches_the_session(name):
    unet = make_unet(name)
    compare(name, shapecheck.load(unet, "torch"), unet)


@pytest.mark.nightly
@pytest.mark.parametrize("name", KINDS)
def test_what_else_a_unet_takes_reaches_the_file(name):
    unet = make_unet(name)
    compare(name, shapecheck.load(exports.exported_once(unet).path, "ort"), unet)
