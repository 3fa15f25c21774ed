"""An engine against its record, and against a model, a size, a ControlNet and weights that it should be for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shapecheck.contract import Contract, Geometry, Mismatch, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.mismatch import Port, compare_inputs, compare_shapes
from shapecheck.models import weights as checkpoints
from shapecheck.observe import subject
from shapecheck.observe.controlnet_fit import find_misfits
from shapecheck.onnx.file import WEIGHTS_KEY, OnnxFile, file_digest
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.build import read_back
from shapecheck.tensorrt.engine_tensors import compare_engine
from shapecheck.tensorrt.process import EngineError
from shapecheck.tensorrt.profiles import choose_profile, find_profile_mismatches, range_of
from shapecheck.tensorrt.record import Engine, EngineCheck, Read, SizeFit, WeightsCheck, size_of_engine


def check_engine(
    path: Path,
    engine: Engine,
    model: Contract | None = None,
    *,
    controlnets: Sequence[str] = (),
    requested: Geometry | None = None,
    any_batch: bool = False,
    any_tokens: bool = False,
    weights: str | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> EngineCheck:
    """Return everything that can be said of an engine here: from itself if TensorRT can load it, else from its record.

    `model` is the contract it should keep. `requested` is a size it should serve; with `any_batch` and `any_tokens` at whatever
    batch and tokens it is tuned for. `weights` is an ONNX file or a model that it should have been built from.
    Raises ShapecheckError if the engine, a ControlNet or the weights cannot be read.
    """
    contract = engine.request.contract
    mismatches, read, unread = _compare_with_record(path, engine, progress)
    mismatches += [mismatch for profile in engine.request.profiles for mismatch in find_profile_mismatches(contract, profile)]
    if model is not None:
        # Precision does not count: a model may be built in any.
        rules = {base.name: base.shape for base in model.inputs}
        mismatches += compare_inputs(rules, {}, [Port(base.name, dims=base.shape) for base in contract.inputs])
        if contract.role == model.role == "unet":
            geometry = Geometry(2, 17 * model.divisor, 25 * model.divisor)
            shapes = {slot.name: slot.shape_at(geometry) for slot in contract.slots}
            mismatches += compare_shapes(model.slots, geometry, shapes)
    fit = _fit_size(engine, requested, any_batch, any_tokens) if requested is not None else None
    # A contract read off a graph does not know its model's configuration, which a ControlNet is judged by.
    if model is not None and "down_block_types" not in contract.config:
        contract = replace(model, slots=contract.slots, features=contract.features)
    unfit = find_misfits(contract, controlnets, requested, offline=offline, progress=progress) if controlnets else ()
    compared = _compare_weights(engine, weights, offline, progress) if weights is not None else None
    return EngineCheck(str(path), engine, read, unread, tuple(mismatches), fit, tuple(controlnets), unfit, compared)


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


def _fit_size(engine: Engine, size: Geometry, any_batch: bool, any_tokens: bool) -> SizeFit:
    """Return the profile that serves a size; if none does, why not, and what would."""
    contract, profiles = engine.request.contract, engine.request.profiles
    try:
        contract.require(size)
    except ShapecheckError as error:
        return SizeFit(size, None, (str(error),))
    ranges = [range_of(contract, profile) for profile in profiles]
    # A batch or tokens that were left open are those that each profile is tuned for.
    left_open = [axis for axis, is_open in (("batch", any_batch), ("tokens", any_tokens)) if is_open]
    requested = [replace(size, **{axis: getattr(sizes.opt, axis) for axis in left_open}) for sizes in ranges]
    for geometry in requested:
        if (chosen := choose_profile(profiles, contract.input_shapes(geometry))) is not None:
            return SizeFit(geometry, chosen)
    outside = [sizes.outside(geometry) for sizes, geometry in zip(ranges, requested, strict=True)]
    best = min(range(len(ranges)), key=lambda number: len(outside[number]))
    reasons = tuple(f"profile {number}: {'; '.join(axes)}" for number, axes in enumerate(outside))
    sizes, geometry = ranges[best], requested[best]
    return SizeFit(geometry, None, reasons, sizes.nearest(geometry), sizes.with_(geometry))


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
