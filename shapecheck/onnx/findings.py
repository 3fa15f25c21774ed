"""Faults of a graph that is compared with a contract, but those of sizes: one record for each, all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from shapecheck.contract import Contract, Dim, Input, Mismatch, Slot, show
from shapecheck.contract.mismatch import compare_shapes
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.contract.records import MismatchKind
from shapecheck.onnx.input_roles import Matching, Roles, diffusers_names, match_inputs
from shapecheck.onnx.reading import GraphTensor
from shapecheck.onnx.size_sweep import SizeSweep

_IGNORED = "its values change nothing, and no runtime says so"
_RENAME = "callers pass tensors by name; rename it, or pass it under this name"


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that the faults follow from."""

    roles: Roles
    sweep: SizeSweep
    contract: Contract
    itself: bool = False
    """The contract is the file's own table: what that leaves out is not a fault."""

    @property
    def matching(self) -> Matching:
        return match_inputs(self.roles, self.contract)

    def name_in_file(self, slot: Slot) -> str:
        """Return what the file's own naming scheme calls a slot."""
        index = SHAPECHECK.index(slot.name)
        if self.roles.naming is None or index is None:
            return slot.name
        return self.roles.naming.mid if index < 0 else self.roles.naming.down(index)


def find_faults(case: Case) -> tuple[Mismatch, ...]:
    """Return every fault: inputs first, then slots in their order, then what concerns the graph as a whole."""
    matching = case.matching
    faults = [fault for pair in matching.inputs for fault in _check_input(case, matching, *pair)]
    faults += _check_slots(case, matching)
    for tensor in matching.surplus:
        if not tensor.live:
            faults.append(Mismatch("unused", tensor.name, "no effect on the output", "an effect, or no input", cause=_IGNORED))
        elif not case.itself:
            cause = "callers that follow the contract do not pass it"
            faults.append(Mismatch("surplus", tensor.name, str(tensor), "no such input", cause=cause))
    return tuple(faults)


def _check_input(case: Case, matching: Matching, base: Input, tensor: GraphTensor | None) -> Iterator[Mismatch]:
    expected = show(base.shape)
    if tensor is None:
        is_image = base.name in ("sample", "controlnet_cond")
        cause = "" if is_image else "the graph computes with a constant in its place: every call gets the same conditioning"
        yield Mismatch("missing" if is_image else "baked", base.name, "no such input", expected, cause=cause)
        return
    name = tensor.name
    if name in matching.renamed:
        yield Mismatch("name", name, name, base.name, cause=f"recognised by its shape; {_RENAME}")
    if not tensor.live:
        yield Mismatch("unused", name, "no effect on the output", expected, cause=f"baked: {_IGNORED}")
    if tensor.is_float != ("float" in base.dtype):
        cause = "a fractional timestep is cut off" if base.name == "timestep" else ""
        yield Mismatch("dtype", name, tensor.dtype, base.dtype, cause=cause)
    if tensor.dims is None or len(diffusers_names(tensor)) > 1:
        return
    if len(tensor.dims) != len(base.shape):
        yield Mismatch("rank", name, str(tensor), expected)
        return
    numbers = [(dim, size) for dim, size in zip(base.shape, tensor.dims, strict=True) if isinstance(size, int)]
    if any(dim.symbol is None and size != dim.scale for dim, size in numbers):
        yield Mismatch("channels" if tensor.is_image else "input", name, str(tensor), expected)
    elif any(dim.symbol == "batch" and "batch" not in case.sweep.limits.fixed for dim, _ in numbers):
        yield Mismatch("input", name, str(tensor), expected, cause="its batch is fixed, and the sample's is not")


