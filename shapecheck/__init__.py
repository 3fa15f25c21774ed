"""Shape contracts between ControlNets and diffusion UNets: observed, checked, and carried to ONNX and TensorRT.

Importing this package imports neither torch nor diffusers; `probe`, `export`, `parity` and `EngineSession` do when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shapecheck import extras
from shapecheck.contract import Contract, ContractError, Geometry, Mismatch, ShapecheckError, Slot
from shapecheck.parity import parity  # eager: the room of that name, once imported, would hide a lazy one
from shapecheck.tensorrt.profiles import Profile, Range, profile_of
from shapecheck.tensorrt.record import BuildOptions
from shapecheck.tensorrt.size_ranges import parse_ranges
from shapecheck.version import __version__ as __version__

if TYPE_CHECKING:
    from shapecheck.artefact import read_contract
    from shapecheck.explain.explained import explained
    from shapecheck.explain.explained_error import ExplainedError
    from shapecheck.models.calibration_record import Calibration
    from shapecheck.observe.probe import probe
    from shapecheck.observe.record import record
    from shapecheck.onnx.export import export
    from shapecheck.onnx.rebind import rebind
    from shapecheck.pipelines.accelerate import accelerate
    from shapecheck.pipelines.calibrate import calibrate
    from shapecheck.runtime.combine import combined
    from shapecheck.runtime.engine_session import EngineSession
    from shapecheck.runtime.guard import guard
    from shapecheck.runtime.load import load
    from shapecheck.tensorrt.build import build_engine
    from shapecheck.tensorrt.refit import refit


__all__ = [
    "BuildOptions",
    "Calibration",
    "Contract",
    "ContractError",
    "EngineSession",
    "ExplainedError",
    "Geometry",
    "Mismatch",
    "Profile",
    "Range",
    "ShapecheckError",
    "Slot",
    "accelerate",
    "build_engine",
    "calibrate",
    "combined",
    "explained",
    "export",
    "guard",
    "load",
    "parity",
    "parse_ranges",
    "probe",
    "profile_of",
    "read_contract",
    "rebind",
    "record",
    "refit",
]
_LAZY = {
    "Calibration": "shapecheck.models.calibration_record",
    "EngineSession": "shapecheck.runtime.engine_session",
    "ExplainedError": "shapecheck.explain.explained_error",
    "accelerate": "shapecheck.pipelines.accelerate",
    "build_engine": "shapecheck.tensorrt.build",
    "calibrate": "shapecheck.pipelines.calibrate",
    "combined": "shapecheck.runtime.combine",
    "explained": "shapecheck.explain.explained",
    "export": "shapecheck.onnx.export",
    "guard": "shapecheck.runtime.guard",
    "load": "shapecheck.runtime.load",
    "probe": "shapecheck.observe.probe",
    "read_contract": "shapecheck.artefact",
    "rebind": "shapecheck.onnx.rebind",
    "record": "shapecheck.observe.record",
    "refit": "shapecheck.tensorrt.refit",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            raise extras.explain_missing(error, f"shapecheck.{name}") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
