"""An ONNX file to build an engine from: its contract, its names of the inputs, what is wrong with it, and its profiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shapecheck.contract import Contract, ContractError, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.geometry import USUAL_TOKENS
from shapecheck.files import read_text, report_unreadable
from shapecheck.onnx.records import FileCheck
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import Profile, find_profile_mismatches, profile_of
from shapecheck.tensorrt.record import is_engine
from shapecheck.tensorrt.size_ranges import parse_ranges

if TYPE_CHECKING:
    from shapecheck.onnx.file import OnnxFile


@dataclass(frozen=True, slots=True)
class Source:
    """The ONNX file that an engine is made from, and its contract."""

    file: OnnxFile
    contract: Contract
    names: Mapping[str, str]
    """From the contract's name of an input to the file's."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes an engine is for, as a user writes them (see `parse_ranges`), or a file of profiles."""

    sizes: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    tokens: str | None = None
    file: Path | None = None


def read_source(
    file: OnnxFile, contract: Contract | None = None, names: Mapping[str, str] | None = None, progress: Progress = silent
) -> Source:
    """Read an ONNX file to build from. `names` maps the contract's inputs to the file's; by default by its naming scheme.

    Raises ShapecheckError if it is not an ONNX file, or holds no contract and none is given.
    """
    from shapecheck.onnx import contract_metadata  # needs onnx, and presets do not

    progress(f"reading {file}")
    inputs = file.reading.inputs
    known = contract or contract_metadata.contract_inside(file)
    if known is None:
        raise ShapecheckError(f"{file} holds no contract: say which UNet it is with --model, or contract= from Python")
    known = contract_metadata.make_printable(known)
    declared = names or known.match_names([tensor.name for tensor in inputs])
    return Source(file, known, {name: declared.get(name, name) for name in known.input_rules})


def examine(
    path: Path, contract: Contract | None = None, progress: Progress = silent, *, control: bool = True
) -> tuple[Source | None, FileCheck]:
    """Return the file as a source of engines, and its check; None if what is wrong in it would be built in.

    The file has to keep `contract`, without `control` less its slots; precision is the file's own.
    Raises ShapecheckError if it is a ControlNet, and the contract that of a UNet.
    """
    from shapecheck.onnx.check import check
    from shapecheck.onnx.file import OnnxFile

    if is_engine(path):
        raise ShapecheckError(f"{path} is an engine already; give the ONNX file it was built from")
    if not control and contract is None:
        raise ShapecheckError("--no-control goes with --model: the UNet that the file was exported of, without its slots")
    expected = replace(contract, slots=()) if contract is not None and not control else contract
    file = OnnxFile(path)
    result = check(file, expected, progress=progress)
    # An engine can be built with these faults: TensorRT ties fewer sizes, the record keeps the names, and the range is tried.
    if any(mismatch.kind not in ("symbol", "name", "sizes") for mismatch in result.mismatches):
        return None, result
    source = read_source(file, result.contract, dict(result.names), progress)
    if result.contract.role == "unet" and len(file.reading.outputs) > 1:
        raise ShapecheckError(
            f"{file} is a ControlNet, and --model says which UNet its outputs are for, not its own inputs; "
            "engines are built of ControlNets that `shapecheck export` wrote, which hold a contract of their own"
        )
    if result.basis == "inside":
        return source, result
    # A model is exported in any precision: the contract follows the file's.
    dtypes = {tensor.name: tensor.dtype for tensor in file.reading.inputs if tensor.is_float}
    own = {name: dtypes[theirs] for name, theirs in source.names.items() if theirs in dtypes}
    return replace(source, contract=source.contract.with_dtypes(own)), result


def profiles_for(contract: Contract, requested: Sizes, names: dict[str, str] | None = None) -> tuple[Profile, ...]:
    """Return the profiles for these sizes, in the contract's names; `names` is what a file of profiles may call the inputs.

    Raises ShapecheckError if a text is not a size, or the model refuses one; ContractError if the file of profiles was made
    for another contract and does not fit this one.
    """
    file = requested.file
    if file is None:
        batch, tokens = requested.batch or ("1",), requested.tokens or str(USUAL_TOKENS)
        ranges = parse_ranges(requested.sizes, batch, tokens, vae_factor=contract.header.vae_factor)
        return tuple(profile_of(contract, sizes) for sizes in ranges)
    if requested.sizes or requested.batch or requested.tokens:
        raise ShapecheckError("--profile FILE says itself which sizes; drop it, or --sizes, --batch and --tokens")
    refusal = f"{file} holds no profiles; `shapecheck profile --format json` writes them"
    with report_unreadable(file):
        text = read_text(file, profile_formats.FORMAT.largest, too_large=refusal, not_text=refusal)
    try:
        saved, digest = profile_formats.loads(text)
    except ShapecheckError as error:
        raise ShapecheckError(f"{file}: {one_line(error, 400)}") from None
    ours = {theirs: name for name, theirs in (names or {}).items()}
    profiles = tuple(profile.renamed(ours) for profile in saved)
    mismatches = [mismatch for profile in profiles for mismatch in find_profile_mismatches(contract, profile)]
    if mismatches and digest != contract.digest:
        raise ContractError(tuple(mismatches), subject=f"{file} was made for another contract", contract=contract)
    return profiles
