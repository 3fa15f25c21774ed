"""Frames of one UNet on several backends, timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shapecheck import doctor, extras
from shapecheck.artefact import contract_of
from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.doctor.environment import BACKENDS
from shapecheck.onnx.contract_metadata import contract_inside
from shapecheck.onnx.file import OnnxFile
from shapecheck.pipelines.bench_record import Bench, Frame, Timing
from shapecheck.pipelines.clock import Clock, measure_memory
from shapecheck.pipelines.frame import Play, Stage
from shapecheck.progress import Progress, silent
from shapecheck.runtime.load import load
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import Range, profile_of
from shapecheck.tensorrt.record import is_engine

IN_TORCH = {"torch": "PyTorch, eager", "torch-compile": "PyTorch, torch.compile"}
ON_GPU = ("ort-cuda", "ort-trt", "trt")
KNOWN = (*IN_TORCH, "ort", *ON_GPU)
_PACKAGES = ("torch", "diffusers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13")
_LONGEST = 300


@dataclass
class _Run:
    """One backend while it is timed; without `play` it does not run."""

    play: Play | None = None
    memory: int | None = None
    reason: str = ""
    frames: list[Frame] = field(default_factory=list)


def bench(
    artefact: str,
    *,
    model: str | None = None,
    backends: Sequence[str] = (),
    size_px: tuple[int, int] | None = None,
    batch: int = 1,
    controlnets: int | None = None,
    frames: int = 20,
    warm_up: int = 3,
    offline: bool = False,
    progress: Progress = silent,
) -> Bench:
    """Time frames of an ONNX file or engine, or of a model in PyTorch alone: one of every backend in turn.

    What disturbs the machine so disturbs all backends. `model` is the UNet of an ONNX file that does not say so itself;
    `backends` are of `KNOWN`, by default PyTorch, torch.compile and what the artefact is for; `size_px` is by default the
    model's own; `controlnets` run in every frame, by default one if the UNet takes residuals.

    A backend that does not run is reported with its reason. Raises ShapecheckError if nothing can be timed, or if backends of
    CPU and GPU are requested at once.
    """
    progress("reading the contract")
    contract, path = _read_contract(artefact, model, offline, progress), Path(artefact)
    names, optional = _choose_backends(path, backends)
    device = _choose_device(names)
    if controlnets and not contract.slots:
        raise ShapecheckError(f"{artefact} takes no residuals: --controlnets 0")
    nets = (1 if contract.slots else 0) if controlnets is None else controlnets
    header = contract.header
    geometry = Geometry.from_px(*(size_px or header.usual_px), batch=batch, vae_factor=header.vae_factor)
    contract.require(geometry)

    clock = Clock(device)

    def make_play(name: str) -> Play:
        if name in IN_TORCH:
            return stage.play_in_torch(compiled=name == "torch-compile")
        # For the one size: ONNX Runtime would build its own engine again and again for whatever comes.
        profile = [profile_of(contract, Range(geometry, geometry, geometry))] if name == "ort-trt" else []
        options = profile_formats.make_provider_options(profile) if profile else None
        backend: Any = name
        known = None if is_engine(path) else contract
        return stage.play_in_session(load(artefact, backend, contract=known, device=device, options=options))

    def prepare(name: str) -> _Run:
        """Load a backend, and play frames that do not count."""
        progress("compiling with torch.compile: minutes" if name == "torch-compile" else f"loading {name}")
        gc.collect()
        before = measure_memory(device)
        caught = Exception if name == "torch-compile" else (ShapecheckError, ModuleNotFoundError, torch.OutOfMemoryError)
        try:
            play = make_play(name)
            for _ in range(warm_up):
                clock.begin()
                play(clock)
        except caught as error:  # a compiler may raise anything
            problem = extras.missing(error, name) if isinstance(error, ModuleNotFoundError) else error
            return _Run(reason=one_line(str(problem) or type(problem).__name__, longest=_LONGEST))
        after = measure_memory(device)
        return _Run(play, None if before is None or after is None else max(0, after - before))

    progress("making models with random weights")
    with torch.no_grad():
        stage = Stage(contract, geometry, device, nets)
        runs = {name: prepare(name) for name in names}
        for number in range(frames):
            progress(f"timing frame {number + 1} of {frames}")
            for run in runs.values():
                if run.play is not None:
                    run.frames.append(_time_frame(run.play, clock))
    precision = contract.dtype
    timings = [
        Timing(
            name,
            "" if run.reason else f"{IN_TORCH.get(name) or BACKENDS[name]}, {precision}",
            tuple(run.frames),
            run.memory,
            run.reason,
            asked=name not in optional,
        )
        for name, run in runs.items()
    ]
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return Bench(artefact, contract.digest, geometry, nets, place, tuple(timings), extras.versions(_PACKAGES))


def _read_contract(artefact: str, model: str | None, offline: bool, progress: Progress) -> Contract:
    """Return what the artefact says it is, or else what the user says."""
    contract = contract_inside(OnnxFile(artefact)) if model and artefact.lower().endswith(".onnx") else None
    if contract is None:
        contract = contract_of(model or artefact, offline=offline, progress=progress)
    if contract.role != "unet":
        raise ShapecheckError(f"{artefact} is a ControlNet: give a UNet, and --controlnets for how many run beside it")
    return contract


def _time_frame(play: Play, clock: Clock) -> Frame:
    """Time a frame, after one that does not count.

    So every frame follows one of its own backend: ONNX Runtime's threads go on spinning after a call, and slow down what
    comes next.
    """
    clock.begin()
    play(clock)
    clock.begin()
    play(clock)
    controlnet, before, unet, after = clock.parts()
    return Frame(controlnet, before + after, unet)


def _choose_backends(path: Path, requested: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the backends to time, and those of them that nobody named and the artefact is not for."""
    if unknown := [name for name in requested if name not in KNOWN]:
        raise ShapecheckError(f"no backend {unknown[0]!r} to time; known: {', '.join(KNOWN)}")
    if requested:
        return tuple(dict.fromkeys(requested)), ()
    if is_engine(path):
        return (*IN_TORCH, "trt"), tuple(IN_TORCH)
    if path.suffix.lower() == ".onnx":
        return (*IN_TORCH, "ort-cuda" if torch.cuda.is_available() else "ort"), tuple(IN_TORCH)
    return tuple(IN_TORCH), ("torch-compile",)


def _choose_device(names: Sequence[str]) -> torch.device:
    """Return one device for all: numbers of a CPU and of a GPU are not compared."""
    on_gpu = [name for name in names if name in ON_GPU]
    if on_gpu and "ort" in names:
        raise ShapecheckError(f"ort runs on the CPU and {on_gpu[0]} on a GPU: time them in two runs")
    if on_gpu and not torch.cuda.is_available():
        problems = "; ".join(gap.problem for gap in doctor.backend(on_gpu[0]).gaps)
        raise ShapecheckError(f"{on_gpu[0]} cannot run here: {problems or 'PyTorch sees no GPU'}")
    return torch.device("cuda" if on_gpu or ("ort" not in names and torch.cuda.is_available()) else "cpu")
