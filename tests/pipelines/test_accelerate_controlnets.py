"""ControlNets that `accelerate` takes along: one, several, one that cannot be exchanged, others later, and all put back."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import engines
import pytest
import small
import torch
from diffusers import MultiControlNetModel

import shapecheck
from shapecheck import ContractError, ShapecheckError, doctor
from shapecheck.doctor.environment import Backend
from shapecheck.models import diffusers_models
from shapecheck.onnx import export as exporter
from shapecheck.pipelines import candidates, compiled_vae
from shapecheck.pipelines.accelerate import AccelerationError
from shapecheck.pipelines.model_owners import ModelOwners
from shapecheck.runtime.dropin_controlnet import DropInControlNet

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"sizes": ["104x72"], "batch": ["1:2:2"]}


@pytest.fixture(autouse=True)
def quick(monkeypatch, caplog):
    """The exporter is torch's older one, and doctor is not asked."""
    caplog.set_level(logging.INFO, "shapecheck")
    monkeypatch.setattr(exporter, "export", engines.exported_quickly)
    monkeypatch.setattr(doctor, "backend", lambda name: Backend(name, True, ""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def unet():
    return small.unet(**small.TINY)


def compute(net, *, scale=1.0):
    """Return the residuals of a ControlNet on inputs of its own."""
    generator = torch.Generator().manual_seed(3)
    sample, text, image = (torch.randn(shape, generator=generator) for shape in ((2, 4, 9, 13), (2, 7, 12), (2, 3, 72, 104)))
    with torch.no_grad():
        downs, mid = net(sample, 11, text, image, conditioning_scale=scale, return_dict=False)
    return [*downs, mid]


def assert_alike(one, other):
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(one, other, strict=True))


def test_several_are_exchanged_in_place_and_put_back(unet, folder):
    nets = [small.controlnet(unet), small.controlnet(unet, seed=2)]
    several = MultiControlNetModel(nets)
    pipe = SimpleNamespace(unet=unet, controlnet=several)
    with shapecheck.accelerate(pipe, folder, "ort", **SIZES) as done:
        assert pipe.controlnet is several
        assert [net.module for net in done.controlnets] == list(several.nets)
        assert [net.torch for net in done.controlnets] == nets
        assert all(isinstance(net, DropInControlNet) for net in several.nets)
        for session, net in zip(several.nets, nets, strict=True):
            assert_alike(compute(session, scale=0.5), compute(net, scale=0.5))
        first, second = (compute(net) for net in several.nets)
        assert (first[0] - second[0]).abs().max() > 0.01
    assert list(several.nets) == nets


def test_a_stream_and_its_pipeline_change_together_with_a_list_of_them(unet, folder):
    net = small.controlnet(unet)
    pipe = SimpleNamespace(unet=unet, controlnet=net)
    stream = SimpleNamespace(
        pipe=pipe, unet=unet, controlnets=[net], width=104, height=72, trt_unet_batch_size=2, _is_unet_tensorrt=False
    )
    with shapecheck.accelerate(SimpleNamespace(stream=stream), folder, "ort") as done:
        (running,) = done.controlnets
        assert pipe.controlnet is stream.controlnets[0] is running.module
        assert isinstance(running.module, DropInControlNet)
    assert pipe.controlnet is stream.controlnets[0] is net


def test_one_that_cannot_be_exchanged_stays_in_pytorch_and_is_named(unet, folder, monkeypatch, caplog):
    net, hooked, quantized = (small.controlnet(unet, seed=seed) for seed in (1, 2, 3))
    monkeypatch.setattr(hooked, "_hf_hook", object(), raising=False)
    quantized.register_buffer("scale", torch.zeros(1, dtype=torch.int8))
    pipe = SimpleNamespace(unet=unet, controlnet=MultiControlNetModel([hooked, net]))
    with shapecheck.accelerate(pipe, folder, "ort", **SIZES) as done:
        stays, runs = done.controlnets
        assert (stays.backend, stays.module, runs.backend) == ("torch", hooked, "ort")
        assert pipe.controlnet.nets[0] is hooked
        assert "remove_all_hooks" in stays.reason
        assert f"a ControlNet stays in PyTorch: {stays.reason}" in caplog.messages
        assert str(done).splitlines()[0] == "UNet: ort; ControlNets: torch, ort"
    pipe.controlnet = [hooked, quantized]
    shapecheck.accelerate(pipe, folder, "ort", **SIZES)()
    assert "is quantized" in caplog.text, "all of them are told, and not the first alone"
    with pytest.raises(
        AccelerationError, match=r"a ControlNet stays in PyTorch\n  ort: .*remove_all_hooks.*\n  ort: .*is quantized"
    ):
        shapecheck.accelerate(pipe, folder, "ort", **SIZES, fallback="error")
    assert pipe.unet is unet


def test_one_whose_file_does_not_open_stays_in_pytorch(unet, tmp_path, monkeypatch):
    net = small.controlnet(unet)
    pipe = SimpleNamespace(unet=unet, controlnet=net)

    def load(artefact, *arguments, **options):
        if artefact.name.startswith("controlnet"):
            raise ShapecheckError("out of file handles")
        return shapecheck.load(artefact, *arguments)

    monkeypatch.setattr(candidates, "load", load)
    with shapecheck.accelerate(pipe, tmp_path, "ort", **SIZES) as done:
        assert done.backend == "ort"
        assert [(part.backend, part.reason) for part in done.controlnets] == [("torch", "out of file handles")]
        assert pipe.controlnet is net
    with pytest.raises(AccelerationError, match="out of file handles"):
        shapecheck.accelerate(pipe, tmp_path, "ort", **SIZES, fallback="error")
    assert (pipe.unet, pipe.controlnet) == (unet, net)


def test_a_union_of_them_is_known_before_anything_is_made(unet, folder, monkeypatch):
    maker, net = candidates.CandidateMaker(folder, (), {}, lambda *_: None, contracts={}, strict=False), small.controlnet(unet)
    assert not maker.find_obstacle(net)
    monkeypatch.setattr(diffusers_models, "is_union", lambda _: True)
    assert "ControlNetUnionModel is not exported" in maker.find_obstacle(net)


@pytest.mark.parametrize("finite", [True, False])
def test_the_unet_alone_looks_for_nan_and_names_the_slot(unet, folder, finite):
    """Each that looks on a GPU waits, and the UNet sees what ControlNets give it."""
    pipe = SimpleNamespace(unet=unet, controlnet=small.controlnet(unet))
    with shapecheck.accelerate(pipe, folder, "ort", **SIZES, finite=finite), torch.no_grad():
        sample, text, image = torch.randn(2, 4, 9, 13), torch.randn(2, 7, 12), torch.full((2, 3, 72, 104), torch.nan)
        downs, mid = pipe.controlnet(sample, 11, text, image, return_dict=False)
        assert downs[0].isnan().any()
        residuals = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
        with pytest.raises(ContractError, match=r"down_block_residual_00 .*values: got \d+ NaN") if finite else nullcontext():
            pipe.unet(sample, 11, text, **residuals)


@pytest.mark.full
def test_they_are_exchanged_later_without_touching_the_unet(unet, folder):
    first, second, third = (small.controlnet(unet, seed=seed) for seed in (1, 2, 3))
    pipe = SimpleNamespace(unet=unet, controlnet=first)
    done = shapecheck.accelerate(pipe, folder, "ort", **SIZES)
    session, (old,) = pipe.unet, done.controlnets
    done.replace_controlnets(second)
    assert pipe.unet is session
    assert_alike(compute(pipe.controlnet), compute(second))
    with pytest.raises(ShapecheckError, match="closed"):
        compute(old.module)

    kept = pipe.controlnet
    with pytest.raises(ShapecheckError, match="give several as a MultiControlNetModel"):
        done.replace_controlnets([second, third])
    assert pipe.controlnet is kept is done.controlnets[0].module
    done.replace_controlnets(MultiControlNetModel([second, third]))
    assert pipe.controlnet.nets[0] is kept, "it runs already"
    assert_alike(compute(pipe.controlnet.nets[1]), compute(third))
    done.replace_controlnets([third])
    assert_alike(compute(pipe.controlnet.nets[0]), compute(third))

    other = small.controlnet(small.unet(**small.TINY | {"block_out_channels": (16,)}))
    with pytest.raises(ContractError):
        done.replace_controlnets(other)
    done()
    assert list(pipe.controlnet.nets) == [third], "the last one, in PyTorch"
    assert pipe.unet is unet
    done.replace_controlnets([first])
    assert list(pipe.controlnet.nets) == [first]


@pytest.mark.full
def test_one_that_is_there_twice_keeps_its_residuals_or_is_refused(unet, folder):
    net = small.controlnet(unet)
    pipe = SimpleNamespace(unet=unet, controlnet=MultiControlNetModel([net, net]))
    with shapecheck.accelerate(pipe, folder, "ort", **SIZES) as done:
        first, second = (compute(one, scale=scale) for one, scale in zip(pipe.controlnet.nets, (1.0, 0.5), strict=True))
        assert_alike(first, compute(net))
        assert_alike(second, compute(net, scale=0.5))
    assert len(done.controlnets) == 1
    with pytest.raises(ShapecheckError, match="own_outputs=False: one ControlNet is there twice"):
        shapecheck.accelerate(pipe, folder, "ort", **SIZES, own_outputs=False)
    assert list(pipe.controlnet.nets) == [net, net]
    pipe.controlnet = net
    done = shapecheck.accelerate(pipe, folder, "ort", **SIZES, own_outputs=False)
    with pytest.raises(ShapecheckError, match="there twice"):
        done.replace_controlnets(MultiControlNetModel([net, net]))
    done()


def test_one_that_the_user_puts_there_in_pytorch_stays(unet, folder, caplog):
    pipe = SimpleNamespace(unet=unet, controlnet=small.controlnet(unet))
    done = shapecheck.accelerate(pipe, folder, "ort", **SIZES)
    other = pipe.controlnet = small.controlnet(unet, seed=2)
    done()
    assert (pipe.unet, pipe.controlnet) == (unet, other)
    assert "the ControlNet that accelerate put in was exchanged meanwhile: what is there now stays" in caplog.messages


def test_a_pipeline_without_them_cannot_be_given_any(unet, folder):
    owners = ModelOwners(SimpleNamespace(unet=unet))
    assert owners.controlnets == ()
    with pytest.raises(ShapecheckError, match="holds no ControlNets"):
        owners.set_controlnets(small.controlnet(unet), [])


def test_a_vaes_decoder_is_compiled_and_put_back(unet, folder, monkeypatch, caplog):
    """In place of the compiler a wrapper."""
    pipe = small.pipeline(unet, small.controlnet(unet))
    decoder, compiled = pipe.vae.decoder, []

    class Compiled(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.inner = module

        def forward(self, latents):
            compiled.append(tuple(latents.shape))
            return self.inner(latents)

    monkeypatch.setattr(torch, "compile", Compiled)
    with shapecheck.accelerate(pipe, folder, "ort", **SIZES, controlnets=False, vae=True):
        assert isinstance(pipe.vae.decoder, Compiled)
        assert compiled == [(1, 4, 9, 13)]
    assert pipe.vae.decoder is decoder

    def fail(*_):
        raise KeyError("no compiler")

    monkeypatch.setattr(Compiled, "forward", fail)
    compiled_vae.compile_decoder(pipe.vae, shapecheck.Geometry(1, 9, 13))()
    assert pipe.vae.decoder is decoder
    assert "the VAE's decoder stays as it is: KeyError" in caplog.messages[-1]
    strange = SimpleNamespace(decoder=decoder)  # somebody's own class, without a config
    compiled_vae.compile_decoder(strange, shapecheck.Geometry(1, 9, 13))()
    assert "the VAE's decoder stays as it is: AttributeError" in caplog.messages[-1]
