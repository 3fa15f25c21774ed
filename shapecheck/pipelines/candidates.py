"""One backend as a candidate for a pipeline: its UNet and its ControlNets, each exported or compiled, and opened."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from shapecheck import doctor, extras
from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.observe.subject import resolve_subject
from shapecheck.pipelines.export_cache import ExportCache
from shapecheck.pipelines.kept_contracts import find_own_contract
from shapecheck.pipelines.model_owners import require_exchangeable
from shapecheck.progress import Progress
from shapecheck.runtime.dropin import DropIn
from shapecheck.runtime.dropin_saving import find_live
from shapecheck.runtime.gpu import free_memory
from shapecheck.runtime.load import load
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import Profile, Range, profile_of
from shapecheck.tensorrt.record import Target

SHARES_WEIGHTS = ("torch", "torch-compile")
"""Backends that compute with the weights of the PyTorch modules, which then stay on their device."""
_SD15_UNET = 686
"""Parameters of Stable Diffusion 1.5's UNet, tensors and not numbers: what takes time to trace and to compile are layers."""
_EXPORT, _COMPILE, _ENGINE, _PROVIDER_ENGINE, _LOADING = 45.0, 60.0, 230.0, 130.0, 8.0
"""Seconds that these took for it on an H200."""
_GPU_SHARES = {"torch-compile": 0.25, "trt": 0.3, "ort-trt": 0.5, "ort-cuda": 0.6}
_CPU_SHARES = {"ort": 0.7, "torch-compile": 0.85}
"""Frame times that may be expected, as shares of eager PyTorch's: for the order in which candidates are tried."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """One model of a pipeline and what runs it: `torch` is its original, and `module` what the pipeline calls.

    `artefact` is its ONNX file or engine, None if it is compiled or in PyTorch; `reason` says why it stays in PyTorch.
    """

    backend: str
    module: nn.Module = field(repr=False)
    torch: nn.Module = field(repr=False)
    artefact: Path | None = None
    reason: str = ""

    def close(self) -> None:
        """Free the session. Closing again is fine."""
        if isinstance(self.module, DropIn):
            self.module.close()


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a backend makes of a whole pipeline."""

    backend: str
    unet: Running
    controlnets: tuple[Running, ...]

    @property
    def parts(self) -> tuple[Running, ...]:
        return (self.unet, *self.controlnets)


def keep_in_torch(unet: nn.Module, controlnets: Sequence[nn.Module]) -> Candidate:
    """Return PyTorch as it is."""
    return Candidate("torch", Running("torch", unet, unet), tuple(Running("torch", net, net) for net in controlnets))


