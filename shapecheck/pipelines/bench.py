"""Frames of one UNet on several backends, timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shapecheck import doctor, extras
from shapecheck.artefact import contract_of
from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.contract.contract import dtypes_of
from shapecheck.contract.errors import one_line
from shapecheck.doctor.environment import BACKENDS
from shapecheck.onnx.contract_metadata import contract_inside
from shapecheck.pipelines.bench_record import Bench, Frame, Timing
from shapecheck.pipelines.clock import Clock, taken
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


@dataclass(frozen=True, slots=True)
class Request:
    """What to time, as a user says it."""

    artefact: str
    """An ONNX file or an engine; or a model, which is timed in PyTorch alone."""
    model: str | None = None
    """Which UNet an ONNX file is that does not say so itself."""
    backends: tuple[str, ...] = ()
    """Of `KNOWN`; by default PyTorch, torch.compile, and what the artefact is for."""
    size_px: tuple[int, int] | None = None
    """Width and height; by default the model's own."""
    batch: int = 1
    controlnets: int | None = None
    """How many are called in every frame; by default one where the UNet takes residuals."""
    frames: int = 20
    warm_up: int = 3
    offline: bool = False


def bench(request: Request, progress: Progress = silent) -> Bench:
    """Time a request's frames: of every backend one in turn, so that what disturbs the machine disturbs all.

    A backend that does not run is told with its reason. Raises ShapecheckError where nothing can be timed, or backends of CPU
    and GPU are asked for at once.
    """
    progress("reading the contract")
    contract = _contract(request, progress)
    names, optional = _names(request)
    device = _device(names)
    controlnets = _controlnets(request, contract)
    geometry = _geometry(request, contract)
    progress("making models with random weights")
    with torch.no_grad():
        stage = Stage(contract, geometry, device, controlnets)
        runs = {name: _Run(name, request, contract, device) for name in names}
        for run in runs.values():
            run.warm_up(stage, progress)
        for number in range(request.frames):
            progress(f"timing frame {number + 1} of {request.frames}")
            for run in runs.values():
                run.time()
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    timings = [run.timing(asked=name not in optional) for name, run in runs.items()]
    return Bench(request.artefact, contract.digest, geometry, controlnets, place, tuple(timings), extras.versions(_PACKAGES))


class _Run:
    """One backend: made ready, then a frame at a time."""

    def __init__(self, name: str, request: Request, contract: Contract, device: torch.device) -> None:
        self._name, self._request, self._contract, self._device = name, request, contract, device
        self._clock = Clock(device)
        self._play: Play | None = None
        self._frames: list[Frame] = []
        self._memory: int | None = None
        self._reason = ""

    def warm_up(self, stage: Stage, progress: Progress) -> None:
        """Load it, and play frames that do not count. What it then cannot do is its reason."""
        progress("compiling with torch.compile: minutes" if self._name == "torch-compile" else f"loading {self._name}")
        gc.collect()
        before = taken(self._device)
        caught = Exception if self._name == "torch-compile" else (ShapecheckError, ModuleNotFoundError, torch.OutOfMemoryError)
        try:
            play = self._made(stage)
            for _ in range(self._request.warm_up):
                self._clock.begin()
                play(self._clock)
        except caught as error:  # a compiler may raise anything
            told = extras.missing(error, self._name) if isinstance(error, ModuleNotFoundError) else error
            self._reason = one_line(str(told) or type(told).__name__, longest=_LONGEST)
            return
        self._play, after = play, taken(self._device)
        self._memory = None if before is None or after is None else max(0, after - before)

    def time(self) -> None:
        """One frame more, if it runs, after one that does not count.

        So every frame follows one of its own backend: ONNX Runtime's threads go on spinning after a call, and slow down what
        comes next.
        """
        if self._play is not None:
            self._play(self._clock)
            self._clock.begin()
            self._play(self._clock)
            controlnet, before, unet, after = self._clock.parts()
            self._frames.append(Frame(controlnet, before + after, unet))

    def timing(self, *, asked: bool) -> Timing:
        """What all frames came to."""
        ran = f"{IN_TORCH.get(self._name) or BACKENDS[self._name]}, {dtypes_of(self._contract)['sample']}"
        return Timing(self._name, "" if self._reason else ran, tuple(self._frames), self._memory, self._reason, asked)

    def _made(self, stage: Stage) -> Play:
        if self._name in IN_TORCH:
            return stage.in_torch(compiled=self._name == "torch-compile")
        options = self._profile_options() if self._name == "ort-trt" else None
        contract = None if is_engine(Path(self._request.artefact)) else self._contract
        backend: Any = self._name
        unet = load(self._request.artefact, backend, contract=contract, device=self._device, options=options)
        return stage.in_session(unet)

    def _profile_options(self) -> Mapping[str, str]:
        """An engine for the one size; ONNX Runtime's own for whatever comes would be built again and again."""
        sizes = Range(*[_geometry(self._request, self._contract)] * 3)
        return profile_formats.provider_options([profile_of(self._contract, sizes)])


def _contract(request: Request, progress: Progress) -> Contract:
    """What the artefact says it is, else what the user says."""
    path = Path(request.artefact)
    found = contract_inside(path) if request.model and path.suffix.lower() == ".onnx" else None
    name = request.model if request.model and found is None else request.artefact
    contract = found or contract_of(name, offline=request.offline, progress=progress)
    if contract.role != "unet":
        raise ShapecheckError(f"{request.artefact} is a ControlNet: give a UNet, and --controlnets for how many run beside it")
    return contract


def _names(request: Request) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The backends to time, and those of them that nobody named, nor the artefact is for."""
    if unknown := [each for each in request.backends if each not in KNOWN]:
        raise ShapecheckError(f"no backend {unknown[0]!r} to time; known: {', '.join(KNOWN)}")
    path = Path(request.artefact)
    if request.backends:
        return tuple(dict.fromkeys(request.backends)), ()
    if is_engine(path):
        return (*IN_TORCH, "trt"), tuple(IN_TORCH)
    if path.suffix.lower() == ".onnx":
        return (*IN_TORCH, "ort-cuda" if torch.cuda.is_available() else "ort"), tuple(IN_TORCH)
    return tuple(IN_TORCH), ("torch-compile",)


def _device(names: Sequence[str]) -> torch.device:
    """One for all, for numbers of a CPU and of a GPU are not compared."""
    on_gpu = [name for name in names if name in ON_GPU]
    if on_gpu and "ort" in names:
        raise ShapecheckError(f"ort runs on the CPU and {on_gpu[0]} on a GPU: time them in two runs")
    if on_gpu and not torch.cuda.is_available():
        gap = doctor.backend(on_gpu[0]).gaps
        raise ShapecheckError(
            f"{on_gpu[0]} cannot run here: {'; '.join(each.problem for each in gap) or 'PyTorch sees no GPU'}"
        )
    return torch.device("cuda" if on_gpu or ("ort" not in names and torch.cuda.is_available()) else "cpu")


def _controlnets(request: Request, contract: Contract) -> int:
    wanted = request.controlnets
    if wanted and not contract.slots:
        raise ShapecheckError(f"{request.artefact} takes no residuals: --controlnets 0")
    return (1 if contract.slots else 0) if wanted is None else wanted


def _geometry(request: Request, contract: Contract) -> Geometry:
    header = contract.header
    geometry = Geometry.from_px(*(request.size_px or header.usual_px), batch=request.batch, vae_factor=header.vae_factor)
    contract.require(geometry)
    return geometry
