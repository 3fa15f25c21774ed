"""The whole road shown: a picture in PyTorch, and the same one with the UNet exported and exchanged by `accelerate`."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from shapecheck import extras, presets
from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.doctor.environment import BACKENDS
from shapecheck.observe.probe import probe
from shapecheck.pipelines import pictures, tiny_pipeline
from shapecheck.pipelines.accelerate import accelerate
from shapecheck.pipelines.demo_record import Demo, DemoRequest, Picture
from shapecheck.pipelines.pictures import Floats
from shapecheck.progress import Progress, quiet, silent
from shapecheck.runtime.dropin import DropIn
from shapecheck.version import __version__

SMALL_SIZE_PX = (136, 104)
"""Width and height: 17×13 latent cells, odd, so that every halving rounds."""
_GUIDANCE = 5.0
_ALLOWED = 1.0
"""Of 255: what nobody sees."""
_PACKAGES = (
    "torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "tensorrt-rtx-cu13",
)  # fmt: skip


def run(request: DemoRequest, folder: Path, progress: Progress = silent) -> Demo:
    """Draw a picture on both, compare, and write all pictures into the folder, beside the ONNX file or engine.

    The pipeline then has its own UNet again. Raises ShapecheckError where a model, an image or the backend cannot be had,
    ContractError where UNet and ControlNet do not fit each other.
    """
    device, dtype = _place(request.backend)
    given = pictures.read(request.image) if request.image is not None else None
    pipe, (width, height) = _small(request) if request.model is None else _named(request, dtype, progress)
    pipe.set_progress_bar_config(disable=True)
    with quiet("diffusers"):  # it warns of casts, also where there is nothing to warn of
        pipe.to(device, dtype)
    control = pictures.scene(height, width) if given is None else pictures.fitted(given, height, width)
    artist = _Artist(pipe, request, control, progress)
    exchanged = accelerate(
        pipe, folder, request.backend, sizes=[f"{width}x{height}"], batch=["1:2:2"], fallback="error", progress=progress
    )
    with exchanged:
        assert isinstance(exchanged.unet, DropIn) and exchanged.artefact is not None
        contract, artefact = exchanged.unet.contract, exchanged.artefact.name
        theirs, backend_seconds = artist.draw(request.backend)
    ours, torch_seconds = artist.draw("PyTorch")
    without, _ = artist.draw("PyTorch, no ControlNet", scale=0.0)
    return Demo(
        model=request.model or "a small UNet like Stable Diffusion 1.5's",
        controlnet=request.controlnet or "a small ControlNet of the same topology",
        random=request.model is None,
        prompt=request.prompt,
        size_px=(width, height),
        steps=request.steps,
        seed=request.seed,
        backend=request.backend,
        device=torch.cuda.get_device_name() if device == "cuda" else f"cpu, PyTorch with {torch.get_num_threads()} threads",
        precision=str(dtype).removeprefix("torch."),
        artefact=artefact,
        contract=contract.digest,
        slots=len(contract.slots),
        pictures=tuple(_written(request, folder, control, ours, theirs, without)),
        difference=pictures.change(ours, theirs),
        control=pictures.change(ours, without),
        allowed=_ALLOWED if dtype == torch.float32 else None,
        torch_seconds=torch_seconds,
        backend_seconds=backend_seconds,
        versions=(("shapecheck", __version__), *extras.versions(_PACKAGES)),
    )


class _Artist:
    """Draws one picture again and again: same noise, same words, same control image."""

    def __init__(self, pipe: Any, request: DemoRequest, control: Floats, progress: Progress) -> None:
        self._pipe, self._request, self._control, self._progress = pipe, request, control, progress

    def draw(self, told: str, *, scale: float = 1.0) -> tuple[Floats, float]:
        """The picture, and the seconds of a step: the median over all but the first, which warms up."""
        request, ends = self._request, list[float]()

        def ended(pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if pipe.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            self._progress(f"drawing with {told}: step {step + 1} of {request.steps}")
            return values

        height, width, _ = self._control.shape
        made = self._pipe(
            request.prompt,
            image=self._control[None],
            height=height,
            width=width,
            num_inference_steps=request.steps,
            guidance_scale=_GUIDANCE,
            controlnet_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
            callback_on_step_end=ended,
        )
        return made.images[0], statistics.median(later - earlier for earlier, later in pairwise(ends))


def _place(backend: str) -> tuple[str, torch.dtype]:
    if backend == "ort":
        return "cpu", torch.float32
    if not torch.cuda.is_available():
        raise ShapecheckError(f"{backend} runs on a GPU, and PyTorch sees none here: `shapecheck doctor` says what is missing")
    return "cuda", torch.float16


def _small(request: DemoRequest) -> tuple[Any, tuple[int, int]]:
    """A pipeline of small parts with random weights, and the size it draws at."""
    with quiet("transformers"):
        from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    parts = tiny_pipeline.parts("sd15")
    pipe = StableDiffusionControlNetPipeline(
        vae=parts.vae,
        unet=parts.unet,
        controlnet=parts.controlnet,
        scheduler=scheduler,
        text_encoder=parts.text_encoders[0],
        tokenizer=parts.tokenizers[0],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, request.size_px or SMALL_SIZE_PX


def _named(request: DemoRequest, dtype: torch.dtype, progress: Progress) -> tuple[Any, tuple[int, int]]:
    """A pipeline of real checkpoints, and the size it draws at. That they fit is known before weights are loaded."""
    if unweighted := [name for name in (request.model, request.controlnet) if name in presets.names()]:
        raise ShapecheckError(f"{unweighted[0]} is a preset, which has no weights: give a diffusers folder or a hub id")
    assert request.model is not None and request.controlnet is not None
    contract = probe(request.model, request.controlnet, offline=request.offline, progress=progress)
    size = request.size_px or contract.header.usual_px
    Geometry.from_px(*size, vae_factor=contract.header.vae_factor)
    progress("loading the pipeline")
    return _loaded(request, dtype, xl=contract.config.get("addition_embed_type") == "text_time"), size


def _loaded(request: DemoRequest, dtype: torch.dtype, *, xl: bool) -> Any:
    """The pipeline with its weights, from safetensors alone. Raises ShapecheckError where diffusers cannot."""
    with quiet("transformers"):
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
    shared = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": request.offline}
    own = {"add_watermarker": False} if xl else {"safety_checker": None, "requires_safety_checker": False}
    kind = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
    name = request.controlnet
    try:
        with quiet("diffusers"), quiet("transformers"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # and diffusers 0.35 knows no other
            controlnet = ControlNetModel.from_pretrained(name, **shared)
            name = request.model
            return kind.from_pretrained(name, controlnet=controlnet, variant=request.variant, **own, **shared)
    except Exception as error:  # the files are the user's: whatever diffusers makes of them is told
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ShapecheckError(f"diffusers cannot load {name}: {one_line(lines[0], longest=300)}") from None


def _written(
    request: DemoRequest, folder: Path, control: Floats, ours: Floats, theirs: Floats, without: Floats
) -> Iterator[Picture]:
    """Every picture, once it is in the folder, with what stands under it: two rows of three."""
    made = request.image is None
    apart, factor = pictures.amplified(ours, theirs)
    effect, strength = pictures.amplified(ours, without)
    named: tuple[tuple[str, str, Floats], ...] = (
        ("pytorch", "PyTorch, with the ControlNet", ours),
        (request.backend, f"The same, the UNet in {BACKENDS[request.backend]}", theirs),
        ("difference", f"What these two differ by{_times(factor)}", apart),
        ("depth" if made else "control", f"The control image{', a depth map: nearer is brighter' if made else ''}", control),
        ("without", "PyTorch without the ControlNet", without),
        ("effect", f"What the ControlNet changes{_times(strength)}", effect),
    )
    for name, caption, picture in named:
        pictures.save(picture, folder / f"{name}.png")
        yield Picture(f"{name}.png", caption)


def _times(factor: int) -> str:
    return f", times {factor}" if factor > 1 else ""
