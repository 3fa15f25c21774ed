"""Time frames of one UNet on several backends, in turns."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shapecheck import doctor, extras
from shapecheck.artefact import resolve_contract
from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.doctor.environment import BACKENDS
from shapecheck.onnx.contract_metadata import contract_inside
from shapecheck.onnx.file import OnnxFile
from shapecheck.pipelines.bench_record import BENCH_BACKENDS, TORCH_BACKENDS, Bench, Frame, Timing
from shapecheck.pipelines.frame import Clock, FrameMaker, PlayFrame
from shapecheck.progress import Progress, silent
from shapecheck.runtime.load import load
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import Range, profile_of
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
    frames: int = 20,
    warm_up: int = 3,
    offline: bool = False,
    progress: Progress = silent,
) -> Bench:
    """Time frames of an ONNX file or engine, or of a model in PyTorch alone: one frame of every backend in turn.

    So what disturbs the machine disturbs all backends. `model` is the UNet of an ONNX file that holds no contract; `backends`
    are of `BENCH_BACKENDS`, by default PyTorch, torch.compile and what the artefact is for; `size_px` is by default the model's
    own; `controlnets` run in every frame, by default one if the UNet takes residuals.

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
    plays: dict[str, PlayFrame] = {}

    def make_frame(name: str) -> PlayFrame:
        if name in TORCH_BACKENDS:
            return maker.make_frame(torch.compile(maker.torch_unet) if name == "torch-compile" else maker.torch_unet)
        # A profile of this one size: without one ONNX Runtime builds its own engine again and again for whatever comes.
        profiles = [profile_of(contract, Range(geometry, geometry, geometry))] if name == "ort-trt" else []
        options = profile_formats.make_provider_options(profiles) if profiles else None
        backend: Any = name
        known = None if is_engine(path) else contract
        return maker.make_frame(load(artefact, backend, contract=known, device=device, options=options))

    def prepare(name: str) -> Timing:
        """Load a backend and play frames that do not count. Return its timing, still without frames."""
        progress("compiling with torch.compile: minutes" if name == "torch-compile" else f"loading {name}")
        gc.collect()
        before, requested = measure_memory(device), name not in optional
        # A compiler may raise anything.
        caught = Exception if name == "torch-compile" else (ShapecheckError, ModuleNotFoundError, torch.OutOfMemoryError)
        try:
            play = make_frame(name)
            for _ in range(warm_up):
                clock.begin()
                play(clock)
        except caught as error:
            problem = extras.explain_missing(error, name) if isinstance(error, ModuleNotFoundError) else error
            return Timing(name, "", reason=one_line(str(problem) or type(problem).__name__, longest=300), asked=requested)
        plays[name], after = play, measure_memory(device)
        memory = None if before is None or after is None else max(0, after - before)
        return Timing(name, f"{TORCH_BACKENDS.get(name) or BACKENDS[name]}, {contract.dtype}", (), memory, asked=requested)

    progress("making models with random weights")
    with torch.no_grad():
        maker = FrameMaker(contract, geometry, device, nets)
        timings = [prepare(name) for name in names]
        measured: dict[str, list[Frame]] = {name: [] for name in names}
        for number in range(frames):
            progress(f"timing frame {number + 1} of {frames}")
            for name, play in plays.items():
                # The second is timed: ONNX Runtime's threads go on spinning after a call, and slow down another backend.
                for _ in range(2):
                    clock.begin()
                    play(clock)
                controlnet, before, unet, after = clock.measure_parts()
                measured[name].append(Frame(controlnet, before + after, unet))
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    timed = tuple(replace(timing, frames=tuple(measured[timing.backend])) for timing in timings)
    return Bench(artefact, contract.digest, geometry, nets, place, timed, extras.list_versions(_PACKAGES))


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
    if is_engine(path):
        return (*TORCH_BACKENDS, "trt"), tuple(TORCH_BACKENDS)
    if path.suffix.lower() == ".onnx":
        return (*TORCH_BACKENDS, "ort-cuda" if torch.cuda.is_available() else "ort"), tuple(TORCH_BACKENDS)
    return tuple(TORCH_BACKENDS), ("torch-compile",)


def _choose_device(names: Sequence[str]) -> torch.device:
    """Return one device for all: numbers of a CPU and of a GPU are not compared."""
    on_gpu = [name for name in names if name not in TORCH_BACKENDS and name != "ort"]
    if on_gpu and "ort" in names:
        raise ShapecheckError(f"ort runs on the CPU and {on_gpu[0]} on a GPU: time them in two runs")
    if on_gpu and not torch.cuda.is_available():
        problems = "; ".join(gap.problem for gap in doctor.backend(on_gpu[0]).gaps)
        raise ShapecheckError(f"{on_gpu[0]} cannot run here: {problems or 'PyTorch sees no GPU'}")
    return torch.device("cuda" if on_gpu or ("ort" not in names and torch.cuda.is_available()) else "cpu")


def measure_memory(device: torch.device) -> int | None:
    """Return the bytes in use, on a GPU by everybody, else by this process; None if the system does not say."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
