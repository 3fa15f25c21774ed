"""Whole real pipelines made of small parts, the UNet of these parts as a file, and the images that they give.

What is shared here is made once: the parts and a session once a process, a file and PyTorch's images once a run. Who changes
parts takes some of its own, from `build_parts`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import engines
import numpy as np
import small
import torch
from artefacts import make_once
from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import shapecheck
from shapecheck.pipelines.tiny_pipeline import build_controlnet, build_tiny_pipeline
from shapecheck.runtime.dropin import DropIn

Kind = Literal["sd15", "sdxl"]
STEPS = 4
HEIGHT, WIDTH = 72, 104  # pixels: 9×13 latent cells, odd at the first level already
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "lcm": (diffusers.LCMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
}
"""Name → class and settings beside those of every Stable Diffusion; Euler ancestral as in Turbo."""


@contextmanager
def quiet():
    """Without the one warning of Euler's and UniPC's: they hand NumPy 2 a tensor, whose __array__ torch wrote for NumPy 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning, "diffusers")
        yield


def new_scheduler(name: str):
    """A new one: a scheduler keeps state from step to step."""
    class_, settings = SCHEDULERS[name]
    with quiet():
        return class_(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **settings)


@dataclass(frozen=True)
class Parts:
    """The modules of a pipeline; SD1.5 has one text encoder and tokenizer, SDXL two of each."""

    kind: Kind
    unet: Any
    controlnet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]


def build_parts(kind: Kind) -> Parts:
    """Return new parts: those of the small pipeline of `shapecheck demo`, or for SDXL with its own UNet and a second encoder.

    The text is (batch, 77, 32) for SD1.5, and (batch, 77, 80) with (batch, 40) pooled for SDXL.
    """
    pipe = build_tiny_pipeline()
    if kind == "sd15":
        return Parts(kind, pipe.unet, pipe.controlnet, pipe.vae, (pipe.text_encoder,), (pipe.tokenizer,))
    pipe.vae.register_to_config(scaling_factor=0.13025)
    changes = {"hidden_size": 48, "intermediate_size": 96, "hidden_act": "gelu", "projection_dim": 40}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**SDXL).eval().requires_grad_(False)
        unet.conv_out.weight *= 3  # as in the small pipeline: what changes the noise has to change the image
        config = CLIPTextConfig(**pipe.text_encoder.config.to_dict() | changes)
        second = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    encoders, tokenizers = (pipe.text_encoder, second), (pipe.tokenizer, build_tiny_pipeline().tokenizer)
    return Parts(kind, unet, build_controlnet(unet, 1), pipe.vae, encoders, tokenizers)


SDXL = {
    "sample_size": 16,
    "norm_num_groups": 8,
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
}
"""SDXL's topology, small."""