class CandidateMaker:
    """Opens models in a backend, at the sizes of a pipeline; what is made for it is kept in a folder.

    `options` are those of `load`. With `strict` a ControlNet that cannot be exchanged is an error, else it stays in PyTorch.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Sequence[Range],
        options: Mapping[str, Any],
        progress: Progress,
        *,
        contracts: Mapping[nn.Module, Contract],
        strict: bool,
        refittable: bool = False,
    ) -> None:
        self.folder, self.sizes, self.options, self.progress = folder, tuple(sizes), dict(options), progress
        self.strict, self.refittable, self._contracts = strict, refittable, dict(contracts)
        self._caches: dict[nn.Module, ExportCache] = {}

    def find_cache(self, model: nn.Module) -> ExportCache:
        """Return the files of a model, which hashes its weights once."""
        if model not in self._caches:
            self._caches[model] = ExportCache(model, self.folder, self.progress, refittable=self.refittable)
        return self._caches[model]

    def find_contract(self, model: nn.Module) -> Contract:
        """Return the contract that a file of the model has to keep."""
        if model not in self._contracts:
            self._contracts[model] = find_own_contract(self.folder, model)
        return self._contracts[model]

    def find_obstacle(self, net: nn.Module) -> str:
        """Return why no backend takes a ControlNet, such as a union one; nothing if one may."""
        try:
            require_exchangeable(net, "ControlNet")
            resolve_subject(net).dtype(None)
        except ShapecheckError as error:
            return str(error)
        return ""

    def make_profiles(self, model: nn.Module) -> tuple[Profile, ...]:
        """Return the profiles of a UNet or a ControlNet: both at the same sizes."""
        return tuple(profile_of(self.find_contract(model), sizes) for sizes in self.sizes)

    def prepare(
        self, backend: str, unet: nn.Module, controlnets: Sequence[nn.Module], *, aside: bool = False, checked: bool = False
    ) -> Candidate:
        """Return all of a pipeline in that backend, or raise with everything closed and the modules where they were.

        With `aside` a PyTorch module goes to the CPU's memory before its session is opened. `checked`: doctor was asked.
        """
        parts: list[Running] = []
        try:
            parts.append(self.open(backend, unet, "UNet", aside=aside, checked=checked))
            parts += [self.open_controlnet(backend, net, aside=aside, checked=True) for net in controlnets]
        except BaseException:
            close_all(parts)
            raise
        return Candidate(backend, parts[0], tuple(parts[1:]))

    def open_controlnet(self, backend: str, net: nn.Module, *, aside: bool, checked: bool = False) -> Running:
        """Return a ControlNet in that backend, or in PyTorch with the reason, which is logged."""
        try:
            # The UNet that takes the residuals finds what is not finite, if anybody should, and names the slot.
            return self.open(backend, net, "ControlNet", aside=aside, checked=checked, finite=False)
        except list_refusals(backend) as error:
            if self.strict:
                raise
            reason = explain_failure(error, next(net.parameters()).device)
        _log.warning("a ControlNet stays in PyTorch, %s does not run it: %s", backend, reason)
        return Running("torch", net, net, reason=reason)

    def open(self, backend: str, model: nn.Module, noun: str, *, aside: bool, checked: bool = False, **given: Any) -> Running:
        """Return a model in that backend, with these options beside its own. If this raises, PyTorch's is back where it was."""
        device = next(model.parameters()).device
        if backend != "torch-compile" and (device.type == "cuda") != (backend != "ort"):
            place = "the CPU" if backend == "ort" else "a GPU"
            raise ShapecheckError(f"it runs on {place} and the {noun} is on {device}: move the pipeline first, with pipe.to(…)")
        require_exchangeable(model, noun)
        options: dict[str, Any] = {"device": device, **self.options, **given}
        name: Any = backend
        if backend in SHARES_WEIGHTS:
            original = unwrap_compiled(model)
            del options["graphs"]  # it replays CUDA graphs anyway
            options["cache"] = self.folder / "torch-compile"
            return Running(backend, _open(model, original, name, contract=self.find_contract(model), **options), model)
        cache = self.find_cache(model)
        # An export takes minutes: tell before it what cannot run.
        if not checked and not cache.is_exported:
            require_running(backend)
        artefact = cache.export_onnx()
        try:
            if aside:
                # The GPU's memory is for the session that takes its place.
                model.to("cpu")
                free_memory()
            if backend in get_args(Target):
                artefact = cache.build_engine(name, self.make_profiles(model))
                return Running(backend, _open(model, artefact, "trt", **options), model, artefact)
            if backend == "ort-trt":
                with cache.keep_engine(self._make_provider_options(model)) as kept:
                    return Running(backend, _open(model, artefact, name, options=kept, **options), model, artefact)
            return Running(backend, _open(model, artefact, name, **options), model, artefact)
        except BaseException:
            model.to(device)
            raise

    def is_made(self, backend: str, models: Sequence[nn.Module]) -> bool:
        """Return whether the folder holds all that takes long: ONNX files and engines. Compiled code is not looked for."""
        with suppress(ShapecheckError):
            is_there = all(self.find_cache(model).is_exported and self._has_engine(backend, model) for model in models)
            return is_there and backend not in SHARES_WEIGHTS
        return False

    def estimate_seconds(self, backend: str, models: Sequence[nn.Module]) -> float:
        """Return about how long it takes to prepare these models, with what the folder holds."""
        return sum(self._estimate_one(backend, model) for model in models)

    def order_candidates(self, device: torch.device, models: Sequence[nn.Module]) -> tuple[str, ...]:
        """Return the backends for this device, the one with the most to gain for each second of preparation first."""
        shares = _GPU_SHARES if device.type == "cuda" else _CPU_SHARES
        seconds = {backend: self.estimate_seconds(backend, models) for backend in shares}
        return tuple(sorted(shares, key=lambda backend: (shares[backend] - 1) / (seconds[backend] + 1)))

    def _estimate_one(self, backend: str, model: nn.Module) -> float:
        size = len(tuple(model.parameters())) / _SD15_UNET
        if backend == "torch-compile":
            return _COMPILE * size
        try:
            exporting = _EXPORT if self.find_cache(model).needs_export else 0.0
            building = {"trt": _ENGINE, "ort-trt": _PROVIDER_ENGINE}.get(backend, 0.0)
            if not exporting and self._has_engine(backend, model):
                building = 0.0
        except ShapecheckError:  # it cannot be exported: it stays in PyTorch
            return 0.0
        return (exporting + building + _LOADING) * size

    def _has_engine(self, backend: str, model: nn.Module) -> bool:
        """Return whether the engine is there that a backend needs, if it needs one."""
        if backend == "trt":
            return self.find_cache(model).has_engine("trt", self.make_profiles(model))
        if backend == "ort-trt":
            return self.find_cache(model).has_provider_engine(self._make_provider_options(model))
        return True

    def _make_provider_options(self, model: nn.Module) -> Mapping[str, str]:
        return profile_formats.make_provider_options(self.make_profiles(model))


