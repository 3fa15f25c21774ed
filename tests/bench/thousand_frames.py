"""A thousand frames as a real-time program makes them, held to PyTorch's: python tests/bench/thousand_frames.py FOLDER.

Two loops run what `accelerate` made with --backend: one shaped as StreamDiffusion's (SD-Turbo, AutoencoderTiny, every call
takes two pictures one step on), and diffusers' ControlNet pipeline (SD1.5, 20 steps, guidance). Control is switched on and
off, its strength and the prompt change, two sizes come in turn; ControlNets are exchanged, by `replace_controlnets` and by
assigning a PyTorch one to the pipeline. Weights are random.

Ten times in a loop the picture, and the last call of the UNet alone, are compared with PyTorch's in a wider precision: they
may be four times as far from it as PyTorch's in the same precision are. Beside it another setting is drawn, such as a stale
input would give: of the way there, over all values together, no more than a quarter may be gone. What is printed: every check,
seconds of an exchange, frames a second beside eager PyTorch's, and memory, which has to be at the end what it was after the
first tenth. Status 1 if anything is not as it should be, or not all was done in --seconds.

    python tests/bench/thousand_frames.py FOLDER --backend torch-compile --loops stream
    python tests/bench/thousand_frames.py FOLDER --backend trt --loops pictures --frames 200
    python tests/bench/thousand_frames.py FOLDER --tiny --frames 100     # on the CPU, in a minute or two
    python tests/bench/thousand_frames.py FOLDER --tiny --frames 200 --backend trt
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import psutil
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

import shapecheck
from shapecheck import presets
from shapecheck.presets.picture_models import VAE
from shapecheck.runtime.torch_session import forbid_tf32

BEGAN = time.perf_counter()
WIDER = {torch.float16: torch.float32, torch.float32: torch.float64}
TOLERANCE = 4.0
STRENGTHS, PROMPTS, NETS, IMAGES = (0.3, 0.9, 0.6), 3, 3, 5
AXES = ("control", "strength", "prompt", "net")
GROWTH = {"allocated": 16, "reserved": 128, "GPU": 128, "process": 256}
"""MiB that memory may grow by."""
TINY = {
    "sample_size": 16,
    "in_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
TINY_DECODER = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}


class Setting(NamedTuple):
    """One frame: width and height in pixels, and which ControlNet, prompt and control image it has."""

    size: tuple[int, int]
    control: bool
    strength: float
    net: int
    prompt: int
    image: int

    def change(self, axis: str) -> Setting:
        """Return another setting, such as one that a stale input would give."""
        match axis:
            case "control":
                return self._replace(control=not self.control)
            case "strength":
                return self._replace(strength=STRENGTHS[STRENGTHS.index(self.strength) - 1])
            case "prompt":
                return self._replace(prompt=(self.prompt + 1) % PROMPTS)
        return self._replace(net=(self.net + 1) % NETS)


class Call(NamedTuple):
    """A call of a UNet, and the image that it returned."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    image: Tensor


@dataclass(frozen=True, slots=True)
class Loop:
    """Three of the same: what is accelerated, PyTorch in the same precision, and in a wider one; each with its ControlNets.

    `draw` returns a picture by one of them, and what the next frame needs of this one.
    """

    title: str
    draw: Callable[[Any, Setting, Tensor | None], tuple[Tensor, Tensor | None]]
    live: Any
    own: Any
    wide: Any
    nets: dict[int, list[nn.Module]]
    """By the id of what calls them."""


def tell(*texts: object) -> None:
    print(f"{time.perf_counter() - BEGAN:7.1f} s ", *texts, flush=True)


