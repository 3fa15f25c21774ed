"""A parity run as somebody asks for it in words: on the command line, or through pytest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shapecheck.contract import ShapecheckError
from shapecheck.contract.ranges import USUAL_TOKENS, parse_ranges
from shapecheck.observe import configs
from shapecheck.observe.progress import Progress, silent
from shapecheck.verify.emitted import emitted_by
from shapecheck.verify.parity import Options, Study
from shapecheck.verify.reference import Precision


@dataclass(frozen=True, slots=True)
class ParityRequest:
    """What to compare with what. Fields are named as the options of the command line are."""

    model: str
    onnx: str | None = None
    engine: str | None = None
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


def study_of(request: ParityRequest, progress: Progress = silent) -> Study:
    """The run that is asked for, nothing computed yet. Raises ShapecheckError where it cannot be made."""
    if (request.batch or request.tokens) and not request.sizes:
        raise ShapecheckError("--batch and --tokens go with --sizes")
    if not request.times_own > 0:
        raise ShapecheckError(f"--times-own must be more than 0, got {request.times_own}")
    factor = configs.find(request.model, "unet", offline=request.offline).vae_factor if request.sizes else 8
    ranges = (
        parse_ranges(request.sizes, request.batch or ("1",), request.tokens or USUAL_TOKENS, vae_factor=factor)
        if request.sizes
        else ()
    )
    options = Options(
        ranges, request.seed, request.times_own, request.reference, request.variant, request.offline, request.folder
    )
    emitted = emitted_by(request.controlnet, offline=request.offline) if request.controlnet else None
    return Study(
        request.model,
        request.backends or _usual(request),
        onnx=request.onnx,
        engine=request.engine,
        options=options,
        emitted=emitted,
        progress=progress,
    )


def _usual(request: ParityRequest) -> tuple[str, ...]:
    from shapecheck.contract.engine_files import read_engine

    found: tuple[str, ...] = ("ort",) if request.onnx is not None else ()
    if request.engine is not None:
        found += (read_engine(request.engine).request.options.target,)
    if not found:
        raise ShapecheckError("nothing to compare the model with: give --onnx FILE.onnx, --engine PLAN, or --backends torch")
    return found
