"""Load a UNet and its ControlNets for each backend whose frames are to be timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shapecheck.contract import Contract, Geometry
from shapecheck.doctor.environment import BACKENDS
from shapecheck.pipelines.bench_record import COMPILED, TORCH_BACKENDS
from shapecheck.pipelines.frame import FrameMaker, PlayFrame, compile_module
from shapecheck.pipelines.frame_timing import TimedBackend
from shapecheck.runtime.dropin import DropIn
from shapecheck.runtime.load import load
from shapecheck.tensorrt.record import is_engine


class Loader:
    """Loads a UNet and its ControlNets for one backend after the other.

    `files` are those of the ControlNets, each with its contract in `controlnets`; without files random ones run in PyTorch.
    `settings` are keywords of `load` for whatever is loaded.
    """

    def __init__(
        self,
        artefact: str,
        contract: Contract,
        geometry: Geometry,
        device: torch.device,
        files: Sequence[str],
        controlnets: Sequence[Contract | None],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._artefact, self._contract, self._geometry, self._device = artefact, contract, geometry, device
        self._files, self._controlnets, self._settings = files, controlnets, dict(settings or {})
        self._maker = FrameMaker(contract, geometry, device, controlnets)

    def make_candidate(self, backend: str) -> TimedBackend:
        """Return the backend as it is to be timed."""
        ran = f"{TORCH_BACKENDS.get(backend) or BACKENDS[backend]}, {self._contract.dtype}"
        return TimedBackend(backend, ran, self._describe_controlnets(backend), partial(self._make_frame, backend))

    def _make_frame(self, backend: str) -> PlayFrame:
        maker = self._maker
        if backend == "torch":
            return maker.make_frame(maker.torch_unet, maker.torch_controlnets)
        if backend in COMPILED:
            modules = [maker.build_unet(), *maker.build_controlnets()]
            unet, *nets = (compile_module(module, backend, self._settings) for module in modules)
            return maker.make_frame(unet, nets, graphs=backend == "torch-reduce-overhead")
        opened = self.open_file(self._artefact, backend, self._contract)
        if not self._files:
            return maker.make_frame(opened, maker.torch_controlnets)
        pairs = zip(self._files, self._controlnets, strict=True)
        return maker.make_frame(opened, [self.open_file(file, choose_runner(file, backend), known) for file, known in pairs])

    def _describe_controlnets(self, backend: str) -> str:
        """Return who runs the ControlNets beside a UNet on this backend."""
        if self._files and backend not in TORCH_BACKENDS:
            return ", ".join(f"{Path(file).name} on {choose_runner(file, backend)}" for file in self._files)
        if not self._controlnets:
            return ""
        return f"{len(self._controlnets)}, {'compiled likewise' if backend in COMPILED else 'in PyTorch'}"

    def open_file(self, file: str, backend: Any, known: Contract | None) -> DropIn:
        """Return an ONNX file or an engine in the place of a model. Raises ShapecheckError if it does not run."""
        contract, geometry = None if is_engine(Path(file)) else known, self._geometry
        width, height = (side * self._contract.header.vae_factor for side in (geometry.width, geometry.height))
        # Without a profile of this one size ort-trt builds its engine again and again for whatever comes.
        one_size: dict[str, Any] = {"sizes": [f"{width}x{height}"], "batch": [str(geometry.batch)]}
        return load(file, backend, contract=contract, device=self._device, **one_size, **self._settings)


def choose_runner(file: str, backend: str) -> str:
    """Return what runs a ControlNet's file beside a UNet on this backend."""
    if is_engine(Path(file)):
        return "trt"
    return "ort-cuda" if backend == "trt" else backend
