"""Real pipelines with a session in the UNet's place: the same images as with PyTorch, and what acts on them."""

from __future__ import annotations

import engines
import numpy as np
import onnx_files
import pytest
import real_pipelines as pipes
import torch
from diffusers import MultiControlNetModel

import shapecheck
from shapecheck import ShapecheckError
from shapecheck.pipelines import small as parts_of
from shapecheck.run.dropin import UnsupportedError

ALLOWED = 1 / 255
SEEN = 2 / 255
QUICK = ("controlnet", "xl-text")
"""What runs in every run of the tests; the others are marked `full`."""
CONTROLLED = [name for name in pipes.PIPELINES if "controlnet" in name]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Parts, and the UNet of these parts as a file, each kind once."""
    folder = tmp_path_factory.mktemp("pipelines")
    kept = {}

    def make(kind):
        if kind not in kept:
            parts = parts_of.parts(kind)
            path, contract = onnx_files.written(folder / f"{kind}.onnx", parts.unet, latent=(9, 13))
            kept[kind] = parts, engines.sealed(path, contract)
        return kept[kind]

    return make


def both(made, name, *, scheduler="ddim", controlnet=None, **options):
    """The images with PyTorch's UNet, and with the file in its place."""
    parts, path = made(pipes.kind(name))
    found = []
    for unet in (None, shapecheck.load(path, "ort")):
        pipe = pipes.PIPELINES[name](parts, unet=unet, controlnet=controlnet, scheduler=pipes.new_scheduler(scheduler))
        found.append(pipes.images(pipe, **options))
    return found


def worst(one, other):
    assert one.shape == other.shape
    assert np.isfinite(one).all()
    assert one.std() > 10 / 255  # no grey plane
    return float(np.abs(one - other).max())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name not in QUICK)) for name in pipes.PIPELINES]
)
def test_a_file_gives_the_images_that_pytorch_gives(made, name):
    assert worst(*both(made, name)) <= ALLOWED


@pytest.mark.full
@pytest.mark.parametrize("name", pipes.PIPELINES)
@pytest.mark.parametrize("scheduler", ["euler", "euler-ancestral", "lcm", "unipc", "pndm"])
def test_it_does_so_with_every_scheduler(made, name, scheduler):
    assert worst(*both(made, name, scheduler=scheduler)) <= ALLOWED


@pytest.mark.full
@pytest.mark.parametrize("scheduler", ["lcm", "pndm", "euler-ancestral"])
def test_schedulers_without_guidance_keep_what_they_were_given(made, scheduler):
    """PNDM keeps the images of several steps: none may be written over."""
    assert worst(*both(made, "controlnet", scheduler=scheduler, guidance_scale=1.0)) <= ALLOWED


@pytest.mark.full
def test_an_output_that_is_written_over_is_seen_so_that_the_test_above_can_fail(made):
    parts, path = made("sd15")
    images = []
    for own in (True, False):
        unet = shapecheck.load(path, "ort", own_outputs=own)
        pipe = pipes.PIPELINES["controlnet"](parts, unet=unet, scheduler=pipes.new_scheduler("pndm"))
        images.append(pipes.images(pipe, guidance_scale=1.0))
    assert worst(*images) > SEEN


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
def test_what_a_pipeline_does_to_residuals_reaches_the_file(made, name, case):
    plain, options = {"num_inference_steps": 4}, {"num_inference_steps": 4} | CASES[case]
    found = both(made, name, **options)
    assert worst(*found) <= ALLOWED
    if case != "two images":
        parts, path = made(pipes.kind(name))
        usual = pipes.images(pipes.PIPELINES[name](parts, unet=shapecheck.load(path, "ort")), **plain | {
            key: value for key, value in options.items() if key == "guidance_scale"
        })  # fmt: skip
        assert worst(found[1], usual) > SEEN


@pytest.mark.full
def test_several_controlnets_and_their_exchange(made):
    parts, _ = made("sd15")
    other = parts_of.another_controlnet(parts.unet, 7)
    images = []
    for nets in ([parts.controlnet, other], [other, parts.controlnet]):
        image = [pipes.rings(pipes.HEIGHT, pipes.WIDTH), pipes.waves(pipes.HEIGHT, pipes.WIDTH)]
        options = {"image": image, "controlnet_conditioning_scale": [0.7, 0.4], "num_inference_steps": 4}
        found = both(made, "controlnet", controlnet=MultiControlNetModel(nets), **options)
        assert worst(*found) <= ALLOWED
        images.append(found[1])
    assert worst(*images) > SEEN


