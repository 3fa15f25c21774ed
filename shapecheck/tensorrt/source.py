"""An ONNX file as something to build an engine from: what it is, what it calls its inputs, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shapecheck.contract import Contract, ContractError, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.geometry import USUAL_TOKENS
from shapecheck.files import read_text, report_unreadable
from shapecheck.onnx.records import Check
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt import profile_check
from shapecheck.tensorrt import profile_formats as forms
from shapecheck.tensorrt.profiles import Profile, profile_of
from shapecheck.tensorrt.record import is_engine
from shapecheck.tensorrt.size_ranges import parse_ranges

if TYPE_CHECKING:
    from shapecheck.tensorrt import build


_LARGEST = 4 * 2**20


_HARMLESS = ("symbol", "name", "sizes")
"""Faults an engine can be built with: TensorRT ties fewer sizes, the record keeps the names, and the range is tried."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes an engine is for, as a user writes them: see `parse_ranges`. Or a file of profiles."""

    sizes: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    tokens: str | None = None
    file: Path | None = None


def examine(
    path: Path, contract: Contract | None = None, progress: Progress = silent, *, control: bool = True
) -> tuple[build.Source | None, Check]:
    """The file as a source of engines, or None where what `check` finds wrong in it would be built in.

    `contract` is what the file is to be held to; without `control` less its slots. Precision is the file's own.
    Raises ShapecheckError where it is a ControlNet, and the contract that of a UNet.
    """
    from shapecheck.onnx.check import check
    from shapecheck.onnx.file import OnnxFile
    from shapecheck.tensorrt import build  # needs onnx, and presets do not

    if is_engine(path):
        raise ShapecheckError(f"{path} is an engine already; give the ONNX file it was built from")
    if not control and contract is None:
        raise ShapecheckError("--no-control goes with --model: the UNet that the file was exported of, without its slots")
    held = replace(contract, slots=()) if contract is not None and not control else contract
    file = OnnxFile(path)
    found = check(file, held, progress=progress)
    if any(each.kind not in _HARMLESS for each in found.mismatches):
        return None, found
    source = build.source_of(file, found.contract, dict(found.names), progress)
    if found.contract.role == "unet" and len(source.file.reading.outputs) > 1:
        raise ShapecheckError(
            f"{file} is a ControlNet, and --model says which UNet its outputs are for, not what it takes; engines are built of "
            "ControlNets that `shapecheck export` wrote, which hold a contract of their own"
        )
    if found.basis != "inside":
        source = replace(source, contract=_in_precision_of(source))
    return source, found


def _in_precision_of(source: build.Source) -> Contract:
    """The contract in the floating dtypes that the file declares: a model is exported in any."""
    declared = {each.name: each.dtype for each in source.file.reading.inputs if each.is_float}
    inputs = source.contract.inputs
    return replace(
        source.contract,
        inputs=tuple(replace(each, dtype=declared.get(source.names[each.name], each.dtype)) for each in inputs),
    )


def profiles_for(contract: Contract, wanted: Sizes, names: dict[str, str] | None = None) -> tuple[Profile, ...]:
    """The profiles for these sizes, in the contract's names; `names` is what a file of profiles may call the inputs.

    Raises ShapecheckError where a text is no size, or the model refuses one.
    """
    if wanted.file is not None:
        if wanted.sizes or wanted.batch or wanted.tokens:
            raise ShapecheckError("--profile FILE says itself which sizes; drop it, or --sizes, --batch and --tokens")
        return _read(wanted.file, contract, names or {})
    ranges = parse_ranges(
        wanted.sizes, wanted.batch or ("1",), wanted.tokens or str(USUAL_TOKENS), vae_factor=contract.header.vae_factor
    )
    return tuple(profile_of(contract, each) for each in ranges)


def _read(file: Path, contract: Contract, names: dict[str, str]) -> tuple[Profile, ...]:
    ours = {theirs: name for name, theirs in names.items()}
    nothing = f"{file} holds no profiles; `shapecheck profile --format json` writes them"
    with report_unreadable(file):
        text = read_text(file, _LARGEST, too_large=nothing, not_text=nothing)
    try:
        read, made_for = forms.loads(text)
    except ShapecheckError as error:
        raise ShapecheckError(f"{file}: {one_line(error, 400)}") from None
    profiles = tuple(each.renamed(ours) for each in read)
    wrong = [each for one in profiles for each in profile_check.mismatches(contract, one)]
    if wrong and made_for != contract.digest:
        raise ContractError(tuple(wrong), subject=f"{file} was made for another contract", contract=contract)
    return profiles
