"""An engine against its record or, without one, a model; and against a size, a ControlNet and weights that it should be for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shapecheck.contract import Contract, Geometry, Mismatch, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.geometry import AXES
from shapecheck.contract.size_request import SizeRequest
from shapecheck.models import weights as checkpoints
from shapecheck.observe import subject
from shapecheck.observe.controlnet_fit import find_misfits
from shapecheck.onnx.file import WEIGHTS_KEY, OnnxFile, file_digest
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.build import read_back
from shapecheck.tensorrt.engine_tensors import compare_engine, compare_model
from shapecheck.tensorrt.foreign_engine import ForeignEngine, match_engine
from shapecheck.tensorrt.process import EngineError
from shapecheck.tensorrt.profiles import choose_profile, explain_refusal, find_profile_mismatches
from shapecheck.tensorrt.record import (
    Engine,
    EngineCheck,
    EngineInterface,
    Read,
    SizeFit,
    WeightsCheck,
    record_of,
    size_of_engine,
)


def check_engine(
    path: Path,
    engine: Engine | None,
    model: Contract | None = None,
    *,
    controlnets: Sequence[str] = (),
    requested: SizeRequest | None = None,
    weights: str | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> EngineCheck:
    """Return everything that can be said of an engine here: from itself if TensorRT can load it, else from its record.

    `engine` is the record beside it; without one TensorRT has to load it, and `model` says what its inputs should be.
    `model` is the contract it should keep. `requested` are sizes it should serve; what nobody requests is as each profile is
    tuned for. `weights` is an ONNX file or a model that it should have been built from.
    Raises ShapecheckError if the engine, a ControlNet or the weights cannot be read.
    """
    read: Read
    if engine is None:
        foreign = _read_foreign(path, model, weights, progress)
        interface, mismatches, notes = foreign.interface, [*foreign.refusals, *foreign.faults], foreign.notes
        notes += (foreign.unsure,) if foreign.unsure else ()
        read, unread = "engine", ""
    else:
        interface, notes = engine.interface, ()
        mismatches, read, unread = _compare_with_record(path, engine, progress)
        for profile in interface.profiles:
            mismatches += find_profile_mismatches(interface.contract, profile)
        mismatches += compare_model(interface.contract, model) if model is not None else ()
    contract = interface.contract
    fit = _fit_sizes(interface, requested) if requested is not None and requested.ranges else None
    # A contract read off a graph does not know its model's configuration, which a ControlNet is judged by.
    if model is not None and "down_block_types" not in contract.config:
        contract = replace(model, slots=contract.slots, features=contract.features)
    at = fit.geometry if fit is not None else None
    unfit = find_misfits(contract, controlnets, at, offline=offline, progress=progress) if controlnets else ()
    compared = _compare_weights(engine, weights, offline, progress) if engine is not None and weights is not None else None
    return EngineCheck(str(path), interface, read, unread, tuple(mismatches), fit, tuple(controlnets), unfit, compared, notes)


def _read_foreign(path: Path, model: Contract | None, weights: str | None, progress: Progress) -> ForeignEngine:
    """Return what an engine without a record is, beside the model. Raises ShapecheckError if TensorRT cannot load it here."""
    size_of_engine(path)
    absent = f"{path} has no {record_of(path).name} beside it"
    if model is None:
        advice = "copy both together, or say which model it should be with --model: TensorRT tells what its inputs are"
        raise ShapecheckError(f"{absent}; {advice}")
    if weights is not None:
        raise ShapecheckError(f"{absent}, which alone says what weights it was built from: leave out --weights")
    try:
        return match_engine(read_back(path, None, progress), model)
    except ShapecheckError as error:
        reason = one_line(" ".join(str(error).split()), 600)
        refused = isinstance(error, EngineError) and error.stage == "refused"
        raise ShapecheckError(
            f"{absent}, so that only TensorRT can tell what its inputs are, and "
            f"{f'TensorRT refuses it: {reason}' if refused else f'it cannot be loaded here: {reason}'}\n"
            "an engine loads with the release of TensorRT and the kind of GPU that it was built for; with its record, which "
            "`shapecheck build` writes, or the ONNX file that it was built from, `shapecheck check` works anywhere"
        ) from error


def _compare_with_record(path: Path, engine: Engine, progress: Progress) -> tuple[list[Mismatch], Read, str]:
    """Return in what an engine is not what its record says, which of them was read, and why not the engine."""
    request, size = engine.request, size_of_engine(path)
    actual, expected = f"{size} bytes", f"{engine.size} bytes"
    if size == engine.size:
        actual, expected = file_digest(path, lambda *bytes_: progress(f"hashing {path}", *bytes_)), engine.digest
    if actual != expected:
        cause = "another engine, or one cut short, under the name of this record; copy both together, or build again"
        return [Mismatch("engine", "the file", actual, expected, cause=cause)], "record", ""
    try:
        return [*compare_engine(request, read_back(path, engine, progress))], "engine", ""
    except ShapecheckError as error:
        reason = one_line(" ".join(str(error).split()), 300)
        if not isinstance(error, EngineError) or error.stage != "refused":
            return [], "record", reason
        expected = f"one that TensorRT loads here; it was built by {request.tensorrt} for {request.gpu}"
        return [Mismatch("engine", "the engine", f"TensorRT refuses it: {reason}", expected)], "record", ""


def _fit_sizes(interface: EngineInterface, requested: SizeRequest) -> SizeFit:
    """Return the fit of the first of the requested sizes that no profile serves; if all are served, of the first."""
    bounds = [{symbol: triple[bound] for symbol, triple in sizes.items()} for sizes in requested.ranges for bound in range(3)]
    fits = [_fit_size(interface, bound) for number, bound in enumerate(bounds) if bound not in bounds[:number]]
    return next((fit for fit in fits if fit.profile is None), fits[0])


def _fit_size(interface: EngineInterface, size: Mapping[str, int]) -> SizeFit:
    """Return the profile that serves a size; if none does, why not, and what would."""
    contract, profiles = interface.contract, interface.profiles
    # What was left open is as each profile is tuned for.
    whole = Geometry(**{axis: size.get(symbol, 1) for symbol, axis in AXES.items()})
    try:
        ranges = interface.ranges
        requested = [sizes.opt.with_sizes(size) for sizes in ranges]
        whole = requested[0] if requested else whole
        contract.require(whole)
    except ShapecheckError as error:
        return SizeFit(whole, None, (str(error),))
    for geometry in requested:
        if (chosen := choose_profile(profiles, contract.input_shapes(geometry))) is not None:
            return SizeFit(geometry, chosen)
    outside = [sizes.outside(geometry) for sizes, geometry in zip(ranges, requested, strict=True)]
    best = min(range(len(ranges)), key=lambda number: len(outside[number]))
    reasons = tuple(f"profile {number}: {'; '.join(axes)}" for number, axes in enumerate(outside) if axes)
    sizes, geometry = ranges[best], requested[best]
    nearest = sizes.nearest(geometry)
    if interface.record is None:  # slots may allow less than the sample, and nobody here built it
        reasons += explain_refusal(profiles, contract.input_shapes(geometry)) if len(reasons) < len(outside) else ()
        served = choose_profile(profiles, contract.input_shapes(nearest)) is not None
        return SizeFit(geometry, None, reasons, nearest if served else None)
    return SizeFit(geometry, None, reasons, nearest, sizes.with_(geometry))


def _compare_weights(engine: Engine, name: str, offline: bool, progress: Progress) -> WeightsCheck:
    """Say whether an engine was built from an ONNX file, or from one that was exported from a model's checkpoint."""
    if Path(name).suffix.lower() == ".onnx":
        return replace(compare_with_file(engine, OnnxFile(name), progress), name=name)
    request = engine.request
    model = subject.resolve_subject(name, offline=offline)
    if model.stored is None:
        raise ShapecheckError(f"--weights {name}: {model.absent}; give a folder that holds them, or an ONNX file")
    own = checkpoints.digest(model.stored, lambda *bytes_: progress("hashing the weights", *bytes_))
    if own == request.weights:
        return WeightsCheck(name, True, "bit by bit")
    if not request.checkpoint:
        raise ShapecheckError(f"--weights {name}: the record does not say from which checkpoint; give the ONNX file instead")
    if own != request.checkpoint:
        return WeightsCheck(name, False, f"other weights: {own}")
    if {tensor.dtype for tensor in model.stored.values()} == {request.contract.dtype}:
        changed = "the ONNX file was exported from them, and its weights were changed before it was built"
        return WeightsCheck(name, False, changed)
    return WeightsCheck(name, True, "in another precision, by the word of the ONNX file it was built from")


def compare_with_file(engine: Engine, file: OnnxFile, progress: Progress = silent) -> WeightsCheck:
    """Say whether an engine was built from an ONNX file's weights. Raises ShapecheckError if those cannot be read."""
    request, name = engine.request, str(file)
    own = checkpoints.digest(file.tensors, lambda *bytes_: progress("hashing the weights", *bytes_))
    if own == request.weights:
        where = "the very file" if file.digest == request.onnx else "the same weights, in another ONNX file"
        return WeightsCheck(name, True, where)
    is_of_checkpoint = request.checkpoint and request.checkpoint == file.metadata.get(WEIGHTS_KEY)
    return WeightsCheck(name, False, "another export of the same checkpoint" if is_of_checkpoint else f"other weights: {own}")
