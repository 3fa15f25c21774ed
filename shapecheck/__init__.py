"""Shape contracts between ControlNets and diffusion UNets: observed, checked, and carried to ONNX and TensorRT.

Importing this package imports neither torch nor diffusers; `probe`, `export`, `parity` and `EngineSession` do when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shapecheck import extras
from shapecheck.contract import Contract, ContractError, Geometry, Mismatch, ShapecheckError, Slot
from shapecheck.contract.engine import BuildOptions
from shapecheck.contract.profiles import Profile, Range, profile_of
from shapecheck.contract.ranges import parse_ranges

if TYPE_CHECKING:
    from shapecheck.build.artefact import read_contract
    from shapecheck.build.engine import build_engine
    from shapecheck.build.export import export
    from shapecheck.observe.probe import probe
    from shapecheck.observe.record import record
    from shapecheck.pipelines.accelerate import accelerate
    from shapecheck.pipelines.load import load
    from shapecheck.run.engine_session import EngineSession
    from shapecheck.run.guard import guard
    from shapecheck.run.residuals import combined
    from shapecheck.verify.explained import ExplainedError, explained
    from shapecheck.verify.request import parity

__version__ = "0.1.0"

__all__ = [
    "BuildOptions",
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
    "record",
]

_LAZY = {
    "EngineSession": "shapecheck.run.engine_session",
    "ExplainedError": "shapecheck.verify.explained",
    "accelerate": "shapecheck.pipelines.accelerate",
    "build_engine": "shapecheck.build.engine",
    "combined": "shapecheck.run.residuals",
    "explained": "shapecheck.verify.explained",
    "export": "shapecheck.build.export",
    "guard": "shapecheck.run.guard",
    "load": "shapecheck.pipelines.load",
    "parity": "shapecheck.verify.request",
    "probe": "shapecheck.observe.probe",
    "read_contract": "shapecheck.build.artefact",
    "record": "shapecheck.observe.record",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            raise extras.missing(error, f"shapecheck.{name}") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