@cache
def draw_noise(name: str, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    """Return the same noise for a name in every precision: rounded to half, and kept where it is used."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name)) * 7919 + shape[-1]))
    return noise.half().to(device, dtype)


def choose_setting(frame: int, sizes: list[tuple[int, int]], net: int) -> Setting:
    choose = random.Random(frame)
    size, control, strength = sizes[frame // 7 % len(sizes)], choose.random() < 0.7, choose.choice(STRENGTHS)
    return Setting(size, control, strength, net, choose.randrange(PROMPTS), choose.randrange(IMAGES))


# the two loops


def draw_stream_frame(stream: Any, setting: Setting, waiting: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take a new picture and the one that waits one step on, as StreamDiffusion's batch does, and show the latter."""
    (width, height), device, dtype = setting.size, stream.device, stream.dtype
    image = draw_noise(f"image {setting.image}", (1, 3, height, width), device, dtype).clamp(0, 1)
    latent = stream.vae.encode(image * 2 - 1).latents
    alpha, beta = (stream.levels[kind].to(device, dtype) for kind in ("alpha", "beta"))
    noises = [draw_noise(f"noise {number}", tuple(latent.shape), device, dtype) for number in range(2)]
    first = alpha[:1] * latent + beta[:1] * noises[0]
    waiting = noises[1] if waiting is None else waiting.to(dtype)
    sample = torch.cat([first, waiting])
    text = draw_noise(f"prompt {setting.prompt}", (1, 77, stream.unet.config["cross_attention_dim"]), device, dtype)
    text, times, control = text.repeat(2, 1, 1), stream.levels["timestep"].to(device), {}
    if setting.control:
        both = torch.cat([image, image])
        options = {"conditioning_scale": setting.strength, "return_dict": False}
        downs, mid = stream.controlnet(sample, times, text, both, **options)
        control = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
    noise = stream.unet(sample, times, encoder_hidden_states=text, return_dict=False, **control)[0]
    clean = (sample - beta * noise) / alpha
    picture = stream.vae.decode(clean[1:]).sample
    return picture, alpha[1:] * clean[:1] + beta[1:] * noises[1]


def draw_picture(pipe: Any, setting: Setting, _waiting: Tensor | None) -> tuple[Tensor, None]:
    """Draw a whole picture; without control in a pipeline that knows no ControlNets."""
    (width, height), device, dtype = setting.size, str(pipe.vae.device), pipe.vae.dtype
    shape = (1, 77, pipe.unet.config["cross_attention_dim"])
    text, negative = (draw_noise(f"{kind} {setting.prompt}", shape, device, dtype) for kind in ("prompt", "negative"))
    options: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": pipe.steps, "guidance_scale": 4.0}
    latents = draw_noise(f"noise {setting.image}", (1, 4, height // 8, width // 8), device, dtype)
    options |= {"prompt_embeds": text, "negative_prompt_embeds": negative, "latents": latents, "output_type": "pt"}
    if not setting.control:
        pipe.plain.unet = pipe.unet
        return pipe.plain(**options).images, None
    image = draw_noise(f"image {setting.image}", (1, 3, height, width), device, dtype).clamp(0, 1)
    return pipe(image=image, controlnet_conditioning_scale=setting.strength, **options).images, None


def make_models(config: dict[str, Any], *, tiny: bool) -> tuple[nn.Module, list[nn.Module]]:
    """Return a UNet and ControlNets of it that emit something; none needs gradients."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({key: value for key, value in config.items() if not key.startswith("_")})
    nets, channels = [], {"conditioning_embedding_out_channels": (8, 8, 8, 8)} if tiny else {}
    for _ in range(NETS):
        net = ControlNetModel.from_unet(unet, load_weights_from_unet=False, **channels)
        for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            nn.init.normal_(convolution.weight, std=0.1 if tiny else 0.02)
        nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.1)
        nets.append(net)
    return unet, nets


def make_loop(kind: str, device: str, dtype: torch.dtype, *, tiny: bool, steps: int) -> Loop:
    preset = {"stream": "sd-turbo", "pictures": "sd15"}[kind]
    with torch.device(device):
        unet, nets = make_models(TINY if tiny else dict(presets.load(preset).config), tiny=tiny)
        if kind == "stream":
            vae: nn.Module = AutoencoderTiny(**(TINY_DECODER if tiny else {}))
        else:
            vae = AutoencoderKL.from_config({**VAE, **(TINY_VAE if tiny else {})})
    for module in (unet, *nets, vae):
        module.to(dtype).eval().requires_grad_(False)
    made, calling = [], dict[int, list[nn.Module]]()
    for precision in (dtype, dtype, WIDER[dtype]):
        models = [copy.deepcopy(module).to(precision) for module in (unet, *nets, vae)]
        owner = hold_stream(models, device, precision) if kind == "stream" else hold_pipeline(models, steps)
        calling[id(owner)] = models[1:-1]
        made.append(owner)
    draw: Any = draw_stream_frame if kind == "stream" else draw_picture
    title = "a stream's batch of 2" if kind == "stream" else f"pictures of {steps} steps"
    return Loop(f"{'tiny' if tiny else preset}, {title}", draw, *made, calling)


def hold_stream(models: list[nn.Module], device: str, dtype: torch.dtype) -> SimpleNamespace:
    """Return what holds its models where a StreamDiffusion does."""
    timestep = torch.tensor([699, 399])
    signal = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod[timestep]
    levels = {"timestep": timestep, "alpha": signal.sqrt()[:, None, None, None]}
    levels["beta"] = (1 - signal).sqrt()[:, None, None, None]
    unet, net, *_, vae = models
    return SimpleNamespace(unet=unet, controlnet=net, vae=vae, device=device, dtype=dtype, levels=levels)


def hold_pipeline(models: list[nn.Module], steps: int) -> StableDiffusionControlNetPipeline:
    unet, net, *_, vae = models
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionControlNetPipeline(controlnet=net, **parts)
    pipe.plain, pipe.steps = StableDiffusionPipeline(**parts), steps
    for each in (pipe, pipe.plain):
        each.set_progress_bar_config(disable=True)
    return pipe


# checks


@contextmanager
def record_last_call(module: nn.Module) -> Iterator[list[Call]]:
    """Keep a copy of the last call while the block lasts."""
    calls: list[Call] = []

    def keep(_module: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        calls[:] = [Call(cast(arguments), cast(keywords), output[0].clone())]

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def cast(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of all tensors in a structure, those of floating point in that precision."""
    if isinstance(value, Tensor):
        return value.clone().to(dtype if value.is_floating_point() and dtype is not None else value.dtype)
    if isinstance(value, dict):
        return {name: cast(each, dtype) for name, each in value.items()}
    return type(value)(cast(each, dtype) for each in value) if isinstance(value, list | tuple) else value


def judge(name: str, found: Tensor, own: Tensor, wide: Tensor) -> bool:
    """Print how far two results are from a third, and return whether the first is as near as is allowed."""
    expected = wide.double()
    least = torch.finfo(own.dtype).eps * float(expected.abs().max())
    errors = [float((each.double() - expected).abs().max()) for each in (found, own)]
    fine = errors[0] <= TOLERANCE * max(errors[1], least) and float(expected.std()) > 0
    tell(f"    {name}: {errors[0]:.2e} from PyTorch's, its own {errors[1]:.2e}{'' if fine else '  WRONG'}")
    return fine


def measure_share(found: Tensor, wide: Tensor, other: Tensor) -> float:
    """Return how much of the way from the right picture to another one is gone: over all values, so that rounding cancels."""
    way = (other.double() - wide.double()).flatten()
    return float((found.double() - wide.double()).flatten() @ way / (way @ way))


def check_frame(
    loop: Loop, setting: Setting, axis: str, waiting: Tensor | None, found: Tensor, call: Call
) -> tuple[bool, bool]:
    """Return whether picture and last call are right, and whether another setting could be told from this one."""
    tell(f"  {setting}, beside another {axis}")
    for owner in (loop.own, loop.wide):
        owner.controlnet = loop.nets[id(owner)][setting.net]
    own, _ = loop.draw(loop.own, setting, waiting)
    images = []
    with forbid_tf32():
        wide, _ = loop.draw(loop.wide, setting, waiting)
        for owner in (loop.own, loop.wide):
            dtype = next(owner.unet.parameters()).dtype
            images.append(owner.unet(*cast(call.arguments, dtype), **cast(call.keywords, dtype))[0])
        changed = setting.change(axis)
        loop.wide.controlnet = loop.nets[id(loop.wide)][changed.net]
        other, _ = loop.draw(loop.wide, changed, waiting)
    fine = [judge("picture", found, own, wide), judge("last call of the UNet", call.image, *images)]
    share, own_share = measure_share(found, wide, other), measure_share(own, wide, other)
    is_told = abs(own_share) <= 0.1
    fine.append(abs(share) <= 0.25 or not is_told)
    remark = ": too little to be told" if not is_told else "" if fine[-1] else "  WRONG"
    tell(f"    {share:.2%} of the way to another {axis}, PyTorch's own {own_share:.2%}{remark}")
    return all(fine), is_told


def measure_memory(device: str) -> dict[str, float]:
    """Return MiB: PyTorch's tensors, what PyTorch holds, all that is taken on the GPU, and this process's own memory."""
    gc.collect()
    memory = {"process": psutil.Process().memory_info().rss}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        memory |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(), "GPU": total - free}
    return {name: number / 2**20 for name, number in memory.items()}


class Player:
    """Plays the frames of a loop in order, and remembers what they showed."""

    def __init__(self, loop: Loop, sizes: list[tuple[int, int]], every: int, device: str) -> None:
        self.loop, self.sizes, self.every, self.device = loop, sizes, every, device
        self.wrong, self.seen, self.memory = 0, set[str](), list[dict[str, float]]()
        self.times: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        self._waiting: dict[tuple[int, int], Tensor | None] = {}
        self._net = 0

    def play(self, frame: int) -> None:
        """Draw a frame, timed until it is there; the last of every so many is checked."""
        setting = choose_setting(frame, self.sizes, self._net)
        waiting, loop = self._waiting.get(setting.size), self.loop
        if frame % self.every != self.every - 1:
            began = time.perf_counter()
            _, self._waiting[setting.size] = loop.draw(loop.live, setting, waiting)
            if self.device == "cuda":
                torch.cuda.synchronize()
            by = "without control" if not setting.control else "a PyTorch ControlNet" if self._net == 2 else "control"
            self.times[by, setting.size].append(1000 * (time.perf_counter() - began))
            return
        tell(f"frame {frame + 1}")
        axis = AXES[frame // self.every % len(AXES)] if setting.control else "control"
        before = None if waiting is None else waiting.clone()
        with record_last_call(loop.live.unet) as calls:
            found, self._waiting[setting.size] = loop.draw(loop.live, setting, waiting)
        is_right, is_told = check_frame(loop, setting, axis, before, found.clone(), calls[0])
        self.wrong += not is_right
        self.seen |= {axis} if is_told else set()
        self.memory.append(measure_memory(self.device))
        tell("    MiB: " + ", ".join(f"{name} {number:.0f}" for name, number in self.memory[-1].items()))

    def exchange(self, frame: int, done: shapecheck.Accelerated) -> None:
        """Exchange ControlNets now and then: the second by our hand, the third by the user's, in PyTorch, the first again."""
        moments = {at * self.every // 10: net for at, net in ((8, 1), (18, 2), (28, 0))}
        if (net := moments.get(frame % (3 * self.every))) is None:
            return
        self._net, began = net, time.perf_counter()
        module = self.loop.nets[id(self.loop.live)][net]
        if net == 2:
            self.loop.live.controlnet = module.to(self.device)
        else:
            done.replace_controlnets(module)
        tell(f"frame {frame + 1}: ControlNet {net} in {time.perf_counter() - began:.2f} s, {done}".splitlines()[0])

    def describe_times(self) -> str:
        """Return frames a second by what the frames have."""
        return "; ".join(
            f"{size[0]}×{size[1]} {by}: {1000 / statistics.median(times):.1f}"
            for (by, size), times in sorted(self.times.items(), key=str)
        )

    def find_faults(self) -> list[str]:
        faults = [f"{self.wrong} of {len(self.memory)} checks are WRONG"] if self.wrong or not self.memory else []
        faults += [f"no check could tell another {axis}" for axis in AXES if axis not in self.seen]
        if self.memory:
            first, last = self.memory[0], self.memory[-1]
            grown = {name: last[name] - first[name] for name in last}
            tell("memory grew by MiB: " + ", ".join(f"{name} {number:+.0f}" for name, number in grown.items()))
            faults += [
                f"{name} memory grew by {number:.0f} MiB" for name, number in grown.items() if not number <= GROWTH[name]
            ]
        return faults


def run(loop: Loop, given: argparse.Namespace, sizes: list[tuple[int, int]], device: str) -> list[str]:
    """Run one loop, and return what is not as it should be."""
    every, folder = max(given.frames // 10, 10), given.folder
    eager = Player(loop, sizes, 10**9, device)
    for frame in range(min(4 if given.tiny else 24, given.frames)):
        eager.play(frame)
    tell(f"{loop.title}: frames a second in eager PyTorch: {eager.describe_times()}")
    unet, began = loop.live.unet, time.perf_counter()
    options = {"sizes": [f"{width}x{height}" for width, height in sizes], "batch": ["2"], "budget": given.budget}
    fallback = "log" if given.backend == "auto" else "error"
    done = shapecheck.accelerate(loop.live, folder, given.backend, **options, fallback=fallback)
    player = Player(loop, sizes, every, device)
    player.play(0)
    tell(f"{time.perf_counter() - began:.1f} s to the first frame\n{done}")
    faults, frame = [], 0
    for frame in range(given.frames):
        if time.perf_counter() - BEGAN > given.seconds:
            faults.append(f"time was over at frame {frame} of {given.frames}")
            break
        player.exchange(frame, done)
        player.play(frame)
    tell(f"{loop.title}, {done.backend}: frames a second: {player.describe_times()}")
    faults += player.find_faults()
    done()
    if loop.live.unet is not unet:
        faults.append("the UNet is not back")
    tell(f"{loop.title}: {'; '.join(faults) or 'ALL AS IT SHOULD BE'}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", help="of accelerate  [default: torch-compile, or ort with --tiny]")
    parser.add_argument("--loops", default="stream,pictures")
    parser.add_argument("--frames", type=int, default=1000, help="of each loop")
    parser.add_argument("--sizes", help="two, in turn  [default: 512x512,640x384]")
    parser.add_argument("--steps", type=int, help="of a picture  [default: 20]")
    parser.add_argument("--seconds", type=float, default=540.0, help="no frame is begun later")
    parser.add_argument("--budget", type=float, default=120.0, help="of accelerate")
    parser.add_argument("--tiny", action="store_true", help="small models in float32, on the CPU with the backend ort")
    given = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()  # it warns of every cast
    if given.tiny:
        torch.set_num_threads(1)  # threads that wait for each other cost more than models this small compute
    given.backend = given.backend or ("ort" if given.tiny else "torch-compile")
    device = "cpu" if given.backend == "ort" else "cuda"
    dtype = torch.float32 if given.tiny else torch.float16
    texts = (given.sizes or ("104x72,72x136" if given.tiny else "512x512,640x384")).split(",")
    sizes = [tuple(map(int, text.split("x"))) for text in texts]
    faults = []
    with torch.no_grad():
        for kind in given.loops.split(","):
            loop = make_loop(kind, device, dtype, tiny=given.tiny, steps=given.steps or (3 if given.tiny else 20))
            tell(f"{loop.title}: models made")
            faults += run(loop, given, sizes, device)
            del loop
            draw_noise.cache_clear()
            gc.collect()
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
