"""One protocol over every backend: open the requested one, and say what really runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.observe.subject import TorchModel
from shapecheck.parity.artefacts import ENGINE_BACKENDS, ParityFile
from shapecheck.parity.results import Ran
from shapecheck.runtime.compiled_session import CompiledSession
from shapecheck.runtime.engine_session import EngineSession
from shapecheck.runtime.onnx_session import PROVIDERS, OnnxSession
from shapecheck.runtime.torch_session import TorchSession
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import Range, profile_of
from shapecheck.tensorrt.record import MODULES

EXACT_OPTIONS: Mapping[str, Mapping[str, str]] = {"ort-cuda": {"use_tf32": "0"}}
"""Options of ONNX Runtime's providers without which they would compute float32 less exactly."""


class BackendSession(Protocol):
    """A backend with a model loaded, called with tensors on its device by the file's names of its inputs."""

    @property
    def provider(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def detail(self) -> str: ...

    def __call__(self, inputs: Mapping[str, Tensor], /) -> Mapping[str, Tensor]:
        """Return the outputs, by the file's names. Raises ShapecheckError if the backend cannot run the call."""

    def close(self) -> None: ...


class ForeignSession:
    """An ONNX file of any exporter: it takes the contract's tensors in the types that it declares, and gives strength 1."""

    def __init__(self, session: OnnxSession, file: ParityFile) -> None:
        self._session, self._file = session, file
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in session.dtypes().items()}
        self.provider, self.device, self.detail = session.provider, session.device, session.detail

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        outputs = self._session({name: self._cast(name, value) for name, value in inputs.items()})
        strength = self._file.strength
        return outputs if strength == 1 else {name: value / strength for name, value in outputs.items()}

    def close(self) -> None:
        self._session.close()

    def _cast(self, name: str, value: Tensor) -> Tensor:
        """Convert between floating-point types: a timestep that is cut to a whole number is a fault."""
        dtype = self._dtypes.get(name, value.dtype)
        return value.to(dtype) if dtype.is_floating_point and value.is_floating_point() else value


def open_session(
    backend: str, file: ParityFile, geometries: Sequence[Geometry], model: TorchModel
) -> BackendSession | EngineSession:
    """Return the backend with its file loaded; for PyTorch the model itself, with layers in fp8 if it was calibrated.

    Raises ShapecheckError if it cannot run here, an ONNX Runtime that fell back to another provider included.
    """
    if backend in ENGINE_BACKENDS:
        session = EngineSession.open(file.path)
        assert session.record is not None  # opened by it alone
        target = session.record.request.options.target
        if target != backend:
            raise ShapecheckError(f"{file.path} was built by {MODULES[target]}: request {target}, not {backend}")
        return session
    if backend in PROVIDERS:
        options = EXACT_OPTIONS.get(backend, {})
        if backend == "ort-trt":
            # one profile that holds every size of the run
            sizes = Range(geometries[0], geometries[0], geometries[0])
            for geometry in geometries:
                sizes = sizes.with_(geometry)
            profile = profile_of(file.contract, sizes).renamed(file.names)
            options = {key: str(value) for key, value in profile_formats.make_provider_options([profile]).items()}
        return ForeignSession(OnnxSession.open(file.path, backend=backend, options=options), file)
    if backend == "torch-compile" and model.calibration is not None:
        raise ShapecheckError("torch-compile computes nothing in fp8: compare it without --fp8")
    if backend == "torch-compile":
        module = model.load(file.contract.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
        return CompiledSession(module, file.contract, exactly=True)
    if backend == "torch-cuda" and not torch.cuda.is_available():
        raise ShapecheckError("PyTorch sees no GPU here; `shapecheck doctor --require torch-cuda` says why")
    module = model.load(file.contract.dtype).to("cuda" if backend == "torch-cuda" else "cpu")
    model.round(module, file.contract)
    return TorchSession(module, file.contract)


def describe_session(backend: str, session: BackendSession | EngineSession, file: ParityFile) -> Ran:
    """Return what really runs."""
    device, precision = str(session.device), file.contract.dtype
    if session.device.type != "cpu" and torch.cuda.is_available():
        device = f"cuda:{session.device.index or 0} {torch.cuda.get_device_name(session.device)}"
    if not isinstance(session, EngineSession):
        return Ran(backend, session.provider, device, precision, session.detail)
    assert session.record is not None
    request = session.record.request
    provider = "TensorRT" if request.options.target == "trt" else "TensorRT for RTX"
    return Ran(backend, provider, device, precision, f"{request.tensorrt}, TF32 {'allowed' if request.options.tf32 else 'off'}")
