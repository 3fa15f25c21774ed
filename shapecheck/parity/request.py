"""A parity run as somebody asks for it in words: on the command line, or through pytest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shapecheck.contract import ContractError, ShapecheckError
from shapecheck.contract.geometry import USUAL_TOKENS
from shapecheck.models import lookup
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.profiles import Range
from shapecheck.tensorrt.record import read_engine
from shapecheck.tensorrt.size_ranges import parse_ranges

if TYPE_CHECKING:
    from torch import nn

    from shapecheck.observe.subject import Precision
    from shapecheck.parity.cases import Emitted
    from shapecheck.parity.run import Study


@dataclass(frozen=True, slots=True)
class ParityRequest:
    """What to compare with what. Fields are named as the options of the command line are."""

    model: str | Path | nn.Module
    """What `probe` takes, with weights; or a live UNet."""
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
        """The backends asked for, or else what the files need. Raises ShapecheckError where that is nothing."""
        return self.backends or _usual(self)


def study_of(request: ParityRequest, progress: Progress = silent) -> Study:
    """The run that is asked for, nothing compared yet. Raises ShapecheckError where it cannot be made."""
    if (request.batch or request.tokens) and not request.sizes:
        raise ShapecheckError("--batch and --tokens go with --sizes")
    if not request.times_own > 0:
        raise ShapecheckError(f"--times-own must be more than 0, got {request.times_own}")
    ranges = _ranges(request)
    from shapecheck.parity.cases import emitted_by
    from shapecheck.parity.run import Options, Study

    options = Options(
        ranges, request.seed, request.times_own, request.reference, request.variant, request.offline, request.folder
    )
    emitted = emitted_by(request.controlnet, offline=request.offline) if request.controlnet else None
    study = Study(
        request.model,
        request.what_runs,
        onnx=request.onnx,
        engine=request.engine,
        options=options,
        emitted=emitted,
        progress=progress,
    )
    if emitted is not None:
        _try(study, emitted, request)
    return study


def _try(study: Study, emitted: Emitted, request: ParityRequest) -> None:
    """The ControlNet at the smallest size, before anything long is begun: it may not fit, or give nothing but zeros."""
    from shapecheck.parity.cases import Draws
    from shapecheck.parity.plan import calls_of

    given = [call for plans in study.plans.values() for call in calls_of(plans) if call.frame is not None]
    small = min(given, key=lambda call: call.geometry.height * call.geometry.width * call.geometry.batch, default=None)
    if small is None:
        return
    try:
        Draws(study.contract, request.seed, emitted)(small)
    except ContractError as error:
        raise ShapecheckError(f"{request.controlnet} does not fit the model: {error}") from None


def _ranges(request: ParityRequest) -> tuple[Range, ...]:
    if not request.sizes:
        return ()
    named = isinstance(request.model, str | Path)
    factor = lookup.find(str(request.model), "unet", offline=request.offline).vae_factor if named else 8
    return parse_ranges(request.sizes, request.batch or ("1",), request.tokens or str(USUAL_TOKENS), vae_factor=factor)


def _usual(request: ParityRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = ("ort",) if request.onnx is not None else ()
    if request.engine is not None:
        found += (read_engine(request.engine).request.options.target,)
    if not found:
        raise ShapecheckError("nothing to compare the model with: give --onnx FILE.onnx, --engine PLAN, or --backends torch")
    return found
