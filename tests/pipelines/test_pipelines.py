"""Real pipelines with a session in the UNet's place: the same images as with PyTorch, and what acts on them.

By default once with all of SD1.5's slots, and once with SDXL's inputs on two levels; other pipelines and schedulers are `full`.
"""

from __future__ import annotations

import numpy as np
import onnx_files
import pytest
import real_pipelines
import torch
from diffusers import MultiControlNetModel

import shapecheck
from shapecheck import ShapecheckError
from shapecheck.pipelines.tiny_pipeline import build_controlnet
from shapecheck.runtime.dropin import UnsupportedError

ALLOWED = 1 / 255
SEEN = 2 / 255
MANY = {"num_inference_steps": 6}
"""Steps enough for every formula of a scheduler that looks back."""
SCHEDULERS = ("euler", "euler-ancestral", "lcm", "unipc", "pndm")


pytestmark = pytest.mark.usefixtures("one_thread")


def draw_both(name, *, parts=None, scheduler="ddim", **options):
    """The images with PyTorch's UNet, and with the file in its place."""
    parts = parts or real_pipelines.kind(name)
    unet, new = real_pipelines.open_session(parts), real_pipelines.new_scheduler(scheduler)
    pipe = real_pipelines.PIPELINES[name](real_pipelines.take_parts(parts), unet=unet, scheduler=new)
    expected = real_pipelines.draw_in_torch(name, parts, scheduler=scheduler, **options)
    return expected, real_pipelines.images(pipe, **options)


def worst(one, other):
    assert one.shape == other.shape
    assert np.isfinite(one).all()
    assert one.std() > 10 / 255  # no grey plane
    return float(np.abs(one - other).max())


def test_a_file_gives_the_images_that_pytorch_gives():
    assert worst(*draw_both("controlnet")) <= ALLOWED


def test_a_file_is_given_what_sdxl_adds():
    assert worst(*draw_both("xl-text", parts="shallow-xl")) <= ALLOWED


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in real_pipelines.PIPELINES if name != "controlnet"])
def test_a_file_gives_every_pipeline_its_images(name):
    assert worst(*draw_both(name)) <= ALLOWED


PAIRED = [
    ("controlnet", "pndm"),
    ("controlnet", "unipc"),
    ("controlnet-img2img", "euler"),
    ("controlnet-img2img", "lcm"),
    ("controlnet-inpaint", "euler-ancestral"),
    ("controlnet-inpaint", "pndm"),
    ("text", "unipc"),
    ("xl-controlnet", "euler"),
    ("xl-controlnet", "euler-ancestral"),
    ("xl-controlnet-img2img", "pndm"),
    ("xl-controlnet-img2img", "unipc"),
    ("xl-text", "lcm"),
]
"""Every scheduler with a UNet of SD1.5 and one of SDXL, and every pipeline with one that is not DDIM."""


@pytest.mark.full
@pytest.mark.parametrize(("name", "scheduler"), PAIRED)
def test_it_does_so_with_other_schedulers(name, scheduler):
    assert worst(*draw_both(name, scheduler=scheduler, **MANY)) <= ALLOWED


