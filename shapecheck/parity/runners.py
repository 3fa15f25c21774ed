"""One protocol over every backend: open what was asked for, say what really runs, compute the image of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.parity.results import Ran
from shapecheck.runtime.engine_session import EngineSession
from shapecheck.runtime.onnx_session import PROVIDERS, OnnxSession
from shapecheck.runtime.torch_session import TorchSession
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import Range, profile_of
from shapecheck.tensorrt.record import MODULES

ENGINES = ("trt", "rtx")


LIVE = ("torch", "torch-cuda")


class Runner(Protocol):
    """A backend with a model loaded."""

    @property
    def ran(self) -> Ran:
        """What really runs."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The image, on the CPU, for a tensor for every input and slot of the contract, by the contract's names.

        Raises ShapecheckError where the backend cannot run the call.
        """

    def close(self) -> None:
        """Give the memory back."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """What a backend runs: a file, the contract it should be of, and what it calls that contract's inputs."""

    path: Path
    contract: Contract
    names: Mapping[str, str]
    """From the contract's name of an input to the file's, for the inputs that the file has."""

    @property
    def precision(self) -> str:
        """The dtype of the image that goes in."""
        return next(each.dtype for each in self.contract.inputs if each.name == "sample")


class OnnxRunner:
    """A file in ONNX Runtime."""

    def __init__(self, session: OnnxSession, artefact: Artefact) -> None:
        self._session, self._names = session, artefact.names
        tf32 = "" if session.backend == "ort" else ", TF32 off"
        self.ran = Ran(
            session.backend,
            session.provider,
            _device(session.device),
            artefact.precision,
            f"onnxruntime {_version('onnxruntime-gpu', 'onnxruntime')}{tf32}",
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The image, on the CPU."""
        found = self._session({theirs: inputs[ours] for ours, theirs in self._names.items()})
        return found[self._session.outputs[0]]

    def close(self) -> None:
        """Give the memory back."""
        self._session.close()


class EngineRunner:
    """An engine in TensorRT, or in TensorRT for RTX."""

    def __init__(self, session: EngineSession, backend: str, precision: str) -> None:
        self._session = session
        options = session.record.request.options
        self.ran = Ran(
            backend,
            "TensorRT" if options.target == "trt" else "TensorRT for RTX",
            _device(torch.device("cuda")),
            precision,
            f"{session.record.request.tensorrt}, TF32 {'allowed' if options.tf32 else 'off'}",
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The image, on the CPU."""
        found = self._session({name: each.cuda() for name, each in inputs.items()})
        return next(iter(found.values())).cpu()

    def close(self) -> None:
        """Give the memory back."""
        self._session.close()


class TorchRunner:
    """The model itself, in PyTorch."""

    def __init__(self, module: nn.Module, contract: Contract, backend: str = "torch") -> None:
        self._session = TorchSession(module, contract)
        precision = str(self._session.dtype).removeprefix("torch.")
        detail = f"torch {torch.__version__}" + ("" if self._session.device.type == "cpu" else ", TF32 off")
        self.ran = Ran(backend, "eager", _device(self._session.device), precision, detail)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The image, on the CPU."""
        (found,) = self._session(inputs).values()
        return found.cpu()

    def close(self) -> None:
        """Give the memory back."""
        self._session.close()


def open_runner(backend: str, artefact: Artefact, geometries: Sequence[Geometry], load: Callable[[str], nn.Module]) -> Runner:
    """The backend with its file loaded; for PyTorch `load` gives the model in a precision.

    Raises ShapecheckError where it cannot run here, an ONNX Runtime that fell back to another provider included.
    """
    if backend in ENGINES:
        session = EngineSession.open(artefact.path)
        target = session.record.request.options.target
        if target != backend:
            raise ShapecheckError(f"{artefact.path} was built by {MODULES[target]}: ask for {target}, not {backend}")
        return EngineRunner(session, backend, artefact.precision)
    if backend in PROVIDERS:
        options = (
            {"use_tf32": "0"} if backend == "ort-cuda" else _profiles(artefact, geometries) if backend == "ort-trt" else {}
        )
        return OnnxRunner(OnnxSession.open(artefact.path, backend=backend, options=options), artefact)
    if backend == "torch-cuda" and not torch.cuda.is_available():
        raise ShapecheckError("PyTorch sees no GPU here; `shapecheck doctor --require torch-cuda` says why")
    module = load(artefact.precision).to("cuda" if backend == "torch-cuda" else "cpu")
    return TorchRunner(module, artefact.contract, backend)


def _profiles(artefact: Artefact, geometries: Sequence[Geometry]) -> dict[str, str]:
    """For ONNX Runtime's TensorRT provider: one profile that holds every size of the run."""
    sizes = Range(geometries[0], geometries[0], geometries[0])
    for each in geometries:
        sizes = sizes.with_(each)
    profile = profile_of(artefact.contract, sizes).renamed(artefact.names)
    return {key: str(value) for key, value in profile_formats.make_provider_options([profile]).items()}


def _device(device: torch.device) -> str:
    if device.type == "cpu" or not torch.cuda.is_available():
        return str(device)
    return f"cuda:{device.index or 0} {torch.cuda.get_device_name(device)}"


def _version(*distributions: str) -> str:
    from importlib.metadata import PackageNotFoundError

    for each in distributions:
        try:
            return version(each)
        except PackageNotFoundError:
            continue
    return "unknown"
