"""Time what surrounds the frames of a picture: its VAE and its text encoders, in PyTorch with random weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from shapecheck import extras
from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.logs import silence_logger
from shapecheck.models.config_file import read_json, refuse_absurd
from shapecheck.pipelines.bench_record import PicturePart
from shapecheck.pipelines.frame import Clock, compile_module, fill_randomly, mark_step_begin
from shapecheck.presets import picture_models
from shapecheck.progress import Progress
from shapecheck.runtime.gpu import free_memory

_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
_WARM_UP, _RUNS = 3, 5
Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PictureModels:
    """Configs of a VAE and of text encoders, and where they were read; None and nothing if they are not known."""

    vae: Config | None
    text: tuple[Config, ...]
    origin: str


def find_picture_models(contract: Contract, names: tuple[str | None, ...]) -> PictureModels:
    """Return those of the first name that is a diffusers folder, or the UNet in one; else the usual ones of the UNet's kind.

    Raises ShapecheckError if a config in the folder cannot be read.
    """
    folders = [
        folder for name in names if name and Path(name).is_dir() for folder in (Path(name), Path(name).absolute().parent)
    ]
    for folder in folders:
        places = (folder / "vae", folder / "text_encoder", folder / "text_encoder_2")
        found = {place.name: read_json(path) for place in places if (path := place / "config.json").is_file()}
        for name, config in found.items():
            refuse_absurd(config, str(folder / name / "config.json"))
        if found:
            encoders = tuple(config for name, config in found.items() if name != "vae")
            return PictureModels(found.get("vae"), encoders, "the folder's own config")
    width, channels = contract.config.get("cross_attention_dim"), contract.config.get("out_channels")
    text = picture_models.TEXT_ENCODERS.get(width, ()) if isinstance(width, int) else ()
    is_usual = text and channels == 4 and contract.header.vae_factor == 8
    return PictureModels(picture_models.VAE if is_usual else None, text if is_usual else (), "the usual config")


def time_parts(
    models: PictureModels, contract: Contract, geometry: Geometry, device: torch.device, *, compiled: bool, progress: Progress
) -> tuple[PicturePart, ...]:
    """Time one VAE decode and one encode of a picture at this size, and one text encoding; `compiled` compiles the VAE too.

    What does not run is a part with its reason.
    """
    clock, dtype = Clock(device), getattr(torch, contract.dtype)
    parts: list[PicturePart] = []
    progress("timing the VAE")
    vae_dtype = dtype
    config = models.vae or {}
    # diffusers' XL pipelines decode in float32 if the VAE overflows in half precision, as its config says.
    if (
        contract.config.get("addition_embed_type") == "text_time"
        and config.get("force_upcast", True)
        and dtype == torch.float16
    ):
        vae_dtype = torch.float32
    size_px = tuple(side * contract.header.vae_factor for side in (geometry.height, geometry.width))
    for name, size in (("VAE decode", (geometry.height, geometry.width)), ("VAE encode", size_px)):
        parts.append(_time_vae(name, models, size, clock, vae_dtype, device, compiled=compiled))
        free_memory()
    progress("timing the text encoder")
    parts.append(_time_text(models, clock, dtype, device))
    free_memory()
    return tuple(parts)


def _time_vae(
    name: str,
    models: PictureModels,
    size: tuple[int, ...],
    clock: Clock,
    dtype: torch.dtype,
    device: torch.device,
    *,
    compiled: bool,
) -> PicturePart:
    """Time one call of the VAE; `size` is the height and width of what it takes."""
    config = models.vae
    if config is None:
        return PicturePart(name, "", reason="no VAE is known for this UNet; a diffusers folder says it in vae/config.json")
    ran, eager = f"{config.get('_class_name')} by {models.origin}, {_show(dtype)}", None
    try:
        vae = _build_vae(config, dtype, device)
        decodes = name == "VAE decode"
        channels = vae.config.latent_channels if decodes else vae.config.in_channels
        value = torch.rand((1, channels, *size)).to(device, dtype)
        call = partial(vae.decode if decodes else vae.encode, value, return_dict=False)
        eager = _time_call(call, clock)
        if not compiled:
            return PicturePart(name, ran, eager)
        half = "decoder" if decodes else "encoder"
        setattr(vae, half, compile_module(getattr(vae, half), "torch-reduce-overhead"))
        return PicturePart(name, ran, eager, _time_call(call, clock, graphs=True))
    except Exception as error:  # a config is the user's, and a compiler may raise anything
        return PicturePart(name, ran, eager, reason=_explain(error))


def _build_vae(config: Config, dtype: torch.dtype, device: torch.device) -> Any:
    name = config.get("_class_name")
    if name not in _CLASSES:
        raise ShapecheckError(f"a VAE of class {one_line(name)} is not timed; known: {', '.join(_CLASSES)}")
    with silence_logger("diffusers"), torch.device("meta"):
        module: nn.Module = getattr(diffusers, name).from_config(dict(config))
    return fill_randomly(module.eval(), dtype, device, seed=0)


def _time_text(models: PictureModels, clock: Clock, dtype: torch.dtype, device: torch.device) -> PicturePart:
    if not models.text:
        reason = "no text encoder is known for this UNet; a diffusers folder says it in text_encoder/config.json"
        return PicturePart("text", "", reason=reason)
    ran = f"by {models.origin}, {_show(dtype)}"
    try:
        encoders = [_build_encoder(config, dtype, device) for config in models.text]
        ran = f"{' and '.join(type(encoder).__name__ for encoder, _ in encoders)} {ran}"

        def encode() -> None:
            for encoder, tokens in encoders:
                encoder(input_ids=tokens, output_hidden_states=True)

        return PicturePart("text", ran, _time_call(encode, clock))
    except Exception as error:  # as above
        return PicturePart("text", ran, reason=_explain(error))


def _build_encoder(config: Config, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Return a CLIP text encoder and one text's tokens for it."""
    import transformers

    settings = transformers.CLIPTextConfig.from_dict(dict(config))
    names = config.get("architectures") or ["CLIPTextModel"]
    if names[0] not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ShapecheckError(f"a text encoder of class {one_line(names[0])} is not timed")
    with torch.device(device):
        encoder: nn.Module = getattr(transformers, names[0])(settings)
        tokens = torch.arange(settings.max_position_embeddings)[None] % settings.vocab_size
    return encoder.to(dtype).eval().requires_grad_(False), tokens


def _time_call(call: Callable[[], object], clock: Clock, *, graphs: bool = False) -> float:
    """Return the median of some calls in milliseconds; the first ones, which may compile or record `graphs`, do not count."""
    times = []
    for _ in range(_WARM_UP + _RUNS):
        if graphs:
            mark_step_begin()
        clock.begin()
        clock.mark()
        call()
        clock.mark()
        times += clock.measure_parts()
    return statistics.median(times[_WARM_UP:])


def _explain(error: Exception) -> str:
    problem = extras.explain_missing(error, "timing the text encoder") if isinstance(error, ModuleNotFoundError) else error
    return one_line(str(problem) or type(problem).__name__, longest=300)


def _show(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