@pytest.mark.nightly
@pytest.mark.parametrize("name", real_pipelines.PIPELINES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_pipeline_does_so_with_every_scheduler(name, scheduler):
    assert worst(*draw_both(name, scheduler=scheduler, num_inference_steps=10)) <= ALLOWED


@pytest.mark.full
@pytest.mark.parametrize("scheduler", ["lcm", "pndm", "euler-ancestral"])
def test_schedulers_without_guidance_keep_what_they_were_given(scheduler):
    """PNDM keeps the images of several steps: none may be written over."""
    assert worst(*draw_both("controlnet", scheduler=scheduler, guidance_scale=1.0, **MANY)) <= ALLOWED


@pytest.mark.full
def test_an_output_that_is_written_over_is_seen_so_that_the_test_above_can_fail():
    parts = real_pipelines.take_parts("sd15")
    unet = shapecheck.load(real_pipelines.export_unet("sd15"), "ort", own_outputs=False)
    pipe = real_pipelines.PIPELINES["controlnet"](parts, unet=unet, scheduler=real_pipelines.new_scheduler("pndm"))
    expected = real_pipelines.draw_in_torch("controlnet", "sd15", scheduler="pndm", guidance_scale=1.0, **MANY)
    assert worst(expected, real_pipelines.images(pipe, guidance_scale=1.0, **MANY)) > SEEN


CASES = {
    "guess mode": {"guess_mode": True},
    "guess mode without guidance": {"guess_mode": True, "guidance_scale": 1.0},
    "half the strength": {"controlnet_conditioning_scale": 0.5},
    "between": {"control_guidance_start": 0.3, "control_guidance_end": 0.6},
    "two images": {"num_images_per_prompt": 2},
}


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["controlnet", "xl-controlnet"])
def test_what_a_pipeline_does_to_residuals_reaches_the_file(name, case):
    expected, found = draw_both(name, **CASES[case])
    assert worst(expected, found) <= ALLOWED
    if case != "two images":
        plain = {key: value for key, value in CASES[case].items() if key == "guidance_scale"}
        assert worst(found, real_pipelines.draw_in_torch(name, real_pipelines.kind(name), **plain)) > SEEN


@pytest.mark.full
def test_several_controlnets_and_their_exchange():
    parts, unet = real_pipelines.take_parts("sd15"), real_pipelines.open_session("sd15")
    other = build_controlnet(parts.unet, 7)
    image = [picture(real_pipelines.HEIGHT, real_pipelines.WIDTH) for picture in (real_pipelines.rings, real_pipelines.waves)]
    options = {"image": image, "controlnet_conditioning_scale": [0.7, 0.4]}

    def draw(unet, nets):
        return real_pipelines.images(
            real_pipelines.PIPELINES["controlnet"](parts, unet=unet, controlnet=MultiControlNetModel(nets)), **options
        )

    found = []
    for nets in ([parts.controlnet, other], [other, parts.controlnet]):
        found.append(draw(unet, nets))
        assert worst(draw(parts.unet, nets), found[-1]) <= ALLOWED
    assert worst(*found) > SEEN


def test_a_controlnet_acts_and_another_acts_otherwise():
    parts, unet = real_pipelines.take_parts("sd15"), real_pipelines.open_session("sd15")
    other = build_controlnet(parts.unet, 7)
    controlled = real_pipelines.PIPELINES["controlnet"](parts, unet=unet)
    on = real_pipelines.images(controlled)
    off = real_pipelines.images(real_pipelines.PIPELINES["text"](parts, unet=unet))
    exchanged = real_pipelines.images(real_pipelines.PIPELINES["controlnet"](parts, unet=unet, controlnet=other))
    zero = real_pipelines.images(controlled, controlnet_conditioning_scale=0.0)
    assert worst(on, off) > SEEN
    assert worst(on, exchanged) > SEEN
    assert worst(off, zero) <= ALLOWED


def test_on_off_on_and_sizes_and_controlnets_between_leave_nothing_behind():
    """Bitwise what fresh sessions give, whatever was computed before."""
    parts, path = real_pipelines.take_parts("shallow"), real_pipelines.export_unet("shallow")
    nets = {"": None, "own": parts.controlnet, "other": build_controlnet(parts.unet, 7)}
    runs = [
        ("text", "", (72, 104)),
        ("controlnet", "own", (72, 104)),
        ("controlnet", "other", (72, 104)),
        ("controlnet", "own", (64, 120)),
        ("text", "", (64, 120)),
        ("controlnet", "own", (72, 104)),
        ("text", "", (72, 104)),
    ]

    def draw(unet, name, net, size):
        pipe = real_pipelines.PIPELINES[name](parts, unet=unet, controlnet=nets[net])
        return real_pipelines.images(pipe, num_inference_steps=2, height=size[0], width=size[1])

    expected = {run: draw(shapecheck.load(path, "ort"), *run) for run in dict.fromkeys(runs)}
    kept = shapecheck.load(path, "ort", own_outputs=False)
    for run in runs:
        assert np.array_equal(draw(kept, *run), expected[run])
    assert len({image.tobytes() for image in expected.values()}) == len(expected) == 5


