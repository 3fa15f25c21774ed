"""The demo: a picture in PyTorch, and the same one with the UNet exported and exchanged by `accelerate`."""

from __future__ import annotations

import statistics
import time
import warnings
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
from shapecheck.pipelines.demo_record import Demo, DemoBackend, Picture
from shapecheck.pipelines.pictures import Floats
from shapecheck.progress import Progress, hide_progress_bars, quiet, silent
from shapecheck.runtime.dropin import DropIn
from shapecheck.version import __version__

SMALL_SIZE_PX = (136, 104)
"""Width and height: 17×13 latent cells, odd, so that every halving rounds."""
_GUIDANCE = 5.0
_ALLOWED = 1.0
"""Of 255: too little to be seen."""
_PACKAGES = (
    "torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "tensorrt-rtx-cu13",
)  # fmt: skip


def draw_demo(
    folder: Path,
    *,
    model: str | None,
    controlnet: str | None,
    image: Path | None,
    prompt: str,
    backend: DemoBackend,
    size_px: tuple[int, int] | None,
    steps: int,
    seed: int,
    variant: str | None,
    offline: bool,
    progress: Progress = silent,
) -> Demo:
    """Draw a picture with both, compare them, and write all pictures into the folder, beside the ONNX file or engine.

    Without `model` and `controlnet` the pipeline is small and random; without `image` a depth map is drawn. The pipeline has
    its own UNet again afterwards. Raises ShapecheckError if a model, the image or the backend cannot be had, ContractError if
    UNet and ControlNet do not fit each other.
    """
    device, dtype = ("cpu", torch.float32) if backend == "ort" else ("cuda", torch.float16)
    if device == "cuda" and not torch.cuda.is_available():
        raise ShapecheckError(f"{backend} runs on a GPU, and PyTorch sees none here: `shapecheck doctor` says what is missing")
    opened = pictures.read_image(image) if image is not None else None
    if model is None or controlnet is None:
        pipe, (width, height) = _make_small_pipeline(), size_px or SMALL_SIZE_PX
    else:
        pipe, (width, height) = _load_pipeline(model, controlnet, size_px, dtype, variant, offline, progress)
    pipe.set_progress_bar_config(disable=True)
    with quiet("diffusers"):  # it warns of casts, also where there is nothing to warn of
        pipe.to(device, dtype)
    control = pictures.draw_scene(height, width) if opened is None else pictures.fit_image(opened, height, width)

    def draw(label: str, *, scale: float = 1.0) -> tuple[Floats, float]:
        """Return the picture from the same noise, words and image, and the median seconds of a step after the first."""
        ends = list[float]()

        def end_step(pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if pipe.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            progress(f"drawing with {label}: step {step + 1} of {steps}")
            return values

        drawn = pipe(
            prompt,
            image=control[None],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=_GUIDANCE,
            controlnet_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            callback_on_step_end=end_step,
        )
        return drawn.images[0], statistics.median(later - earlier for earlier, later in pairwise(ends))

    exchanged = accelerate(
        pipe, folder, backend, sizes=[f"{width}x{height}"], batch=["1:2:2"], fallback="error", progress=progress
    )
    with exchanged:
        assert isinstance(exchanged.unet, DropIn) and exchanged.artefact is not None
        contract, artefact = exchanged.unet.contract, exchanged.artefact.name
        theirs, backend_seconds = draw(backend)
    ours, torch_seconds = draw("PyTorch")
    without, _ = draw("PyTorch, no ControlNet", scale=0.0)

    # Two rows of three on the page.
    apart, factor = pictures.amplify_difference(ours, theirs)
    effect, strength = pictures.amplify_difference(ours, without)
    name, made = ("depth", ", a depth map: nearer is brighter") if image is None else ("control", "")
    shown = {
        "pytorch": ("PyTorch, with the ControlNet", ours),
        backend: (f"The same, the UNet in {BACKENDS[backend]}", theirs),
        "difference": (f"What these two differ by{_render_factor(factor)}", apart),
        name: (f"The control image{made}", control),
        "without": ("PyTorch without the ControlNet", without),
        "effect": (f"What the ControlNet changes{_render_factor(strength)}", effect),
    }
    for name, (_, picture) in shown.items():
        pictures.save(picture, folder / f"{name}.png")
    return Demo(
        model=model or "a small UNet like Stable Diffusion 1.5's",
        controlnet=controlnet or "a small ControlNet of the same topology",
        random=model is None,
        prompt=prompt,
        size_px=(width, height),
        steps=steps,
        seed=seed,
        backend=backend,
        device=torch.cuda.get_device_name() if device == "cuda" else f"cpu, PyTorch with {torch.get_num_threads()} threads",
        precision=str(dtype).removeprefix("torch."),
        artefact=artefact,
        contract=contract.digest,
        slots=len(contract.slots),
        pictures=tuple(Picture(f"{name}.png", caption) for name, (caption, _) in shown.items()),
        difference=pictures.compare(ours, theirs),
        control=pictures.compare(ours, without),
        allowed=_ALLOWED if dtype == torch.float32 else None,
        torch_seconds=torch_seconds,
        backend_seconds=backend_seconds,
        versions=(("shapecheck", __version__), *extras.versions(_PACKAGES)),
    )


def _make_small_pipeline() -> Any:
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
    return StableDiffusionControlNetPipeline(
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


def _load_pipeline(
    model: str,
    controlnet: str,
    size_px: tuple[int, int] | None,
    dtype: torch.dtype,
    variant: str | None,
    offline: bool,
    progress: Progress,
) -> tuple[Any, tuple[int, int]]:
    """Load a pipeline from safetensors, and return it with the size it draws at. Both models fit before weights are read."""
    if unweighted := [name for name in (model, controlnet) if name in presets.names()]:
        raise ShapecheckError(f"{unweighted[0]} is a preset, which has no weights: give a diffusers folder or a hub id")
    contract = probe(model, controlnet, offline=offline, progress=progress)
    size = size_px or contract.header.usual_px
    Geometry.from_px(*size, vae_factor=contract.header.vae_factor)
    progress("loading the pipeline")
    with quiet("transformers"):
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
    own: dict[str, Any]
    options = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": offline}
    if contract.config.get("addition_embed_type") == "text_time":
        kind, own = StableDiffusionXLControlNetPipeline, {"add_watermarker": False}
    else:
        kind, own = StableDiffusionControlNetPipeline, {"safety_checker": None, "requires_safety_checker": False}
    name = controlnet
    try:
        with (
            quiet("diffusers"),
            quiet("transformers"),
            hide_progress_bars("diffusers", "transformers"),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # and diffusers 0.35 knows no other
            net = ControlNetModel.from_pretrained(name, **options)
            name = model
            return kind.from_pretrained(name, controlnet=net, variant=variant, **own, **options), size
    except Exception as error:  # the files are the user's: diffusers may raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ShapecheckError(f"diffusers cannot load {name}: {one_line(lines[0], longest=300)}") from None


def _render_factor(factor: int) -> str:
    return f", times {factor}" if factor > 1 else ""