def _open(model: nn.Module, artefact: Path | nn.Module, backend: Any, **options: Any) -> DropIn:
    """Load what was made of a PyTorch model, which is what is saved with the pipeline."""
    drop_in = load(artefact, backend, **options)
    drop_in.come_from(partial(find_live, unwrap_compiled(model)))
    return drop_in


def require_running(backend: str) -> None:
    """Raise ShapecheckError with all that keeps a backend from running here."""
    if not (status := doctor.backend(backend)).runs:
        raise ShapecheckError("; ".join(f"{gap.problem} ({gap.fix})" for gap in status.gaps))


def close_all(parts: Sequence[Running]) -> None:
    """Close sessions, and put their PyTorch modules on the device where these ran."""
    for part in parts:
        if isinstance(part.module, DropIn):
            device = part.module.engine.device  # and not the one that a pipeline was moved to since
            part.close()
            part.torch.to(device)
    free_memory()


def explain_failure(error: BaseException, device: torch.device) -> str:
    """Return in one line why a backend does not run; memory that did not suffice with figures."""
    if isinstance(error, ModuleNotFoundError):
        error = extras.explain_missing(error, "it")
    if isinstance(error, torch.OutOfMemoryError):
        free_memory()
        figures = ""
        if device.type == "cuda" and torch.cuda.is_available():
            free, total = (number / 2**30 for number in torch.cuda.mem_get_info(device))
            figures = f": without it {free:.1f} of {total:.1f} GiB are free, and it takes more"
        return f"the memory of {device} does not suffice{figures}; a smaller size or batch takes less"
    if isinstance(error, ShapecheckError):
        return str(error)
    return one_line(f"{type(error).__name__}: {error}", longest=300)


def list_refusals(backend: str) -> tuple[type[Exception], ...]:
    """Return the errors by which a backend refuses a model: a compiler may raise anything."""
    return (Exception,) if backend == "torch-compile" else (ShapecheckError, ModuleNotFoundError, torch.OutOfMemoryError)
