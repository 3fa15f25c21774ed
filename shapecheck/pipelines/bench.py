"""Time frames of one UNet on several backends, in turns, and what a picture takes besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from shapecheck import doctor, extras
from shapecheck.artefact import read_contract, resolve_contract
from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.onnx.contract_metadata import contract_inside
from shapecheck.onnx.file import OnnxFile
from shapecheck.pipelines.bench_record import BENCH_BACKENDS, COMPILED, TORCH_BACKENDS, Bench
from shapecheck.pipelines.frame_loading import Loader
from shapecheck.pipelines.frame_timing import time_candidates
from shapecheck.pipelines.picture_parts import find_picture_models, time_parts
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.record import is_engine

_PACKAGES = ("torch", "diffusers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13")


def time_frames(
    artefact: str,
    *,
    model: str | None = None,
    backends: Sequence[str] = (),
    size_px: tuple[int, int] | None = None,
    batch: int = 1,
    controlnets: int | None = None,
    controlnet_files: Sequence[str] = (),
    frames: int = 20,
    warm_up: int = 3,
    steps: int = 20,
    offline: bool = False,
    progress: Progress = silent,
) -> Bench:
    """Time frames of an ONNX file or engine, or of a model in PyTorch alone: one frame of every backend in turn.

    So what disturbs the machine disturbs all backends. `model` is the UNet of an ONNX file that holds no contract; `backends`
    are of `BENCH_BACKENDS`, by default PyTorch, torch.compile and what the artefact is for; `size_px` is by default the model's
    own. `controlnets` run in every frame, in PyTorch, by default one if the UNet takes residuals; or `controlnet_files`, each
    an ONNX file or an engine, do so with every backend that runs files, and their likes in PyTorch with the others. `steps`
    is how many frames a picture has, whose other parts are timed once.

    A backend that does not run is reported with its reason. Raises ShapecheckError if nothing can be timed, if backends of
    CPU and GPU are requested at once, or if a ControlNet does not fit the UNet.
    """
    progress("reading the contract")
    contract, path = _read_contract(artefact, model, offline, progress), Path(artefact)
    names, optional = _choose_backends(path, backends)
    device = _choose_device(names)
    if (controlnets or controlnet_files) and not contract.slots:
        raise ShapecheckError(f"{artefact} takes no residuals: --controlnets 0")
    if controlnets is not None and controlnet_files:
        raise ShapecheckError("--controlnet names those that run, --controlnets how many others do: give one of both")
    header = contract.header
    geometry = Geometry.from_px(*(size_px or header.usual_px), batch=batch, vae_factor=header.vae_factor)
    contract.require(geometry)
    count = (1 if contract.slots else 0) if controlnets is None else controlnets
    nets = _read_controlnets(controlnet_files, contract, geometry) or [None] * count
    loader = Loader(artefact, contract, geometry, device, controlnet_files, nets)
    candidates = [replace(loader.make_candidate(name), asked=name not in optional) for name in names]
    models = find_picture_models(contract, (model, artefact))
    progress("making models with random weights")
    with torch.no_grad():
        timings = time_candidates(candidates, device, frames=frames, warm_up=warm_up, progress=progress)
        compiled = any(timing.backend in COMPILED and timing.frames for timing in timings)
        parts = time_parts(models, contract, geometry, device, compiled=compiled, progress=progress)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    versions = extras.list_versions(_PACKAGES)
    return Bench(artefact, contract.digest, geometry, len(nets), place, timings, versions, steps, parts)


def _read_controlnets(files: Sequence[str], unet: Contract, geometry: Geometry) -> list[Contract | None]:
    """Return the contracts in files of ControlNets. Raises ShapecheckError if one is of another model or does not fit."""
    contracts: list[Contract | None] = []
    for file in files:
        contract = read_contract(file)
        if contract.role != "controlnet":
            raise ShapecheckError(f"{file} is a UNet: --controlnet takes a ControlNet's ONNX file or engine")
        unet.verify(contract.shapes(geometry), geometry)
        contracts.append(contract)
    return contracts


def _read_contract(artefact: str, model: str | None, offline: bool, progress: Progress) -> Contract:
    """Return the contract inside the artefact, or else that of the model it is said to be."""
    contract = contract_inside(OnnxFile(artefact)) if model and artefact.lower().endswith(".onnx") else None
    if contract is None:
        contract = resolve_contract(model or artefact, offline=offline, progress=progress)
    if contract.role != "unet":
        raise ShapecheckError(f"{artefact} is a ControlNet: give a UNet, and --controlnets for how many run beside it")
    return contract


def _choose_backends(path: Path, requested: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the backends to time, and those of them that nobody named and the artefact is not for."""
    if unknown := [name for name in requested if name not in BENCH_BACKENDS]:
        raise ShapecheckError(f"no backend {unknown[0]!r} to time; known: {', '.join(BENCH_BACKENDS)}")
    if requested:
        return tuple(dict.fromkeys(requested)), ()
    usual = ("torch", "torch-compile")
    if is_engine(path):
        return (*usual, "trt"), usual
    if path.suffix.lower() == ".onnx":
        return (*usual, "ort-cuda" if torch.cuda.is_available() else "ort"), usual
    return usual, ("torch-compile",)


def _choose_device(names: Sequence[str]) -> torch.device:
    """Return one device for all: numbers of a CPU and of a GPU are not compared."""
    on_gpu = [name for name in names if name not in TORCH_BACKENDS and name != "ort"]
    if on_gpu and "ort" in names:
        raise ShapecheckError(f"ort runs on the CPU and {on_gpu[0]} on a GPU: time them in two runs")
    if on_gpu and not torch.cuda.is_available():
        problems = "; ".join(gap.problem for gap in doctor.backend(on_gpu[0]).gaps)
        raise ShapecheckError(f"{on_gpu[0]} cannot run here: {problems or 'PyTorch sees no GPU'}")
    return torch.device("cuda" if on_gpu or ("ort" not in names and torch.cuda.is_available()) else "cpu")
