"""Arguments and methods of diffusers' pipelines, with PyTorch's UNet and with a session in its place.

Here is what diffusers' own tests of these pipelines give and call. Each acts and draws PyTorch's picture, or is refused by its
name. By default several arguments at once; each by itself is `full`, and at the depth of SD1.5 and SDXL `nightly`.
"""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import pytest
import real_pipelines
import torch

from shapecheck.runtime.dropin import UnsupportedError

pytestmark = pytest.mark.usefixtures("one_thread")
ALLOWED = 1e-4
SEEN = 2 / 255
HEIGHT, WIDTH = real_pipelines.HEIGHT, real_pipelines.WIDTH
PROMPTS = ["a red chair by the window", "two boats"]
CELLS = np.random.default_rng(3).standard_normal((1, 4, HEIGHT // 8, WIDTH // 8)).astype(np.float32)


def embed(pipe):
    """Return another prompt and its opposite as the pipeline's text encoders give them."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    found = pipe.encode_prompt(
        prompt="a blue door", negative_prompt="dark", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    return dict(zip(names, found, strict=False)) | {"prompt": None, "negative_prompt": None}


def begin_with_cells(_pipe):
    return {"latents": torch.from_numpy(CELLS)}


def raise_guidance(_pipe):
    """Raise the guidance after each step, and the latents that come back with it."""

    def on_step_end(pipe, _step, _timestep, values):
        pipe._guidance_scale += 3.0
        return {"latents": values["latents"] * 0.95}

    return {"callback_on_step_end": on_step_end}


def stop_early(_pipe):
    def on_step_end(pipe, step, _timestep, values):
        pipe._interrupt = step == 0
        return values

    return {"callback_on_step_end": on_step_end}


def two_generators(_pipe):
    return {"prompt": PROMPTS, "negative_prompt": None, "generator": [torch.Generator().manual_seed(seed) for seed in (8, 9)]}


ARGUMENTS = {
    "embeddings": embed,
    "no-negative-prompt": {"negative_prompt": None},
    "two-prompts": {"prompt": PROMPTS, "negative_prompt": ["", "grey"]},
    "two-generators": two_generators,
    "two-images": {"num_images_per_prompt": 2},
    "no-guidance": {"guidance_scale": 1.0},
    "guidance_rescale": {"guidance_rescale": 0.7},
    "eta": {"eta": 0.7},
    "clip_skip": {"clip_skip": 1},
    "latents": begin_with_cells,
    "strength": {"strength": 0.5},
    "timesteps": {"timesteps": [951, 601, 201, 3]},
    "sigmas": {"sigmas": [9.0, 3.0, 0.9, 0.05]},
    "other-size": {"height": 64, "width": 120},
    "output-latent": {"output_type": "latent"},
    "output-pil": {"output_type": "pil"},
    "output-pt": {"output_type": "pt"},
    "cross_attention_kwargs": {"cross_attention_kwargs": {}},
    "callback": raise_guidance,
    "interrupt": stop_early,
    "guess_mode": {"guess_mode": True},
    "controlnet_conditioning_scale": {"controlnet_conditioning_scale": 0.5},
    "control_guidance": {"control_guidance_start": 0.3, "control_guidance_end": 0.6},
    "prompt_2": {"prompt_2": "in fog", "negative_prompt_2": "bright"},
    "denoising_end": {"denoising_end": 0.5},
    "denoising_start": {"denoising_start": 0.4},
    "sizes": {"original_size": (40, 50), "target_size": (900, 700), "crops_coords_top_left": (31, 7)},
    "negative_sizes": {"negative_original_size": (40, 50), "negative_target_size": (900, 700)},
}
"""Name → options of a call, or what makes them of the pipeline."""
UNSEEN = {"output-pil", "output-pt", "cross_attention_kwargs", "two-images"}
"""What draws the first image as without it."""
SCHEDULERS = {"timesteps": "euler", "sigmas": "euler", "eta": "ddim"}


def takes(name, case):
    options = ARGUMENTS[case]
    if case == "clip_skip" and not name.startswith("xl-"):
        return False  # PyTorch's fails too: diffusers 0.42 reads `text_model`, which transformers 5 has no more
    if (name, case) == ("controlnet-img2img", "two-images"):
        return False  # deprecated there: an image is to be given for each
    accepted = inspect.signature(real_pipelines.PIPELINES[name].args[0].__call__).parameters
    needed = {"latents"} if options is begin_with_cells else set() if callable(options) else set(options)
    if options is begin_with_cells and "strength" in accepted:
        return False  # those are of an image that is given
    return needed <= set(accepted)


PAIRS = [(name, case) for name in real_pipelines.PIPELINES for case in ARGUMENTS if takes(name, case)]


def as_array(images):
    if isinstance(images, list):
        return np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
    return images.numpy() if isinstance(images, torch.Tensor) else images


def draw(name, parts, case=None, *, unet=None, scheduler="ddim"):
    pipe = real_pipelines.PIPELINES[name](parts, unet=unet, scheduler=real_pipelines.new_scheduler(scheduler))
    options = ARGUMENTS.get(case, {})
    return as_array(real_pipelines.images(pipe, **(options(pipe) if callable(options) else options)))


def worst(one, other):
    assert one.shape == other.shape
    assert np.isfinite(one).all()
    assert one.std() > 10 / 255  # no grey plane
    return float(np.abs(one - other).max())


def compare(name, case, key):
    parts, session, scheduler = real_pipelines.take_parts(key), real_pipelines.open_session(key), SCHEDULERS.get(case, "ddim")
    expected = draw(name, parts, case, scheduler=scheduler)
    # a picture of eight bits may round the other way
    allowed = 1 / 255 + ALLOWED if case == "output-pil" else ALLOWED
    assert worst(draw(name, parts, case, unet=session, scheduler=scheduler), expected) <= allowed
    plain = draw(name, parts, scheduler=scheduler)
    if case not in UNSEEN and expected.shape == plain.shape:
        assert worst(expected, plain) > SEEN


@pytest.mark.full
@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_each_argument_draws_pytorchs_picture(name, case):
    compare(name, case, {"sd15": "shallow", "sdxl": "shallow-xl"}[real_pipelines.kind(name)])


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_each_argument_does_so_at_full_depth(name, case):
    compare(name, case, real_pipelines.kind(name))


def test_arguments_together_draw_pytorchs_picture():
    """Embeddings of another prompt, noise added in each step, guidance rescaled and raised from step to step."""
    parts, found = real_pipelines.take_parts("shallow"), []
    for unet in (parts.unet, real_pipelines.open_session("shallow")):
        pipe = real_pipelines.PIPELINES["text"](parts, unet=unet)
        options = {"eta": 0.7, "guidance_rescale": 0.6, **embed(pipe), **raise_guidance(pipe)}
        found.append(real_pipelines.images(pipe, **options))
    assert worst(*found) <= ALLOWED
    assert worst(found[1], draw("text", parts)) > SEEN


METHODS = {
    "vae-slicing": lambda pipe: pipe.vae.enable_slicing(),
    "vae-tiling": lambda pipe: pipe.vae.enable_tiling(),
    "attention-slicing": lambda pipe: pipe.enable_attention_slicing(),
    "no-attention-slicing": lambda pipe: pipe.disable_attention_slicing(),
    "to-cpu": lambda pipe: pipe.to("cpu"),
    "to-float32": lambda pipe: pipe.to(torch.float32),
    "free-hooks": lambda pipe: pipe.maybe_free_model_hooks(),
    "components": lambda pipe: type(pipe)(**pipe.components, requires_safety_checker=False),
    "from_pipe": lambda pipe: type(pipe).from_pipe(pipe, requires_safety_checker=False),
    "disable_freeu": lambda pipe: pipe.disable_freeu(),
}
"""What leaves the picture as it is."""


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_what_changes_no_picture_changes_none(method):
    parts, found = real_pipelines.build_parts("sd15"), []  # its own: the VAE is told to slice
    parts = real_pipelines.replace(parts, unet=real_pipelines.take_parts("shallow").unet)
    for unet in (parts.unet, real_pipelines.open_session("shallow")):
        pipe = real_pipelines.PIPELINES["text"](parts, unet=unet)
        changed = METHODS[method](pipe)
        pipe = changed if isinstance(changed, diffusers.DiffusionPipeline) else pipe
        pipe.set_progress_bar_config(disable=True)
        found.append(real_pipelines.images(pipe))
    assert worst(*found) <= ALLOWED


REFUSED = {
    "enable_freeu": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "fuse_qkv_projections": lambda pipe: pipe.fuse_qkv_projections(),
    "set_attn_processor": lambda pipe: pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor()),
    "xformers": lambda pipe: pipe.unet.enable_xformers_memory_efficient_attention(),
    "set_attention_slice": lambda pipe: pipe.unet.set_attention_slice("auto"),
    "gradient_checkpointing": lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    "load_state_dict": lambda pipe: pipe.unet.load_state_dict({}),
}
"""Word of the feature → what asks for it."""


@pytest.mark.parametrize("word", REFUSED)
def test_what_an_exported_unet_cannot_do_is_refused_by_its_name(word):
    pipe = real_pipelines.PIPELINES["text"](real_pipelines.take_parts("shallow"), unet=real_pipelines.open_session("shallow"))
    with pytest.raises(UnsupportedError, match=word):
        REFUSED[word](pipe)
