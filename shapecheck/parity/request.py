"""A parity run as somebody requests it in words: on the command line, in Python, or through pytest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from shapecheck.contract import ContractError, ShapecheckError
from shapecheck.models.calibration_record import Calibration, read_calibration
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.record import Engine, read_engine
from shapecheck.tensorrt.size_ranges import parse_size_request

if TYPE_CHECKING:
    from torch import nn

    from shapecheck.observe.subject import Precision
    from shapecheck.parity.run import ParityRun


@dataclass(frozen=True)
class ParityRequest:
    """The model and the files to compare with it. Fields are named as the options of the command line are."""

    model: str | Path | nn.Module
    """A UNet or ControlNet: what `probe` takes, with weights; or a live module."""
    onnx: str | Path | None = None
    engine: str | Path | None = None
    backends: tuple[str, ...] = ()
    """By default `ort` for an ONNX file, and `trt` or `rtx` for an engine; `torch` and `torch-compile` run the model itself."""
    controlnet: str | None = None
    sizes: tuple[str, ...] = ()
    """The sizes to run at, as batch and tokens: each alone or together, what is left out as the files take it."""
    batch: tuple[str, ...] = ()
    tokens: str | None = None
    multiple_of: int | None = None
    """Of image sides only multiples of so many pixels."""
    seed: int = 0
    times_own: float = 4.0
    """A backend may be this many times as far from the reference as PyTorch itself, and half as many times in fp8."""
    reference: Precision = "auto"
    fp8: Calibration | str | Path | None = None
    """The calibration by which layers of the files are in fp8, or a file of it; None if none are."""
    variant: str | None = None
    offline: bool = False
    folder: Path | None = None
    """The folder for files that reproduce a difference without shapecheck; None for nowhere."""

    @property
    def tolerance_factor(self) -> float:
        """Return `times_own`, halved in fp8, whose own error is so large that twice of it is all that still shows a fault."""
        return self.times_own if self.fp8 is None else self.times_own / 2

    @cached_property
    def calibration(self) -> Calibration | None:
        """Return the calibration, read once."""
        return read_calibration(self.fp8) if self.fp8 is not None else None

    @cached_property
    def record(self) -> Engine | None:
        """Return the record beside the engine, read once."""
        return read_engine(self.engine) if self.engine is not None else None

    @cached_property
    def what_runs(self) -> tuple[str, ...]:
        """Return the requested backends, or else those that the files need. Raises ShapecheckError if there is none."""
        if self.backends:
            return self.backends
        backends: tuple[str, ...] = ("ort",) if self.onnx is not None else ()
        if self.record is not None:
            backends += (self.record.request.options.target,)
        if not backends:
            raise ShapecheckError(
                "nothing to compare the model with: give --onnx FILE.onnx, --engine PLAN, or --backends torch"
            )
        return backends


def create_run(request: ParityRequest, progress: Progress = silent) -> ParityRun:
    """Return the requested run, nothing compared yet. Raises ShapecheckError if it cannot be made."""
    if not request.times_own > 0:
        raise ShapecheckError(f"--times-own must be more than 0, got {request.times_own}")
    progress("importing PyTorch and diffusers")
    from shapecheck.observe.subject import find_source
    from shapecheck.parity.cases import InputGenerator, load_controlnet
    from shapecheck.parity.plan import list_cases
    from shapecheck.parity.run import ParityRun

    factor = 8
    if (request.sizes or request.multiple_of is not None) and isinstance(request.model, str | Path):
        factor = find_source(str(request.model), offline=request.offline).vae_factor
    ranges = parse_size_request(request.sizes, request.batch, request.tokens, request.multiple_of, vae_factor=factor)
    emit = load_controlnet(request.controlnet, offline=request.offline) if request.controlnet else None
    run = ParityRun(request, ranges=ranges, emit=emit, progress=progress)

    # The ControlNet may not fit, or give nothing but zeros: try it at the smallest size, before anything long begins.
    cases = [case for plans in run.plans.values() for case in list_cases(plans) if case.frame is not None] if emit else []
    if cases:
        small = min(cases, key=lambda case: case.geometry.height * case.geometry.width * case.geometry.batch)
        try:
            InputGenerator(run.contract, request.seed, emit)(small)
        except ContractError as error:
            raise ShapecheckError(f"{request.controlnet} does not fit the model: {error}") from None
    return run
