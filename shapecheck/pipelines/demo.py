"""Draw a picture in PyTorch, and the same one with the UNet exported and exchanged by `accelerate`."""

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
from shapecheck.logs import hide_progress_bars, silence_logger
from shapecheck.observe.probe import probe
from shapecheck.pipelines import pictures
from shapecheck.pipelines.accelerate import accelerate
from shapecheck.pipelines.demo_record import Demo, DemoBackend, Picture
from shapecheck.pipelines.tiny_pipeline import build_tiny_pipeline
from shapecheck.progress import Progress, silent
from shapecheck.runtime.dropin import DropIn
from shapecheck.version import __version__

_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13")


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
    """Draw a picture with both, compare them, and write all pictures into the folder, beside what was made to run the UNet.

    Without `model` and `controlnet` the pipeline is small and random; without `image` a depth map is drawn. The pipeline has
    its own UNet again afterwards. Raises ShapecheckError if a model, the image or the backend cannot be had, ContractError if
    UNet and ControlNet do not fit each other.
    """
    runs_on_cpu = backend == "ort" or (backend == "torch-compile" and not torch.cuda.is_available())
    device, dtype = ("cpu", torch.float32) if runs_on_cpu else ("cuda", torch.float16)
    if device == "cuda" and not torch.cuda.is_available():
        raise ShapecheckError(f"{backend} runs on a GPU, and PyTorch sees none here: `shapecheck doctor` says what is missing")
    control_image = pictures.read_image(image) if image is not None else None
    if model is None or controlnet is None:
        # 17×13 latent cells: odd, so that every halving rounds.
        pipe, (width, height) = build_tiny_pipeline(), size_px or (136, 104)
    else:
        pipe, (width, height) = _load_pipeline(model, controlnet, size_px, dtype, variant, offline, progress)
    pipe.set_progress_bar_config(disable=True)
    # diffusers warns of casts even if there is nothing to warn of.
    with silence_logger("diffusers"):
        pipe.to(device, dtype)
    if control_image is None:
        control, control_name, origin = pictures.draw_scene(height, width), "depth", ", a depth map: nearer is brighter"
    else:
        control, control_name, origin = pictures.fit_image(control_image, height, width), "control", ""

    def draw(label: str, *, scale: float = 1.0) -> tuple[pictures.Floats, float]:
        """Return the picture from the same noise, words and image, and the median seconds of a step after the first."""
        ends = list[float]()

        def end_step(pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if pipe.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            progress(f"drawing with {label}: step {step + 1} of {steps}")
            return values

        result = pipe(
            prompt,
            image=control[None],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=5.0,
            controlnet_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            callback_on_step_end=end_step,
        )
        return result.images[0], statistics.median(later - earlier for earlier, later in pairwise(ends))

    exchanged = accelerate(
        pipe,
        folder,
        backend,
        sizes=[f"{width}x{height}"],
        batch=["1:2:2"],
        controlnets=False,
        fallback="error",
        progress=progress,
    )
    with exchanged:
        assert isinstance(exchanged.unet, DropIn)
        contract, artefact = exchanged.unet.contract, exchanged.artefact.name if exchanged.artefact is not None else ""
        backend_picture, backend_seconds = draw(backend)
    torch_picture, torch_seconds = draw("PyTorch")
    uncontrolled, _ = draw("PyTorch, no ControlNet", scale=0.0)

    def amplify(other: pictures.Floats, caption: str) -> tuple[str, pictures.Floats]:
        apart, factor = pictures.amplify_difference(torch_picture, other)
        return caption + (f", times {factor}" if factor > 1 else ""), apart

    # Two rows of three on the page.
    shown = {
        "pytorch": ("PyTorch, with the ControlNet", torch_picture),
        backend: (f"The same, the UNet in {BACKENDS[backend]}", backend_picture),
        "difference": amplify(backend_picture, "What these two differ by"),
        control_name: (f"The control image{origin}", control),
        "without": ("PyTorch without the ControlNet", uncontrolled),
        "effect": amplify(uncontrolled, "What the ControlNet changes"),
    }
    for name, (_, picture) in shown.items():
        pictures.save_picture(picture, folder / f"{name}.png")
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
        difference=pictures.measure_change(torch_picture, backend_picture),
        control=pictures.measure_change(torch_picture, uncontrolled),
        allowed=1.0 if dtype == torch.float32 else None,  # of 255: too little to be seen
        torch_seconds=torch_seconds,
        backend_seconds=backend_seconds,
        versions=(("shapecheck", __version__), *extras.list_versions(_PACKAGES)),
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
    with silence_logger("transformers"):
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": offline}
    kind: Any = StableDiffusionControlNetPipeline
    own: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    if contract.config.get("addition_embed_type") == "text_time":
        kind, own = StableDiffusionXLControlNetPipeline, {"add_watermarker": False}
    name, libraries = controlnet, ("diffusers", "transformers")
    try:
        with (
            silence_logger("diffusers"),
            silence_logger("transformers"),
            hide_progress_bars(*libraries),
            warnings.catch_warnings(),
        ):
            # The oldest diffusers that is supported knows no other name.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            net = ControlNetModel.from_pretrained(name, **options)
            name = model
            return kind.from_pretrained(name, controlnet=net, variant=variant, **own, **options), size
    except Exception as error:  # the files are the user's: diffusers may raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ShapecheckError(f"diffusers cannot load {name}: {one_line(lines[0], longest=300)}") from None
