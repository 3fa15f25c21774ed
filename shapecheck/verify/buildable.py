"""An ONNX file as something to build an engine from: what it is, what it calls its inputs, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shapecheck.build import artefact, engine
from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract import profile_forms as forms
from shapecheck.contract.checked import Check
from shapecheck.contract.profiles import Profile, profile_of
from shapecheck.contract.ranges import parse_ranges
from shapecheck.observe.configfile import one_line
from shapecheck.observe.progress import Progress, silent
from shapecheck.verify.check import check
from shapecheck.verify.models import contract_of

_HARMLESS = ("symbol", "name", "sizes")
"""Faults an engine can be built with: TensorRT ties fewer sizes, the record keeps the names, and the range is tried."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes an engine is for, as a user writes them: see `parse_ranges`. Or a file of profiles."""

    sizes: tuple[str, ...] = ()
    batch: tuple[str, ...] = ("1",)
    tokens: str = "77"
    file: Path | None = None


def examine(file: Path, contract: Contract | None = None, progress: Progress = silent) -> tuple[engine.Source | None, Check]:
    """The file as a source of engines, or None where what `check` finds wrong in it would be built in."""
    found = check(file, contract, progress=progress)
    if any(each.kind not in _HARMLESS for each in found.mismatches):
        return None, found
    return engine.source_of(file, found.contract, dict(found.names), progress), found


def profiles_for(contract: Contract, wanted: Sizes, names: dict[str, str] | None = None) -> tuple[Profile, ...]:
    """The profiles for these sizes, in the contract's names; `names` is what a file of profiles may call the inputs.

    Raises ShapecheckError where a text is no size, or the model refuses one.
    """
    if wanted.file is not None:
        if wanted.sizes:
            raise ShapecheckError("--profile FILE says itself which sizes; drop it or --sizes")
        return _read(wanted.file, names or {})
    ranges = parse_ranges(wanted.sizes, wanted.batch, wanted.tokens, vae_factor=contract.header.vae_factor)
    return tuple(profile_of(contract, each) for each in ranges)


@dataclass(frozen=True, slots=True)
class Made:
    """Profiles, in the names of the file they are for."""

    contract: Contract
    profiles: tuple[Profile, ...]
    names: dict[str, str]
    """From the contract's name of an input to the file's."""
    broken: Check | None = None
    """What is wrong with an ONNX file, which then has no profiles."""


def profiles_of(model: str, wanted: Sizes, contract: Contract | None, *, offline: bool, progress: Progress) -> Made:
    """The profiles of a model, a saved contract or an ONNX file.

    `contract` is for an ONNX file that holds none. Raises ContractError where its graph cannot serve the sizes.
    """
    path = Path(model)
    if path.suffix.lower() != ".onnx":
        if contract is not None:
            raise ShapecheckError(f"--model says which UNet an ONNX file is; {path} is named by itself: drop --model")
        known = contract_of(model, offline=offline, progress=progress)
        return Made(known, profiles_for(known, wanted), {})
    source, found = examine(path, contract, progress)
    if source is None:
        return Made(found.contract, (), {}, found)
    names = dict(source.names)
    profiles = profiles_for(source.contract, wanted, names)
    engine.check(source, profiles, progress)
    return Made(source.contract, tuple(each.renamed(names) for each in profiles), names)


def _read(file: Path, names: dict[str, str]) -> tuple[Profile, ...]:
    ours = {theirs: name for name, theirs in names.items()}
    try:
        profiles, _ = forms.loads(artefact.text_in(file))
    except ShapecheckError as error:
        raise ShapecheckError(f"{file}: {one_line(error, 400)}") from None
    return tuple(each.renamed(ours) for each in profiles)