def _check_slots(case: Case, matching: Matching) -> Iterator[Mismatch]:
    places = _find_wrong_places(case, matching)
    for slot, tensor in matching.slots:
        module = slot.producer
        if tensor is None:
            name, cause = case.name_in_file(slot), "never exported, or dropped by the exporter because nothing used it"
            yield Mismatch("missing", name, "no such input", show(slot.shape), None, module, cause=cause)
            continue
        name = tensor.name
        if name in matching.renamed:
            cause = f"recognised by the sum it goes into; {_RENAME}"
            yield Mismatch("name", name, name, case.name_in_file(slot), None, module, cause=cause)
        wrong = _find_wrong_shape(case, slot, tensor)
        if wrong:
            yield Mismatch(wrong[0], name, str(tensor), show(slot.shape), None, module, cause=wrong[1])
        makers = [add.module or add.skip for add in tensor.adds]
        # The file's own table says where a slot is, not where it should be.
        expected = f"added to the output of {(not case.itself and module) or 'its own module'}"
        if not tensor.adds or not tensor.live:
            observed = "no effect on the output" if tensor.adds else "added to nothing"
            yield Mismatch("unused", name, observed, expected, None, module, cause=_IGNORED)
        elif len(makers) > 1:
            yield Mismatch("order", name, f"added to {', '.join(makers)}", "added once", None, module)
        elif name in places:
            observed, cause = f"added to the output of {makers[0]}", f"this is the place of {places[name]}"
            yield Mismatch("order", name, observed, expected, None, module, cause=cause)
        elif not wrong:
            yield from _check_skip(case, slot, tensor)


def _find_wrong_places(case: Case, matching: Matching) -> dict[str, str]:
    """Return the residuals that are added in another's place, with the name of that other.

    Each skip is computed from the one before it: their order in the graph is that of the slots, whatever the shapes. If
    names tell the modules that make the skips, a residual in the place of a missing one is seen too.
    """
    placed = [tensor for tensor in case.roles.slots if tensor.adds and case.roles.position(tensor) is not None]
    named = sorted(placed, key=lambda tensor: case.roles.position(tensor) or 0)
    pairs = zip(placed, named, strict=True)  # two that share a skip, as KOALA's last ones do, may change places
    places = {tensor.name: owner.name for tensor, owner in pairs if tensor.adds[0].rank != owner.adds[0].rank}
    owners = {slot.producer: case.name_in_file(slot) for slot, _ in reversed(matching.slots) if slot.producer}
    for slot, tensor in matching.slots:
        if tensor is not None and tensor.adds and tensor.name not in places:
            makers = [producer for producer in owners if f"{tensor.adds[0].module}.".startswith(f"{producer}.")]
            if makers and slot.producer not in makers:
                places[tensor.name] = owners[max(makers, key=len)]
    return places


def _find_wrong_shape(case: Case, slot: Slot, tensor: GraphTensor) -> tuple[MismatchKind, str] | None:
    """Return the kind of fault in the shape that the file declares for a residual, and its cause."""
    if tensor.dims is None:
        return None
    if len(tensor.dims) != 4:
        return "rank", ""
    if isinstance(tensor.dims[1], int) and tensor.dims[1] != slot.channels:
        return "channels", ""
    fixed, axes = case.sweep.limits.fixed, zip(tensor.dims, slot.shape, strict=True)
    wrong = [size for size, dim in axes if isinstance(size, int) and dim.symbol and size != _measure(dim, fixed)]
    if 1 in wrong:
        return "broadcast", "a residual of one cell is broadcast over the skip, and a whole one refused"
    return ("size", f"fixed at {wrong[0]}") if wrong else None


def _measure(dim: Dim, fixed: Mapping[str, int]) -> int | None:
    """Return the size of an axis, or None if the file leaves it open."""
    try:
        return dim.at(fixed)
    except (KeyError, ValueError):
        return None


def _check_skip(case: Case, slot: Slot, tensor: GraphTensor) -> Iterator[Mismatch]:
    """Compare a residual's skip, as measured, with the contract's, up to the first size at which they differ."""
    divisor, skips = case.contract.divisor, [replace(residual, spatial="full") for residual in case.contract.residuals]
    for geometry, shape in case.sweep.measured(tensor.adds[0].skip).items():
        if geometry.height % divisor == 0 and geometry.width % divisor == 0:
            try:
                shapes = {skip.name: skip.shape_at(geometry) for skip in skips}
            except ValueError:  # a rounding that was never observed
                continue
            for mismatch in compare_shapes(skips, geometry, shapes | {slot.name: shape}):
                yield replace(mismatch, where=tensor.name)
                return
