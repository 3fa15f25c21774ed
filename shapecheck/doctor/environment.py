"""Frozen records of a machine: its packages, its GPUs, and the backends that really run there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shapecheck.contract.errors import ShapecheckError

BACKENDS = {
    "torch": "PyTorch on the CPU",
    "torch-cuda": "PyTorch on the GPU",
    "torch-compile": "PyTorch, torch.compile",
    "ort": "ONNX Runtime on the CPU",
    "ort-cuda": "ONNX Runtime, CUDA provider",
    "ort-trt": "ONNX Runtime, TensorRT provider",
    "trt": "TensorRT",
    "rtx": "TensorRT for RTX",
}
"""From the name on the command line to what the backend is."""
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.")
"""Compute capabilities that TensorRT for RTX makes engines for, as starts of the number (1.7.1; it refuses 9.0)."""
RTX_NAMES = ", ".join(f"{start}x" if start.endswith(".") else start for start in RTX_CAPABILITIES)


@dataclass(frozen=True, slots=True)
class Gap:
    """One thing that is missing or wrong, and the command that puts it right, or advice if no command does."""

    problem: str
    fix: str


@dataclass(frozen=True, slots=True)
class Package:
    """One importable package."""

    name: str
    """The distribution that installs it; several joined by `+` if they own the same folder."""
    module: str
    version: str
    """Empty if it is not installed."""
    importable: bool
    gap: Gap | None = None

    @property
    def installed(self) -> bool:
        return bool(self.version)


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver."""

    version: str
    cuda: str
    """The newest CUDA it can run, such as 13.0; empty if it does not load."""
    gap: Gap | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU that the driver shows."""

    name: str
    capability: str
    memory: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to run a model, and whether it really runs here: something was computed, or an engine built, to know it."""

    name: str
    runs: bool
    detail: str
    """Versions of what worked, and what it can do here."""
    gaps: tuple[Gap, ...] = ()
    """Everything that keeps it from running; also, for TensorRT for RTX, from running what it builds."""

    @property
    def reason(self) -> str:
        return "" if self.runs else "; ".join(gap.problem for gap in self.gaps)

    @property
    def fix(self) -> str:
        return "" if self.runs else "; ".join(dict.fromkeys(gap.fix for gap in self.gaps))


@dataclass(frozen=True, slots=True)
class Environment:
    """One machine and one Python installation on it."""

    python: str
    platform: str
    packages: tuple[Package, ...]
    driver: Driver
    devices: tuple[Device, ...]
    backends: tuple[Backend, ...]

    def backend(self, name: str) -> Backend:
        check_known([name])
        return next(backend for backend in self.backends if backend.name == name)

    def failing(self, required: Iterable[str]) -> tuple[Backend, ...]:
        return tuple(backend for name in dict.fromkeys(required) if not (backend := self.backend(name)).runs)


def check_known(names: Iterable[str]) -> None:
    """Raise ShapecheckError for a name that is not of a backend."""
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise ShapecheckError(f"no backend is called {', '.join(map(repr, unknown))}; known: {', '.join(BACKENDS)}")