def test_a_controlnet_acts_and_another_acts_otherwise(made):
    parts, path = made("sd15")
    unet = shapecheck.load(path, "ort")
    options = {"num_inference_steps": 4}
    on = pipes.images(pipes.PIPELINES["controlnet"](parts, unet=unet), **options)
    off = pipes.images(pipes.PIPELINES["text"](parts, unet=unet), **options)
    other = pipes.images(
        pipes.PIPELINES["controlnet"](parts, unet=unet, controlnet=parts_of.another_controlnet(parts.unet, 7)), **options
    )
    zero = pipes.images(pipes.PIPELINES["controlnet"](parts, unet=unet), controlnet_conditioning_scale=0.0, **options)
    assert worst(on, off) > SEEN
    assert worst(on, other) > SEEN
    assert worst(off, zero) <= ALLOWED


def test_on_off_on_and_sizes_and_controlnets_between_leave_nothing_behind(made):
    """Bitwise what fresh sessions give, whatever was computed before."""
    parts, path = made("sd15")
    other = parts_of.another_controlnet(parts.unet, 7)
    runs = [
        ("text", None, {}),
        ("controlnet", parts.controlnet, {}),
        ("controlnet", other, {}),
        ("controlnet", parts.controlnet, {"height": 64, "width": 120}),
        ("text", None, {"height": 64, "width": 120}),
        ("controlnet", parts.controlnet, {}),
        ("text", None, {}),
    ]

    def image(unet, name, net, options):
        pipe = pipes.PIPELINES[name](parts, unet=unet, controlnet=net)
        return pipes.images(pipe, num_inference_steps=2, **options)

    kept = shapecheck.load(path, "ort", own_outputs=False)
    for name, net, options in runs:
        assert np.array_equal(image(kept, name, net, options), image(shapecheck.load(path, "ort"), name, net, options))


@pytest.mark.full
def test_strength_is_turned_while_it_runs(made):
    """`callback_on_step_end` with the prompt of the callback, and the strength taken anew in every frame."""
    parts, path = made("sd15")
    found = []
    for unet in (None, shapecheck.load(path, "ort")):
        pipe = pipes.PIPELINES["controlnet"](parts, unet=unet)
        seen = []

        def turn(pipe, step, timestep, values, seen=seen):
            seen.append(step)
            return {"latents": values["latents"] * (0.9 if step == 1 else 1)}

        found.append(pipes.images(pipe, num_inference_steps=4, callback_on_step_end=turn))
        assert seen == [0, 1, 2, 3]
    assert worst(*found) <= ALLOWED
    assert worst(found[1], pipes.images(pipe, num_inference_steps=4)) > SEEN


@pytest.mark.full
def test_an_exported_controlnet_takes_a_controlnets_place(made, tmp_path):
    """Alone, with guess mode and a strength, and among several; the same file twice."""
    parts, path = made("sd15")
    file = onnx_files.controlnet_written(tmp_path / "controlnet.onnx", parts.controlnet, latent=(9, 13))
    drop = shapecheck.load(file)
    unet = shapecheck.load(path, "ort")
    for options in ({}, {"guess_mode": True}, {"controlnet_conditioning_scale": 0.4}):
        ours, theirs = (
            pipes.images(pipes.PIPELINES["controlnet"](parts, unet=unet, controlnet=net), num_inference_steps=3, **options)
            for net in (drop, parts.controlnet)
        )
        assert worst(ours, theirs) <= ALLOWED
    image = [pipes.rings(pipes.HEIGHT, pipes.WIDTH), pipes.waves(pipes.HEIGHT, pipes.WIDTH)]
    options = {"image": image, "controlnet_conditioning_scale": [0.7, 0.4], "num_inference_steps": 3}
    ours, theirs = (
        pipes.images(pipes.PIPELINES["controlnet"](parts, controlnet=MultiControlNetModel(nets)), **options)
        for nets in ([drop, drop], [parts.controlnet, parts.controlnet])
    )
    assert worst(ours, theirs) <= ALLOWED


def test_what_a_session_cannot_do_is_said_by_pipelines_too(made, monkeypatch):
    parts, path = made("sd15")
    pipe = pipes.PIPELINES["controlnet"](parts, unet=shapecheck.load(path, "ort"))
    with pytest.raises(UnsupportedError, match=r"enable_freeu: .* then export that"):
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", True)
    lora = {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 32)}
    with pytest.raises(UnsupportedError, match=r"load_lora_weights: .*pipe\.fuse_lora\(\), then export"):
        pipe.load_lora_into_unet(lora, None, pipe.unet)
    pipe.load_lora_into_unet({"text_encoder.layer.weight": torch.zeros(2)}, None, pipe.unet)
    with pytest.raises(UnsupportedError, match="down_blocks: an exported model has no layers"):
        pipe.set_ip_adapter_scale(0.5)
    assert not hasattr(pipe.unet, "attn_processors")
    with pytest.raises(ShapecheckError, match="export again with --dtype float16"):
        pipe.to(torch.float16)
    with pytest.raises(ShapecheckError, match="this session runs on cpu: load it again for meta"):
        pipe.unet.to("meta")
    assert pipe.unet.to("cpu") is pipe.unet
