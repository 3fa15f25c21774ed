"""An engine against its record, and against a model, a size, a ControlNet and weights that it should be for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from shapecheck.build import subject
from shapecheck.build import weights as checkpoints
from shapecheck.build.engine import read_back
from shapecheck.build.external import external_tensors, file_digest
from shapecheck.contract import Contract, Geometry, Mismatch, ShapecheckError, show
from shapecheck.contract.compare import compare
from shapecheck.contract.engine import Engine
from shapecheck.contract.engine_checked import EngineCheck, Fit, Read, Weights
from shapecheck.contract.engine_files import read_engine
from shapecheck.contract.engine_seen import differences
from shapecheck.contract.profiles import Range, range_of
from shapecheck.observe.configfile import one_line
from shapecheck.observe.progress import Progress, silent
from shapecheck.verify.models import misfits

_LONGEST = 300
"""Characters of a reason why an engine was not loaded."""


def check_engine(
    path: str | Path,
    model: Contract | None = None,
    *,
    controlnets: Sequence[str] = (),
    asked: Geometry | None = None,
    any_batch: bool = False,
    weights: str | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> EngineCheck:
    """Everything that can be said of an engine here: from the engine itself where TensorRT can load it, else from its record.

    `model` is the contract it should keep. `asked` is a size it should serve; with `any_batch` at whatever batch it takes.
    `weights` is an ONNX file or a model that it should have been built from. Raises ShapecheckError where the engine, its
    record, a ControlNet or the weights cannot be read.
    """
    path = Path(path)
    progress(f"reading {path}")
    engine = read_engine(path)
    contract = engine.request.contract
    found = [*_file(path, engine, progress)]
    how, reason, seen = _read(path, engine, progress) if not found else ("record", "", ())
    found += [*seen, *(_unlike(contract, model) if model is not None else ())]
    return EngineCheck(
        str(path),
        engine,
        how,
        reason,
        tuple(found),
        _fit(engine, asked, any_batch) if asked is not None else None,
        tuple(controlnets),
        misfits(contract, controlnets, asked, offline=offline, progress=progress) if controlnets else (),
        _weights(engine, weights, offline, progress) if weights is not None else None,
    )


def _file(path: Path, engine: Engine, progress: Progress) -> Iterator[Mismatch]:
    """Whether the file is the one the record was written for."""
    cause = "another engine, or one cut short, under the name of this record; copy both together, or build again"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ShapecheckError(f"cannot read {path}: {error.strerror or error}") from None
    if size != engine.size:
        yield Mismatch("engine", "the file", f"{size} bytes", f"{engine.size} bytes", cause=cause)
    elif (digest := file_digest(path, lambda *bytes_: progress(f"hashing {path}", *bytes_))) != engine.digest:
        yield Mismatch("engine", "the file", digest, engine.digest, cause=cause)


def _read(path: Path, engine: Engine, progress: Progress) -> tuple[Read, str, tuple[Mismatch, ...]]:
    try:
        return "engine", "", differences(engine.request, read_back(path, engine, progress))
    except ShapecheckError as error:
        return "record", one_line(" ".join(str(error).split()), _LONGEST), ()


def _unlike(own: Contract, model: Contract) -> Iterator[Mismatch]:
    """In what an engine's contract is not that of the model it should be; precision apart, for a model may be built in any."""
    inputs = {each.name: each for each in own.inputs}
    for wanted in model.inputs:
        given = inputs.pop(wanted.name, None)
        if given is None or given.shape != wanted.shape:
            yield Mismatch("input", wanted.name, show(given.shape) if given else "no such input", show(wanted.shape))
    for name, surplus in inputs.items():
        yield Mismatch("surplus", name, show(surplus.shape), "no such input")
    if own.slots and model.slots:
        at = Geometry(2, 17 * model.divisor, 25 * model.divisor)
        yield from compare(model.slots, at, {slot.name: slot.shape_at(at) for slot in own.slots})


def _fit(engine: Engine, asked: Geometry, any_batch: bool) -> Fit:
    """Which profile serves a size; where none does, why not, and what would."""
    contract = engine.request.contract
    ranges = [range_of(contract, each) for each in engine.request.profiles]
    wanted = [replace(asked, batch=each.opt.batch) if any_batch else asked for each in ranges]
    outside = [each.outside(geometry) for each, geometry in zip(ranges, wanted, strict=True)]
    try:
        contract.require(asked)
    except ShapecheckError as error:
        return Fit(asked, None, (str(error),), None, None)
    fitting = [number for number, reasons in enumerate(outside) if not reasons]
    best = min(fitting or range(len(ranges)), key=lambda number: (len(outside[number]), _distance(ranges[number], asked)))
    if fitting:
        return Fit(wanted[best], best, (), None, None)
    reasons = tuple(f"profile {number}: {'; '.join(told)}" for number, told in enumerate(outside))
    return Fit(wanted[best], None, reasons, _nearest(contract, ranges[best], wanted[best]), ranges[best].with_(wanted[best]))


def _nearest(contract: Contract, sizes: Range, asked: Geometry) -> Geometry:
    nearest = sizes.nearest(asked)
    return replace(nearest, height=nearest.height - nearest.height % contract.divisor,
                   width=nearest.width - nearest.width % contract.divisor)  # fmt: skip


def _distance(sizes: Range, asked: Geometry) -> int:
    nearest = sizes.nearest(asked)
    return abs(nearest.height - asked.height) + abs(nearest.width - asked.width) + abs(sizes.opt.height - asked.height)


def _weights(engine: Engine, name: str, offline: bool, progress: Progress) -> Weights:
    """Whether an engine was built from an ONNX file, or from one that was exported from a model's checkpoint."""
    request, told = engine.request, lambda *bytes_: progress("hashing the weights", *bytes_)
    path = Path(name)
    if path.suffix.lower() == ".onnx":
        own = checkpoints.digest(external_tensors(path), told)
        if own == request.weights and file_digest(path) == request.onnx:
            return Weights(name, True, "the very file")
        same = own == request.weights
        return Weights(name, False, "the same weights in another graph" if same else f"other weights: {own}")
    if not request.checkpoint:
        raise ShapecheckError(f"--weights {name}: the record does not say from which checkpoint; give the ONNX file instead")
    taken = subject.take(name, offline=offline)
    if taken.stored is None:
        raise ShapecheckError(f"--weights {name}: {taken.absent}; give a folder that holds them, or an ONNX file")
    own = checkpoints.digest(taken.stored, told)
    return Weights(
        name, own == request.checkpoint, "the same checkpoint" if own == request.checkpoint else f"other weights: {own}"
    )
