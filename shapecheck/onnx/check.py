"""An ONNX file compared with a contract: the caller's, the one inside the file, or that of the preset that fits best."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from shapecheck import presets
from shapecheck.contract import Config, Contract, Dim, Geometry, Input, Mismatch, ShapecheckError, Slot, show
from shapecheck.contract.mismatch import compare_shapes
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.contract.size_request import SizeRequest
from shapecheck.onnx import contract_metadata
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.findings import Case, find_faults, find_input_limits, find_remarks
from shapecheck.onnx.input_roles import CONDITIONS, Matching, Roles, assign_roles, diffusers_names
from shapecheck.onnx.other_forms import find_other_form
from shapecheck.onnx.reading import Reading
from shapecheck.onnx.records import Basis, DeclaredInput, DeclaredSlot, FileCheck
from shapecheck.onnx.shapes import Shapes
from shapecheck.onnx.size_sweep import SizeSweep, sweep_sizes
from shapecheck.presets.families import extract_architecture
from shapecheck.progress import Progress, silent
from shapecheck.report.numbers import format_count


def check(
    file: OnnxFile, contract: Contract | None = None, requested: SizeRequest | None = None, *, progress: Progress = silent
) -> FileCheck:
    """Return everything that is wrong with an exported UNet, without reading its weights.

    The file is compared with `contract`; without one with the contract inside the file, else with that of the preset it fits
    best, else with its own table. Of a ControlNet, the outputs are compared with the slots of a UNet or of its own contract.
    The `requested` sizes have to work. A file that takes fewer sizes than its model is not wrong: `limits` says which.
    If sizes cannot be followed through the graph, `unchecked` says so: no mismatches then do not mean that nothing is wrong.
    Raises ShapecheckError if the file cannot be read, shows no residuals and no model is named, or if the model itself refuses
    a requested size.
    """
    progress(f"reading {file}")
    reading, notes = file.reading, []
    try:
        inside = contract_metadata.contract_inside(file)
    except ShapecheckError as error:
        if contract is None:
            raise ShapecheckError(f"{error}; name the model instead: --model MODEL") from None
        inside, notes = None, [f"the contract inside the file cannot be read: {error}"]
    roles, expected = assign_roles(reading), contract or inside
    if roles.is_controlnet and expected is None:
        raise ShapecheckError(
            f"{file} is a ControlNet ({len(reading.outputs)} outputs) and holds no contract; name the UNet that its outputs "
            "are for with --model, or check the model that it was exported from with --controlnet"
        )
    sweep = sweep_sizes(reading, roles, progress, contract=expected, requested=requested)
    if expected is not None:
        for geometry in sweep.requested:
            expected.require(geometry)
    basis: Basis = "given" if contract else "inside"
    if expected is None and not roles.pictures:
        expected, basis = _find_best_preset(roles, sweep), "preset"
    if expected is None:
        expected, basis = _make_own_contract(reading, roles, sweep), "none"
    case = Case(roles, sweep, expected, basis == "none", is_inside=inside is not None)
    matching = case.matching
    unchecked, other = _find_unchecked(reading, case), find_other_form(case)
    if other is not None:
        mismatches: tuple[Mismatch, ...] = (other,)
    else:
        mismatches = _check_outputs(reading, case) if roles.is_controlnet else find_faults(case)
        mismatches += sweep.find_faults()
    return FileCheck(
        str(file),
        reading.producer,
        expected,
        basis,
        roles.naming.key if roles.naming else "",
        tuple(DeclaredInput(tensor.name, str(tensor), tensor.dtype) for tensor in roles.base),
        _describe_slots(case, matching),
        sweep.limits,
        sweep.requested,
        mismatches,
        (
            *notes,
            *_write_notes(case, inside),
            *find_remarks(case),
            *_describe_symbols(matching, {mismatch.where for mismatch in mismatches}),
        ),
        tuple((slot.name, tensor.name) for slot, tensor in matching.pairs),
        unchecked,
        bool(roles.pictures),
        find_input_limits(case),
        f"{other.where}: {other.cause}" if other is not None else "",
    )


def _find_best_preset(roles: Roles, sweep: SizeSweep) -> Contract | None:
    """Return the preset with the fewest faults, or None if each has other inputs than the file or most of its slots wrong."""
    counts = {}
    for preset in presets.contracts().values():
        faults = find_faults(Case(roles, sweep, preset))
        slots = {slot.name for slot in preset.slots} | {tensor.name for tensor in roles.slots}
        kinds = {fault.kind for fault in faults if fault.where not in slots}
        most_are_wrong = 2 * len({fault.where for fault in faults} & slots) >= len(preset.slots)
        if not most_are_wrong and not kinds & {"channels", "input", "rank", "missing"}:
            counts[preset] = len(faults)
    return min(counts, key=lambda preset: counts[preset], default=None)


def _make_own_contract(reading: Reading, roles: Roles, sweep: SizeSweep) -> Contract:
    """Return the file's own table as a contract, which shows what is wrong with any UNet."""
    if not roles.slots and not roles.pictures:
        names = ", ".join(tensor.name for tensor in reading.inputs) or "none"
        raise ShapecheckError(
            f"{reading.path} takes no residuals (inputs: {names}) and fits no preset; "
            "name the UNet that it should be with --model, or export it with `shapecheck export`"
        )
    rules = sweep.rules(add.skip for tensor in roles.slots for add in tensor.adds)
    slots, inputs = [], []
    for number, tensor in enumerate(tensor for tensor in roles.slots if tensor.adds and tensor.adds[0].skip in rules):
        index = roles.naming.index(tensor.name) if roles.naming else number
        if index is not None:
            name, add = SHAPECHECK.mid if index == -1 else SHAPECHECK.down(index), tensor.adds[0]
            slots.append(Slot(name, rules[add.skip], "full", add.module, "", ()))
    for tensor in roles.base:
        axes = zip(tensor.dims or (), roles.symbols(tensor), strict=True)
        dims = [Dim(symbol) if symbol else Dim(None, size) if isinstance(size, int) else None for size, symbol in axes]
        shape = tuple(dim for dim in dims if dim is not None)
        if not tensor.live and not CONDITIONS & {*diffusers_names(tensor)}:
            continue  # nobody knows it, and it does nothing
        if tensor.dims and len(shape) == len(dims):  # its shape is known
            inputs.append(Input(diffusers_names(tensor)[0], shape, tensor.dtype, ""))
    return Contract("unknown", tuple(inputs), tuple(sorted(slots, key=lambda slot: slot.name)), Config())


