"""An ONNX file against a contract: given, found inside the file, or that of the preset it fits best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shapecheck import presets
from shapecheck.contract import Config, Contract, Dim, Geometry, Input, Mismatch, ShapecheckError, Slot, show
from shapecheck.contract.mismatch import compare
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.onnx import contract_metadata
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.findings import Case, findings, size_faults
from shapecheck.onnx.input_roles import Roles, roles_of, sort_out
from shapecheck.onnx.reading import GraphTensor, Reading
from shapecheck.onnx.records import Basis, Check, DeclaredInput, DeclaredSlot
from shapecheck.onnx.size_sweep import Survey, survey
from shapecheck.presets.families import architecture
from shapecheck.progress import Progress, silent


def check(
    file: OnnxFile,
    contract: Contract | None = None,
    geometry: Geometry | None = None,
    *,
    progress: Progress = silent,
) -> Check:
    """Return everything that is wrong with an exported UNet, without its weights: no mismatches if nothing is.

    The file is held to `contract`; without one to the contract inside the file, else to that of the preset it fits best,
    else to itself. A ControlNet's file is held to a contract too: its outputs to the slots of a UNet or of its own kind.
    With `geometry` only that size has to work; without it, every size that the contract allows.
    Where sizes cannot be followed through the graph, `unchecked` says so, and no mismatches do not mean that nothing is wrong.
    Raises ShapecheckError where the file cannot be read, or shows no residuals and no model is given.
    """
    progress(f"reading {file}")
    reading = file.reading
    inside, notes = _inside(file, contract)
    roles = sort_out(reading)
    held = contract or inside
    if roles.is_controlnet and held is None:
        raise ShapecheckError(
            f"{file} is a ControlNet (it gives {len(reading.outputs)} outputs) and holds no contract; "
            "say with --model which UNet its outputs are for, or with --controlnet whether it fits one as a model"
        )
    seen = survey(reading, roles, geometry, progress, allowed=held.divisor if held else 1)
    basis: Basis = "given" if contract else "inside"
    if held is None:
        held, basis = _best_preset(roles, seen), "preset"
    if held is None:
        held, basis = _itself(reading, roles, seen), "none"
    case = Case(roles, seen, held, geometry, basis == "none")
    mismatches = _emitted(reading, case) if roles.is_controlnet else findings(case)
    return Check(
        str(file),
        reading.producer,
        held,
        basis,
        roles.naming.key if roles.naming else "",
        tuple(DeclaredInput(each.name, each.rule, each.dtype) for each in roles.base),
        _seen_slots(case),
        seen.divisor,
        tuple(sorted(seen.fixed.items())),
        geometry,
        mismatches,
        (*notes, *_notes(case, inside)),
        case.matching.names,
        _unchecked(reading, case, mismatches),
    )


def _inside(file: OnnxFile, given: Contract | None) -> tuple[Contract | None, list[str]]:
    """The contract in the file; a damaged one only matters where no other is given."""
    try:
        return contract_metadata.contract_inside(file), []
    except ShapecheckError as error:
        if given is None:
            raise ShapecheckError(f"{error}; hold the file to a model instead: --model MODEL") from None
        return None, [f"the contract inside the file cannot be read: {error}"]


def _best_preset(roles: Roles, seen: Survey) -> Contract | None:
    """The preset whose contract the file breaks least; None where even that one has other inputs, or most slots wrong."""
    wrong = {known: findings(Case(roles, seen, known)) for known in presets.contracts().values()}
    fitting = [known for known, found in wrong.items() if _may_be(known, found, roles)]
    return min(fitting, key=lambda known: len(wrong[known]), default=None)


def _may_be(known: Contract, wrong: Sequence[Mismatch], roles: Roles) -> bool:
    slots = {slot.name for slot in known.slots} | {each.name for each in roles.slots}
    other = any(each.kind in ("channels", "input", "rank", "missing") for each in wrong if each.where not in slots)
    return not other and 2 * len({each.where for each in wrong} & slots) < len(known.slots)


def _itself(reading: Reading, roles: Roles, seen: Survey) -> Contract:
    """The file's own table as a contract: what holds for every UNet can then be asked of it."""
    if not roles.slots:
        names = ", ".join(each.name for each in reading.inputs) or "none"
        raise ShapecheckError(
            f"{reading.path} takes no residuals (inputs: {names}) and fits no preset; "
            "say with --model which UNet it should be, or export it with `shapecheck export`"
        )
    rules = seen.rules(add.skip for each in roles.slots for add in each.adds)
    slots = []
    for number, each in enumerate(each for each in roles.slots if each.adds and each.adds[0].skip in rules):
        index = roles.naming.index(each.name) if roles.naming else number
        if index is not None:
            name = SHAPECHECK.mid if index == -1 else SHAPECHECK.down(index)
            slots.append(Slot(name, rules[each.adds[0].skip], "full", each.adds[0].module, "", ()))
    inputs = [own for each in roles.base if (own := _own_input(roles, each))]
    return Contract("unknown", tuple(inputs), tuple(sorted(slots, key=lambda slot: slot.name)), Config())


