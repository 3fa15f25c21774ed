"""An engine against its record, and against a model, a size, a ControlNet and weights that it should be for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from shapecheck.contract import Contract, Geometry, Mismatch, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.mismatch import Port, compare, compare_inputs
from shapecheck.models import weights as checkpoints
from shapecheck.observe import subject
from shapecheck.observe.fit import misfits
from shapecheck.onnx.file import WEIGHTS_KEY, OnnxFile, file_digest
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.build import read_back
from shapecheck.tensorrt.engine_io import differences
from shapecheck.tensorrt.profile_check import mismatches
from shapecheck.tensorrt.profiles import choose, range_of
from shapecheck.tensorrt.record import Engine, EngineCheck, Fit, Read, Weights, size_of_engine

_LONGEST = 300
"""Characters of a reason why an engine was not loaded."""


def check_engine(
    path: Path,
    engine: Engine,
    model: Contract | None = None,
    *,
    controlnets: Sequence[str] = (),
    asked: Geometry | None = None,
    any_batch: bool = False,
    any_tokens: bool = False,
    weights: str | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> EngineCheck:
    """Return everything that can be said of an engine here: from itself if TensorRT can load it, else from its record.

    `model` is the contract it should keep. `asked` is a size it should serve; with `any_batch` and `any_tokens` at whatever it
    takes of those.
    `weights` is an ONNX file or a model that it should have been built from. Raises ShapecheckError if the engine, a ControlNet
    or the weights cannot be read.
    """
    contract = engine.request.contract
    found = [*_file(path, engine, progress)]
    how, reason, seen = _read(path, engine, progress) if not found else ("record", "", ())
    found += [*seen, *(each for one in engine.request.profiles for each in mismatches(contract, one))]
    found += _unlike(contract, model) if model is not None else ()
    unfit = misfits(_named(contract, model), controlnets, asked, offline=offline, progress=progress) if controlnets else ()
    return EngineCheck(
        str(path),
        engine,
        how,
        reason,
        tuple(found),
        _fit(engine, asked, any_batch, any_tokens) if asked is not None else None,
        tuple(controlnets),
        unfit,
        _weights(engine, weights, offline, progress) if weights is not None else None,
    )


def _named(contract: Contract, model: Contract | None) -> Contract:
    """An engine's contract; where that does not know its model, the model's, with the slots the engine has."""
    known = "down_block_types" in contract.config or model is None
    return contract if known or model is None else replace(model, slots=contract.slots, features=contract.features)


def _file(path: Path, engine: Engine, progress: Progress) -> Iterator[Mismatch]:
    """Whether the file is the one the record was written for."""
    cause = "another engine, or one cut short, under the name of this record; copy both together, or build again"
    size = size_of_engine(path)
    if size != engine.size:
        yield Mismatch("engine", "the file", f"{size} bytes", f"{engine.size} bytes", cause=cause)
    elif (digest := file_digest(path, lambda *bytes_: progress(f"hashing {path}", *bytes_))) != engine.digest:
        yield Mismatch("engine", "the file", digest, engine.digest, cause=cause)


def _read(path: Path, engine: Engine, progress: Progress) -> tuple[Read, str, tuple[Mismatch, ...]]:
    try:
        return "engine", "", differences(engine.request, read_back(path, engine, progress))
    except ShapecheckError as error:
        reason = one_line(" ".join(str(error).split()), _LONGEST)
        if getattr(error, "stage", "") != "refused":
            return "record", reason, ()
        request = engine.request
        expected = f"one that TensorRT loads here; it was built by {request.tensorrt} for {request.gpu}"
        return "record", "", (Mismatch("engine", "the engine", f"TensorRT refuses it: {reason}", expected),)


def _unlike(own: Contract, model: Contract) -> Iterator[Mismatch]:
    """In what an engine's contract is not that of the model it should be; precision apart, for a model may be built in any."""
    yield from compare_inputs(
        {each.name: each.shape for each in model.inputs}, {}, [Port(each.name, dims=each.shape) for each in own.inputs]
    )
    if own.role == model.role == "unet":
        at = Geometry(2, 17 * model.divisor, 25 * model.divisor)
        yield from compare(model.slots, at, {slot.name: slot.shape_at(at) for slot in own.slots})


def _fit(engine: Engine, asked: Geometry, any_batch: bool, any_tokens: bool) -> Fit:
    """Which profile serves a size; where none does, why not, and what would."""
    contract, profiles = engine.request.contract, engine.request.profiles
    try:
        contract.require(asked)
    except ShapecheckError as error:
        return Fit(asked, None, (str(error),), None, None)
    ranges = [range_of(contract, each) for each in profiles]
    wanted = [_completed(asked, each.opt, any_batch, any_tokens) for each in ranges]
    for geometry in wanted:
        if (chosen := choose(profiles, contract.input_shapes(geometry))) is not None:
            return Fit(geometry, chosen, (), None, None)
    outside = [each.outside(geometry) for each, geometry in zip(ranges, wanted, strict=True)]
    best = min(range(len(ranges)), key=lambda number: len(outside[number]))
    reasons = tuple(f"profile {number}: {'; '.join(told)}" for number, told in enumerate(outside))
    return Fit(wanted[best], None, reasons, ranges[best].nearest(wanted[best]), ranges[best].with_(wanted[best]))


def _completed(asked: Geometry, usual: Geometry, any_batch: bool, any_tokens: bool) -> Geometry:
    """What was asked for, with the usual batch and tokens where those were not."""
    batch, tokens = usual.batch if any_batch else asked.batch, usual.tokens if any_tokens else asked.tokens
    return replace(asked, batch=batch, tokens=tokens)


def _weights(engine: Engine, name: str, offline: bool, progress: Progress) -> Weights:
    """Whether an engine was built from an ONNX file, or from one that was exported from a model's checkpoint."""
    if Path(name).suffix.lower() == ".onnx":
        return replace(compare_with_file(engine, OnnxFile(name), progress), name=name)
    request = engine.request
    taken = subject.take(name, offline=offline)
    if taken.stored is None:
        raise ShapecheckError(f"--weights {name}: {taken.absent}; give a folder that holds them, or an ONNX file")
    own = checkpoints.digest(taken.stored, lambda *bytes_: progress("hashing the weights", *bytes_))
    if own == request.weights:
        return Weights(name, True, "bit by bit")
    if not request.checkpoint:
        raise ShapecheckError(f"--weights {name}: the record does not say from which checkpoint; give the ONNX file instead")
    if own != request.checkpoint:
        return Weights(name, False, f"other weights: {own}")
    if {each.dtype for each in taken.stored.values()} == {request.contract.dtype}:
        return Weights(name, False, "the ONNX file was exported from them, and its weights were changed before it was built")
    return Weights(name, True, "in another precision, by the word of the ONNX file it was built from")


def compare_with_file(engine: Engine, file: OnnxFile, progress: Progress = silent) -> Weights:
    """Say whether an engine was built from an ONNX file's weights. Raises ShapecheckError if those cannot be read."""
    request, name = engine.request, str(file)
    own = checkpoints.digest(file.tensors, lambda *bytes_: progress("hashing the weights", *bytes_))
    if own == request.weights:
        return Weights(name, True, "the very file" if file.digest == request.onnx else "the same weights, in another ONNX file")
    exported_from = file.metadata.get(WEIGHTS_KEY)
    same = exported_from and exported_from == request.checkpoint
    return Weights(name, False, "another export of the same checkpoint" if same else f"other weights: {own}")