@pytest.mark.full
def test_strength_is_turned_while_it_runs():
    """`callback_on_step_end` with the prompt of the callback, and the strength taken anew in every frame."""
    parts = real_pipelines.take_parts("sd15")
    found = []
    for unet in (parts.unet, real_pipelines.open_session("sd15")):
        pipe = real_pipelines.PIPELINES["controlnet"](parts, unet=unet)
        seen = []

        def turn(pipe, step, timestep, values, seen=seen):
            seen.append(step)
            return {"latents": values["latents"] * (0.9 if step == 1 else 1)}

        found.append(real_pipelines.images(pipe, callback_on_step_end=turn))
        assert seen == [0, 1, 2, 3]
    assert worst(*found) <= ALLOWED
    assert worst(found[1], real_pipelines.draw_in_torch("controlnet", "sd15")) > SEEN


@pytest.mark.full
def test_an_exported_controlnet_takes_a_controlnets_place(tmp_path):
    """Alone, with guess mode and a strength, and among several; the same file twice."""
    parts, unet = real_pipelines.take_parts("sd15"), real_pipelines.open_session("sd15")
    drop = shapecheck.load(onnx_files.controlnet_written(tmp_path / "controlnet.onnx", parts.controlnet, latent=(9, 13)))
    for options in ({}, {"guess_mode": True}, {"controlnet_conditioning_scale": 0.4}):
        ours, theirs = (
            real_pipelines.images(real_pipelines.PIPELINES["controlnet"](parts, unet=unet, controlnet=net), **options)
            for net in (drop, parts.controlnet)
        )
        assert worst(ours, theirs) <= ALLOWED
    image = [picture(real_pipelines.HEIGHT, real_pipelines.WIDTH) for picture in (real_pipelines.rings, real_pipelines.waves)]
    options = {"image": image, "controlnet_conditioning_scale": [0.7, 0.4]}
    ours, theirs = (
        real_pipelines.images(real_pipelines.PIPELINES["controlnet"](parts, controlnet=MultiControlNetModel(nets)), **options)
        for nets in ([drop, drop], [parts.controlnet, parts.controlnet])
    )
    assert worst(ours, theirs) <= ALLOWED


def test_what_a_session_cannot_do_is_said_by_pipelines_too(monkeypatch):
    unet = real_pipelines.open_session("shallow")
    pipe = real_pipelines.PIPELINES["controlnet"](real_pipelines.take_parts("sd15"), unet=unet)
    with pytest.raises(UnsupportedError, match=r"enable_freeu: .* use the PyTorch UNet with it"):
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    for module in ("utils", "loaders.lora_pipeline"):  # diffusers looks it up in one or the other
        monkeypatch.setattr(f"diffusers.{module}.USE_PEFT_BACKEND", True, raising=False)
    lora = {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 32)}
    with pytest.raises(UnsupportedError, match=r"load_lora_weights: .*pipe\.fuse_lora\(\), then export"):
        pipe.load_lora_into_unet(lora, None, pipe.unet)
    pipe.load_lora_into_unet({"text_encoder.layer.weight": torch.zeros(2)}, None, pipe.unet)
    with pytest.raises(UnsupportedError, match="down_blocks: an exported model has no layers"):
        pipe.set_ip_adapter_scale(0.5)
    assert not hasattr(pipe.unet, "attn_processors")
    with pytest.raises(ShapecheckError, match="this session runs on cpu: it takes no inputs on meta"):
        pipe.unet.to("meta")
    assert pipe.unet.to("cpu") is pipe.unet
