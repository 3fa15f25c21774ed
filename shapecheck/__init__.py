"""Shape contracts between ControlNets and diffusion UNets: observed, checked, and carried to ONNX and TensorRT.

Importing this package imports neither torch nor diffusers; `probe` does when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shapecheck.contract import Contract, ContractError, Geometry, Mismatch, ShapecheckError, Slot

if TYPE_CHECKING:
    from shapecheck.observe.probe import probe
    from shapecheck.observe.record import record

__version__ = "0.1.0"

__all__ = [
    "Contract",
    "ContractError",
    "Geometry",
    "Mismatch",
    "ShapecheckError",
    "Slot",
    "probe",
    "record",
]

_LAZY = {"probe": "shapecheck.observe.probe", "record": "shapecheck.observe.record"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
