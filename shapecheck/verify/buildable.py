"""An ONNX file as something to build an engine from: what it is, what it calls its inputs, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shapecheck.contract import Contract, ContractError, ShapecheckError, profile_check
from shapecheck.contract import profile_forms as forms
from shapecheck.contract.checked import Check
from shapecheck.contract.engine_files import is_engine
from shapecheck.contract.profiles import Profile, profile_of
from shapecheck.contract.ranges import USUAL_TOKENS, parse_ranges
from shapecheck.observe.configfile import one_line
from shapecheck.observe.configs import OtherModelError
from shapecheck.observe.progress import Progress, silent
from shapecheck.verify.models import contract_of

if TYPE_CHECKING:
    from shapecheck.build import engine

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
    file: Path, contract: Contract | None = None, progress: Progress = silent, *, control: bool = True
) -> tuple[engine.Source | None, Check]:
    """The file as a source of engines, or None where what `check` finds wrong in it would be built in.

    `contract` is what the file is to be held to; without `control` less its slots. Precision is the file's own.
    Raises ShapecheckError where it is a ControlNet, and the contract that of a UNet.
    """
    from shapecheck.build import engine  # needs onnx, and presets do not
    from shapecheck.verify.check import check

    if is_engine(file):
        raise ShapecheckError(f"{file} is an engine already; give the ONNX file it was built from")
    if not control and contract is None:
        raise ShapecheckError("--no-control goes with --model: the UNet that the file was exported of, without its slots")
    held = replace(contract, slots=()) if contract is not None and not control else contract
    found = check(file, held, progress=progress)
    if any(each.kind not in _HARMLESS for each in found.mismatches):
        return None, found
    source = engine.source_of(file, found.contract, dict(found.names), progress)
    if found.contract.role == "unet" and len(source.reading.outputs) > 1:
        raise ShapecheckError(
            f"{file} is a ControlNet, and --model says which UNet its outputs are for, not what it takes; engines are built of "
            "ControlNets that `shapecheck export` wrote, which hold a contract of their own"
        )
    if found.basis != "inside":
        source = replace(source, contract=_in_precision_of(source))
    return source, found


def _in_precision_of(source: engine.Source) -> Contract:
    """The contract in the floating dtypes that the file declares: a model is exported in any."""
    declared = {each.name: each.dtype for each in source.reading.inputs if each.is_float}
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
        wanted.sizes, wanted.batch or ("1",), wanted.tokens or USUAL_TOKENS, vae_factor=contract.header.vae_factor
    )
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
    fixed: frozenset[str] = frozenset()
    """Inputs that the file fixes on every axis: they are in no profile of the tools that build engines."""

    @property
    def dynamic(self) -> tuple[Profile, ...]:
        """The profiles without the inputs that never vary."""
        kept = [Profile(tuple(each for each in one.inputs if each.name not in self.fixed)) for one in self.profiles]
        return tuple(one for one in kept if one.inputs)


def profiles_of(
    model: str, wanted: Sizes, contract: Contract | None, *, control: bool = True, offline: bool, progress: Progress
) -> Made:
    """The profiles of a model, a saved contract or an ONNX file.

    `contract` is for an ONNX file that holds none. Raises ContractError where its graph cannot serve the sizes.
    """
    path = Path(model)
    if path.suffix.lower() != ".onnx":
        if contract is not None:
            raise ShapecheckError(f"--model says which UNet an ONNX file is; {path} is named by itself: drop --model")
        try:
            known = contract_of(model, offline=offline, progress=progress)
        except OtherModelError:
            raise ShapecheckError(f"{model} is a ControlNet: export it, and give the ONNX file; or name the UNet") from None
        known = known if control else replace(known, slots=())
        return Made(known, profiles_for(known, wanted), {})
    from shapecheck.build import engine

    source, found = examine(path, contract, progress, control=control)
    if source is None:
        return Made(found.contract, (), {}, found)
    names = dict(source.names)
    profiles = profiles_for(source.contract, wanted, names)
    engine.check(source, profiles, progress)
    fixed = (each.name for each in source.reading.inputs if each.dims and all(isinstance(dim, int) for dim in each.dims))
    return Made(source.contract, tuple(each.renamed(names) for each in profiles), names, None, frozenset(fixed))


def _read(file: Path, contract: Contract, names: dict[str, str]) -> tuple[Profile, ...]:
    ours = {theirs: name for name, theirs in names.items()}
    try:
        with file.open("rb") as opened:
            text = opened.read(_LARGEST + 1).decode("utf-8-sig")
        read, made_for = forms.loads(text)
    except OSError as error:
        raise ShapecheckError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeError:
        raise ShapecheckError(f"{file} holds no profiles; `shapecheck profile --format json` writes them") from None
    except ShapecheckError as error:
        raise ShapecheckError(f"{file}: {one_line(error, 400)}") from None
    profiles = tuple(each.renamed(ours) for each in read)
    wrong = [each for one in profiles for each in profile_check.mismatches(contract, one)]
    if wrong and made_for != contract.digest:
        raise ContractError(tuple(wrong), subject=f"{file} was made for another contract", contract=contract)
    return profiles
