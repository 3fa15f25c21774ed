"""One protocol over every backend: open what was asked for, and say what really runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.parity.artefacts import ENGINE_BACKENDS, ParityFile
from shapecheck.parity.results import Ran
from shapecheck.runtime.engine_session import EngineSession
from shapecheck.runtime.onnx_session import PROVIDERS, OnnxSession
from shapecheck.runtime.torch_session import TorchSession
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import Range, profile_of
from shapecheck.tensorrt.record import MODULES


class Session(Protocol):
    """A backend with a model loaded, called with tensors by the file's names of its inputs."""

    @property
    def provider(self) -> str:
        """What really runs."""

    @property
    def device(self) -> torch.device:
        """Where inputs have to lie."""

    @property
    def detail(self) -> str:
        """Versions, and whether TF32 was off."""

    def __call__(self, inputs: Mapping[str, Tensor], /) -> Mapping[str, Tensor]:
        """Return the outputs, by the file's names. Raises ShapecheckError if the backend cannot run the call."""

    def close(self) -> None:
        """Give the memory back."""


def open_session(
    backend: str, file: ParityFile, geometries: Sequence[Geometry], load: Callable[[str], nn.Module]
) -> Session | EngineSession:
    """Return the backend with its file loaded; for PyTorch `load` gives the model in a precision.

    Raises ShapecheckError if it cannot run here, an ONNX Runtime that fell back to another provider included.
    """
    if backend in ENGINE_BACKENDS:
        session = EngineSession.open(file.path)
        target = session.record.request.options.target
        if target != backend:
            raise ShapecheckError(f"{file.path} was built by {MODULES[target]}: ask for {target}, not {backend}")
        return session
    if backend in PROVIDERS:
        options = {"use_tf32": "0"} if backend == "ort-cuda" else {}
        if backend == "ort-trt":
            options = _profile_options(file, geometries)
        return OnnxSession.open(file.path, backend=backend, options=options)
    if backend == "torch-cuda" and not torch.cuda.is_available():
        raise ShapecheckError("PyTorch sees no GPU here; `shapecheck doctor --require torch-cuda` says why")
    module = load(file.contract.dtype).to("cuda" if backend == "torch-cuda" else "cpu")
    return TorchSession(module, file.contract)


def describe_session(backend: str, session: Session | EngineSession, file: ParityFile) -> Ran:
    """Return what really runs."""
    device = str(session.device)
    if session.device.type != "cpu" and torch.cuda.is_available():
        device = f"cuda:{session.device.index or 0} {torch.cuda.get_device_name(session.device)}"
    precision = file.contract.dtype
    if not isinstance(session, EngineSession):
        return Ran(backend, session.provider, device, precision, session.detail)
    request = session.record.request
    provider = "TensorRT" if request.options.target == "trt" else "TensorRT for RTX"
    detail = f"{request.tensorrt}, TF32 {'allowed' if request.options.tf32 else 'off'}"
    return Ran(backend, provider, device, precision, detail)


def _profile_options(file: ParityFile, geometries: Sequence[Geometry]) -> dict[str, str]:
    """Return, for ONNX Runtime's TensorRT provider, one profile that holds every size of the run."""
    sizes = Range(geometries[0], geometries[0], geometries[0])
    for geometry in geometries:
        sizes = sizes.with_(geometry)
    profile = profile_of(file.contract, sizes).renamed(file.names)
    return {key: str(value) for key, value in profile_formats.make_provider_options([profile]).items()}
