"""A parity run as somebody asks for it in words: on the command line, or through pytest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shapecheck.contract import ContractError, ShapecheckError
from shapecheck.contract.geometry import USUAL_TOKENS
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.profiles import Range
from shapecheck.tensorrt.record import read_engine
from shapecheck.tensorrt.size_ranges import parse_ranges

if TYPE_CHECKING:
    from torch import nn

    from shapecheck.observe.subject import Precision
    from shapecheck.parity.cases import EmitResiduals
    from shapecheck.parity.run import ParityRun


@dataclass(frozen=True, slots=True)
class ParityRequest:
    """What to compare with what. Fields are named as the options of the command line are."""

    model: str | Path | nn.Module
    """A UNet or ControlNet: what `probe` takes, with weights; or a live module."""
    onnx: str | Path | None = None
    engine: str | Path | None = None
    backends: tuple[str, ...] = ()
    """None for `ort` where an ONNX file is given, and `trt` or `rtx` where an engine is."""
    controlnet: str | None = None
    sizes: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    tokens: str | None = None
    seed: int = 0
    times_own: float = 4.0
    reference: Precision = "auto"
    variant: str | None = None
    offline: bool = False
    folder: Path | None = None
    """Where to write what reproduces a difference."""

    @property
    def what_runs(self) -> tuple[str, ...]:
        """The backends requested, or else what the files need. Raises ShapecheckError if that is nothing."""
        return self.backends or _choose_backends(self)


def create_run(request: ParityRequest, progress: Progress = silent) -> ParityRun:
    """Return the run that is requested, nothing compared yet. Raises ShapecheckError if it cannot be made."""
    if (request.batch or request.tokens) and not request.sizes:
        raise ShapecheckError("--batch and --tokens go with --sizes")
    if not request.times_own > 0:
        raise ShapecheckError(f"--times-own must be more than 0, got {request.times_own}")
    from shapecheck.observe.subject import find_source
    from shapecheck.parity.cases import load_controlnet
    from shapecheck.parity.run import ParityOptions, ParityRun

    ranges: tuple[Range, ...] = ()
    if request.sizes:
        is_named = isinstance(request.model, str | Path)
        factor = find_source(str(request.model), offline=request.offline).vae_factor if is_named else 8
        ranges = parse_ranges(request.sizes, request.batch or ("1",), request.tokens or str(USUAL_TOKENS), vae_factor=factor)
    options = ParityOptions(
        ranges, request.seed, request.times_own, request.reference, request.variant, request.offline, request.folder
    )
    emit = load_controlnet(request.controlnet, offline=request.offline) if request.controlnet else None
    run = ParityRun(
        request.model,
        request.what_runs,
        onnx=request.onnx,
        engine=request.engine,
        options=options,
        emit=emit,
        progress=progress,
    )
    if emit is not None:
        _try_controlnet(run, emit, request)
    return run


def _try_controlnet(run: ParityRun, emit: EmitResiduals, request: ParityRequest) -> None:
    """Try the ControlNet at the smallest size, before anything long is begun: it may not fit, or give nothing but zeros."""
    from shapecheck.parity.cases import InputGenerator
    from shapecheck.parity.plan import list_cases

    cases = [case for plans in run.plans.values() for case in list_cases(plans) if case.frame is not None]
    small = min(cases, key=lambda case: case.geometry.height * case.geometry.width * case.geometry.batch, default=None)
    if small is None:
        return
    try:
        InputGenerator(run.contract, request.seed, emit)(small)
    except ContractError as error:
        raise ShapecheckError(f"{request.controlnet} does not fit the model: {error}") from None


def _choose_backends(request: ParityRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = ("ort",) if request.onnx is not None else ()
    if request.engine is not None:
        found += (read_engine(request.engine).request.options.target,)
    if not found:
        raise ShapecheckError("nothing to compare the model with: give --onnx FILE.onnx, --engine PLAN, or --backends torch")
    return found