def _check_outputs(reading: Reading, case: Case) -> tuple[Mismatch, ...]:
    """Return the faults of a ControlNet: its outputs, its sizes, and its inputs if the contract is a ControlNet's."""
    contract = case.contract
    faults = find_faults(case) if contract.role == "controlnet" else ()
    slots = [replace(slot, name=case.name_in_file(slot)) for slot in contract.slots]
    names = {tensor.name for tensor in reading.outputs}
    for geometry, run in _list_allowed_runs(case):
        shapes = {name: run.known[name] for name in names & run.known.keys()}
        # An output whose size could not be followed is there all the same.
        comparable = [slot for slot in slots if slot.name in shapes or slot.name not in names]
        if mismatches := compare_shapes(comparable, geometry, shapes):
            return (*faults, *mismatches)
    return faults


def _list_allowed_runs(case: Case) -> list[tuple[Geometry, Shapes]]:
    """Return the sizes that work and that the contract allows and tells the slots of, and what was seen there."""

    def is_known(geometry: Geometry) -> bool:
        try:
            return bool(case.contract.shapes(geometry)) or not case.contract.slots
        except (ValueError, ShapecheckError):  # a rounding that was never observed; a size that the model refuses
            return False

    return [(geometry, run) for geometry, run in case.sweep.working.items() if is_known(geometry)]