def build(class_, parts: Parts, *, unet=None, controlnet=None, scheduler=None, **others) -> DiffusionPipeline:
    """The pipeline of these parts; a UNet, ControlNet or scheduler given takes the place of theirs, and others are added."""
    offered = {
        "vae": parts.vae,
        "unet": unet or parts.unet,
        "controlnet": controlnet or parts.controlnet,
        "scheduler": scheduler or new_scheduler("ddim"),
        "text_encoder": parts.text_encoders[0],
        "text_encoder_2": parts.text_encoders[-1],
        "tokenizer": parts.tokenizers[0],
        "tokenizer_2": parts.tokenizers[-1],
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        "add_watermarker": False,
        **others,
    }
    wanted = inspect.signature(class_).parameters.keys()
    pipe = class_(**{name: value for name, value in offered.items() if name in wanted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "controlnet": partial(build, diffusers.StableDiffusionControlNetPipeline),
    "controlnet-img2img": partial(build, diffusers.StableDiffusionControlNetImg2ImgPipeline),
    "controlnet-inpaint": partial(build, diffusers.StableDiffusionControlNetInpaintPipeline),
    "text": partial(build, diffusers.StableDiffusionPipeline),
    "xl-controlnet": partial(build, diffusers.StableDiffusionXLControlNetPipeline),
    "xl-controlnet-img2img": partial(build, diffusers.StableDiffusionXLControlNetImg2ImgPipeline),
    "xl-text": partial(build, diffusers.StableDiffusionXLPipeline),
}


SHALLOW: dict[str, tuple[Kind, dict]] = {
    "shallow": ("sd15", {"cross_attention_dim": 32}),
    "shallow-xl": (
        "sdxl",
        small.TEXT_TIME
        | {"cross_attention_dim": 80, "use_linear_projection": True, "projection_class_embeddings_input_dim": 88},
    ),
}
"""Name → the kind whose other parts they have, and what their UNet takes of those; it has two levels and five slots."""


def kind(name: str) -> Kind:
    """Which parts the pipeline of this name is made of."""
    return "sdxl" if name.startswith("xl-") else "sd15"


@cache
def take_parts(name: str) -> Parts:
    """Return the parts of SD1.5's or SDXL's topology, or with a UNet and a ControlNet of two levels, in a tenth of the time."""
    if name not in SHALLOW:
        return build_parts(name)
    of, changes = SHALLOW[name]
    unet = small.unet(**small.SHALLOW | changes).requires_grad_(False)
    unet.conv_out.weight *= 3  # as in other parts: what changes the noise has to change the image
    return replace(build_parts(of), unet=unet, controlnet=build_controlnet(unet, 1))


def export_unet(name: str) -> Path:
    """Return the file of these parts' UNet, its contract inside."""
    return engines.export_sealed(take_parts(name).unet)


@cache
def open_session(name: str) -> DropIn:
    """Return a session of these parts' UNet that whoever asks shares: opening one takes longer than ten images."""
    return shapecheck.load(export_unet(name), "ort")


def draw_in_torch(name: str, parts: str, *, scheduler: str = "ddim", **options) -> np.ndarray:
    """Return the images of a pipeline of these parts with PyTorch's UNet; options are those of `images`, as JSON."""

    def draw(folder: Path) -> None:
        pipe = PIPELINES[name](take_parts(parts), scheduler=new_scheduler(scheduler))
        np.save(folder / "images.npy", images(pipe, **options))

    recipe = {"images": name, "parts": parts, "scheduler": scheduler, "steps": STEPS, "options": options}
    return np.load(make_once(recipe, draw) / "images.npy")


def rings(height: int, width: int) -> np.ndarray:
    """A control image with edges at every scale, each colour another: (1, height, width, 3), 0 to 1."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    far = np.hypot(y - height / 3, x - width / 4)
    return np.stack([(far // 9) % 2, np.sign(x - y) / 2 + 0.5, x / width], axis=-1)[None].astype(np.float32)


def waves(height: int, width: int) -> np.ndarray:
    """An image to start from: (1, height, width, 3), 0 to 1."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return (np.stack([np.sin(y / 7), np.cos(x / 11), np.sin((x + y) / 17)], axis=-1) / 2 + 0.5)[None].astype(np.float32)


def mask(height: int, width: int) -> np.ndarray:
    """What to paint anew, the right half without a border: (1, height, width), 0 or 1."""
    shape = np.zeros((1, height, width), dtype=np.float32)
    shape[:, 8 : height - 8, width // 2 :] = 1
    return shape


def pictures(pipe: DiffusionPipeline, height: int, width: int) -> dict[str, np.ndarray]:
    """Those this pipeline asks for, by argument."""
    wanted = inspect.signature(type(pipe).__call__).parameters.keys()
    offered = {
        "image": waves(height, width) if "control_image" in wanted else rings(height, width),
        "control_image": rings(height, width),
        "mask_image": mask(height, width),
    }
    return {name: picture for name, picture in offered.items() if name in wanted}


def images(pipe: DiffusionPipeline, **options) -> np.ndarray:
    """The pipeline's images, (batch, height, width, 3) from 0 to 1; every argument of the call can be given anew."""
    settings = {
        "prompt": "a red chair by the window",
        "negative_prompt": "blurred",
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0,
        "height": HEIGHT,
        "width": WIDTH,
        "generator": torch.Generator().manual_seed(4),
        "output_type": "np",
    } | options
    for name, value in {"controlnet_conditioning_scale": 1.0, "strength": 0.8}.items():  # left out, it depends on the pipeline
        if name in inspect.signature(type(pipe).__call__).parameters:
            settings.setdefault(name, value)
    prompts = len(settings["prompt"]) if isinstance(settings["prompt"], list) else 1  # none: embeddings are given
    for name, picture in pictures(pipe, settings["height"], settings["width"]).items():
        settings.setdefault(name, np.repeat(picture, prompts, axis=0))
    accepted = inspect.signature(type(pipe).__call__).parameters
    for name in ("negative_prompt", "height", "width"):  # some take these from the image, or have guidance as an embedding
        if name not in accepted:
            settings.pop(name)
    with quiet():
        return pipe(**settings).images