def _own_input(roles: Roles, each: GraphTensor) -> Input | None:
    """A base input as it declares itself; None where its shape is not known."""
    axes = zip(each.dims or (), roles.symbols(each), strict=True)
    shape = [Dim(symbol) if symbol else Dim(None, dim) if isinstance(dim, int) else None for dim, symbol in axes]
    known = tuple(dim for dim in shape if dim is not None)
    return Input(roles_of(each)[0], known, each.dtype, "") if each.dims and len(known) == len(shape) else None


def _emitted(reading: Reading, case: Case) -> tuple[Mismatch, ...]:
    """What is wrong with a ControlNet's file: its inputs where the contract is a ControlNet's, its sizes, and what it gives."""
    contract = case.contract
    found = findings(case) if contract.role == "controlnet" else tuple(size_faults(case))
    slots = [replace(slot, name=case.called(slot)) for slot in contract.slots]
    names = {each.name for each in reading.outputs}
    for geometry, run in case.survey.working(case.asked, contract.divisor).items():
        given = {name: run.known[name] for name in names & run.known.keys()}
        comparable = [slot for slot in slots if slot.name in given or slot.name not in names]
        if wrong := compare(comparable, geometry, given):
            return (*found, *wrong)
    return found


def _unchecked(reading: Reading, case: Case, mismatches: Sequence[Mismatch]) -> str:
    """Why the sizes were not looked at; empty where they were, or where it is a fault that none works."""
    runs = case.survey.working(case.asked, case.contract.divisor).values()
    if not runs:
        none = "it works at no size that was tried and that the contract allows"
        return none if not any(each.kind == "sizes" for each in mismatches) else ""
    if reading.image is None:
        return "it gives no image (batch, channels, height, width): only names and structure were checked"
    told = [reading.image.name, *(each.adds[0].skip for each in case.roles.added if each.adds)]
    if case.roles.is_controlnet:
        called = {case.called(slot) for slot in case.contract.slots}
        told = [each.name for each in reading.outputs if each.name in called]
    if all(len(run.known.get(name, ())) == 4 for run in runs for name in told):
        return ""
    through = ", ".join(reading.unknown) or "the graph"
    return f"sizes could not be followed through {through}: only names and structure were checked"


def _seen_slots(case: Case) -> tuple[DeclaredSlot, ...]:
    matched = {each.name: slot.name for slot, each in case.matching.slots if each is not None}
    adds = {each.name: each.adds[0] for each in case.roles.added if each.adds}
    rules = case.survey.rules(add.skip for add in adds.values())
    seen = []
    for each in case.roles.added:
        add = adds.get(each.name)
        skip = "" if add is None else show(rules[add.skip]) if add.skip in rules else "not seen"
        seen.append(DeclaredSlot(each.name, each.rule, skip, add.module if add else "", matched.get(each.name, "")))
    return tuple(seen)


def _notes(case: Case, inside: Contract | None) -> list[str]:
    """What is no fault and still worth knowing."""
    notes, seen = [], case.survey
    if inside is not None and architecture(inside) != architecture(case.contract):
        notes.append(f"the contract inside the file is another one: {inside.header.source or inside.digest}")
    if "tokens" in seen.fixed:
        notes.append(f"the number of text tokens is fixed at {seen.fixed['tokens']}")
    if case.roles.slots and case.roles.naming is None:
        notes.append("the slots' names follow no known scheme: found by the sums they end in, numbered by their order")
    elif case.roles.naming not in (None, SHAPECHECK):
        notes.append(f"the slots are named as by {case.roles.naming.origin}")
    if case.asked is not None and seen.divisor > case.contract.divisor:
        notes.append(f"other sizes must be multiples of {seen.divisor}: {seen.fault(seen.refused)}")
    return notes