def _find_unchecked(reading: Reading, case: Case) -> str:
    """Return why the sizes were not checked; nothing if they were, or if it is a fault that none works."""
    runs = [run for _, run in _list_allowed_runs(case)]
    if not runs:
        return "it works at no size that was tried and that the contract allows" if case.sweep.working else ""
    if reading.image is None:
        return "it has no image among its outputs (batch, channels, height, width): only names and structure were checked"
    names = [reading.image.name, *(tensor.adds[0].skip for tensor in case.roles.added if tensor.adds)]
    if case.roles.is_controlnet:
        slots = {case.name_in_file(slot) for slot in case.contract.slots}
        names = [tensor.name for tensor in reading.outputs if tensor.name in slots]
    # at batch 1 a sum may have any size as far as onnx knows; at another one it is known
    if all(any(len(run.known.get(name, ())) == 4 for run in runs) for name in names):
        return ""
    through = ", ".join(reading.unknown) or "the graph"
    return f"sizes could not be followed through {through}: only names and structure were checked"


def _describe_slots(case: Case, matching: Matching) -> tuple[DeclaredSlot, ...]:
    slots = {tensor.name: slot.name for slot, tensor in matching.slots if tensor is not None}
    rules = case.sweep.rules(tensor.adds[0].skip for tensor in case.roles.added if tensor.adds)
    shapes = {skip: show(rule) for skip, rule in rules.items()}
    declared = []
    for tensor in case.roles.added:
        skip, producer = (shapes.get(tensor.adds[0].skip, "not seen"), tensor.adds[0].module) if tensor.adds else ("", "")
        declared.append(DeclaredSlot(tensor.name, str(tensor), skip, producer, slots.get(tensor.name, "")))
    return tuple(declared)


def _write_notes(case: Case, inside: Contract | None) -> list[str]:
    """Return what is not a fault and still worth knowing."""
    notes, naming = [], case.roles.naming
    if inside is not None and extract_architecture(inside) != extract_architecture(case.contract):
        notes.append(f"the contract inside the file is another one: {inside.header.source or inside.digest}")
    if case.roles.slots and naming is None:
        notes.append("the slots' names follow no known scheme: found by the sums they go into, numbered by their order")
    elif naming not in (None, SHAPECHECK):
        notes.append(f"the slots are named as by {naming.origin}")
    return notes


def _describe_symbols(matching: Matching, wrong: set[str]) -> Iterator[str]:
    """Describe names of sizes that tell a runtime less than they could, or the wrong thing, in inputs that are not wrong.

    They break nothing in ONNX Runtime, which compares no names; TensorRT does.
    """
    names: dict[str, list[str | None]] = defaultdict(list)
    meanings: dict[str, dict[str, str]] = defaultdict(dict)
    for expected, tensor in matching.pairs:
        if tensor.dims is None or tensor.name in wrong or len(tensor.dims) != len(expected.shape):
            continue
        for declared, dim in zip(tensor.dims, expected.shape, strict=True):
            if dim.symbol is not None and not isinstance(declared, int):
                names[str(dim)].append(declared)
                if declared is not None:
                    meanings[declared].setdefault(str(dim), tensor.name)
    if loose := [size for size, known in names.items() if len({*known}) > 1 or known.count(None) > 1]:
        texts = [f"`{name}`" if name else "unnamed" for name in dict.fromkeys(names[loose[0]])]
        shown = ", ".join(texts[:3]) + (", …" if len(texts) > 3 else "")
        yield (
            f"equal sizes have several names or none ({loose[0]} has {shown}; {format_count(len(loose), 'size')} in all): "
            "TensorRT ties sizes by equal names only, and would not refuse a residual of another size"
        )
    shared = {name: places for name, places in meanings.items() if len(places) > 1}
    if shared:
        name, places = next(iter(shared.items()))
        shown = ", ".join(f"{size} in {where}" for size, where in places.items())
        yield f"one name stands for several sizes (`{name}` is {shown}): TensorRT refuses inputs that differ there"
