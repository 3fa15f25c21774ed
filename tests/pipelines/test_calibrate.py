"""Calibration: the largest magnitudes that PyTorch's own functions are given, and a pipeline that stays as it was."""

from __future__ import annotations

import pytest
import small
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import shapecheck
from shapecheck import Calibration, ShapecheckError
from shapecheck.models.calibration_record import digest_model

SIZE = (1, 4, 9, 13)


class Pipeline:
    """The least that has a UNet and ControlNets and is called with a prompt."""

    def __init__(self, *nets, fault=None):
        self.unet, self.controlnet, self.fault = small.unet(**small.TINY), list(nets), fault
        self.asked, self.drawn = [], []

    def __call__(self, prompt, *, num_inference_steps=2, image=None, output_type="pil", generator=None, loud=1.0):
        self.asked.append((prompt, num_inference_steps, output_type))
        latent = torch.randn(SIZE, generator=generator) * loud
        self.drawn.append(latent)
        text = torch.full((1, 7, 12), float(len(prompt)))
        for step in range(num_inference_steps):
            for net in self.controlnet:
                net(latent, 500 - step, text, torch.ones(1, 3, 72, 104) * image, return_dict=False)
            latent = self.unet(latent, 500 - step, text).sample.detach()
        if self.fault:
            raise self.fault


class Recorder(TorchFunctionMode):
    """Notes the largest magnitude that goes into each product, by its weight."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.functional.linear, torch.conv2d) and not args[0].is_meta:  # the contract is observed without values
            largest = float(args[0].detach().abs().max())
            self.seen[id(args[1])] = max(largest, self.seen.get(id(args[1]), 0.0))
        return func(*args, **(kwargs or {}))


def layers_of(module):
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def hooks_of(*modules):
    return [hook for module in modules for layer in module.modules() for hook in layer._forward_pre_hooks.values()]


@pytest.mark.usefixtures("one_thread")
def test_each_layer_has_the_largest_magnitude_that_went_into_it():
    pipe = Pipeline()
    pipe.controlnet = [small.controlnet(pipe.unet)]
    with Recorder() as recorder:
        calibration = shapecheck.calibrate(pipe, ["a cat", "a dog in the rain"], steps=3, image=0.5)
    assert pipe.asked == [("a cat", 3, "latent"), ("a dog in the rain", 3, "latent")]
    assert (calibration.prompts, calibration.calls) == (2, 6)
    assert [model.role for model in calibration.models] == ["unet", "controlnet"]
    for model, module in zip(calibration.models, (pipe.unet, *pipe.controlnet), strict=True):
        expected = {name: recorder.seen[id(layer.weight)] for name, layer in layers_of(module)}
        assert dict(model.layers) == pytest.approx(expected, rel=1e-6)
        assert not hooks_of(module)
    assert calibration.models[0].contract == digest_model(shapecheck.probe(pipe.unet))
    assert Calibration.from_json(calibration.to_json()) == calibration


@pytest.mark.usefixtures("one_thread")
def test_each_prompt_has_a_seed_of_its_own_unless_the_caller_gives_one():
    pipe = Pipeline()
    shapecheck.calibrate(pipe, ["a cat", "a cat"], steps=1)
    expected = [torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert all(map(torch.equal, pipe.drawn, expected))
    with pytest.raises(TypeError, match="generator=str"):  # it is passed on as it is
        shapecheck.calibrate(pipe, "a cat", steps=1, generator="mine")


@pytest.mark.usefixtures("one_thread")
def test_controlnets_of_one_architecture_share_the_larger_magnitudes():
    nets = [small.controlnet(small.unet(**small.TINY), seed=seed) for seed in (1, 2)]
    with Recorder() as recorder:
        (_, joined) = shapecheck.calibrate(Pipeline(*nets), "a cat", steps=1, image=0.5).models
    apart = [{name: recorder.seen[id(layer.weight)] for name, layer in layers_of(net)} for net in nets]
    expected = {name: max(apart[0][name], apart[1][name]) for name in apart[0]}
    assert dict(joined.layers) == pytest.approx(expected, rel=1e-6)
    assert all(expected != pytest.approx(one, rel=1e-6) for one in apart)


@pytest.mark.usefixtures("one_thread")
def test_a_pipeline_that_fails_passes_its_error_on_and_keeps_no_hook():
    pipe = Pipeline(fault=RuntimeError("out of ideas"))
    with pytest.raises(RuntimeError, match="out of ideas"):
        shapecheck.calibrate(pipe, "a cat")
    assert not hooks_of(pipe.unet)


@pytest.mark.usefixtures("one_thread")
def test_what_is_not_finite_is_no_calibration():
    pipe = Pipeline()
    with pytest.raises(ShapecheckError, match=r"into conv_in of the UNet2DConditionModel and of \d+ more layers is not finite"):
        shapecheck.calibrate(pipe, "a cat", steps=1, loud=float("nan"))
    assert not hooks_of(pipe.unet)


def test_what_cannot_be_calibrated_is_said():
    pipe = Pipeline()
    with pytest.raises(ShapecheckError, match="needs prompts"):
        shapecheck.calibrate(pipe, [])
    with pytest.raises(ShapecheckError, match="Pipeline did not call its UNet"):
        shapecheck.calibrate(pipe, "a cat", steps=0)
    with pytest.raises(ShapecheckError, match="holds no UNet"):
        shapecheck.calibrate(object(), "a cat")
