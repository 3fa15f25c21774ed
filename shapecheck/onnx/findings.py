"""Faults of a graph that is compared with a contract, but those of sizes: one record for each, all of them at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from shapecheck.contract import Contract, Dim, Input, Mismatch, Slot, show
from shapecheck.contract.mismatch import compare_shapes
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.contract.records import MismatchKind
from shapecheck.onnx.foreign_inputs import TIMESTEP, describe_timestep, is_timestep, measure_joined
from shapecheck.onnx.input_roles import CONDITIONS, STRENGTH, Matching, Roles, diffusers_names, match_inputs, name_outputs
from shapecheck.onnx.reading import GraphTensor
from shapecheck.onnx.size_sweep import SizeSweep
from shapecheck.report.numbers import list_some

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
    is_inside: bool = False
    """The file holds a contract, so that its names are claims."""

    @property
    def matching(self) -> Matching:
        return match_inputs(self.roles, self.contract)

    def name_in_file(self, slot: Slot) -> str:
        """Return what the file calls a slot: by its naming scheme, or by the order of a ControlNet's outputs."""
        if self.roles.is_controlnet and self.roles.naming is None:
            return name_outputs(self.roles, self.contract).get(slot.name, slot.name)
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
        if tensor in matching.unused and tensor in case.roles.base and not CONDITIONS & {*diffusers_names(tensor)}:
            continue  # a remark
        if not tensor.live:
            faults.append(Mismatch("unused", tensor.name, "no effect on the output", "an effect, or no input", cause=_IGNORED))
        elif not case.itself and not case.roles.pictures:
            cause = "callers that follow the contract do not pass it"
            faults.append(Mismatch("surplus", tensor.name, str(tensor), "no such input", cause=cause))
    return tuple(faults)


def _check_input(case: Case, matching: Matching, base: Input, tensor: GraphTensor | None) -> Iterator[Mismatch]:
    expected = show(base.shape)
    if tensor is None:
        if base.name == STRENGTH:
            return  # a strength that is baked in is a remark: the residuals are right
        is_image = base.name in ("sample", "controlnet_cond")
        cause = "" if is_image else "the graph computes with a constant in its place: every call gets the same conditioning"
        yield Mismatch("missing" if is_image else "baked", base.name, "no such input", expected, cause=cause)
        return
    name, joined = tensor.name, matching.list_joined(tensor)
    if base.name in joined[1:]:
        return  # told of the first
    if name in matching.renamed and case.is_inside:
        yield Mismatch("name", name, name, base.name, cause=f"recognised by its shape; {_RENAME}")
    if not tensor.live:
        yield Mismatch("unused", name, "no effect on the output", expected, cause=f"baked: {_IGNORED}")
    if base.name == TIMESTEP and is_timestep(tensor) and not case.is_inside:
        return  # whole numbers, or one for all rows, are a limit
    if tensor.is_float != ("float" in base.dtype):
        cause = "a fractional timestep is cut off" if base.name == TIMESTEP else ""
        yield Mismatch("dtype", name, tensor.dtype, base.dtype, cause=cause)
    if joined:
        yield from _check_joined(case, joined, tensor)
    elif tensor.dims is not None:
        yield from _check_dims(case, base, tensor, tensor.dims)


def _check_joined(case: Case, names: tuple[str, ...], tensor: GraphTensor) -> Iterator[Mismatch]:
    widths = measure_joined(case.contract).values()
    end = (tensor.dims or (None, None))[1:]
    if len(end) != 1 or (isinstance(end[0], int) and end[0] not in widths):
        either = " or ".join(f"batch×{width}" for width in widths) or "an input each"
        yield Mismatch("input", tensor.name, str(tensor), either, cause=f"it stands for {' and '.join(names)}")


def _check_dims(case: Case, base: Input, tensor: GraphTensor, dims: tuple[int | str | None, ...]) -> Iterator[Mismatch]:
    name, expected = tensor.name, show(base.shape)
    if len(dims) != len(base.shape):
        yield Mismatch("rank", name, str(tensor), expected)
        return
    numbers = [(dim, size) for dim, size in zip(base.shape, dims, strict=True) if isinstance(size, int)]
    if any(dim.symbol is None and size != dim.scale for dim, size in numbers):
        yield Mismatch("channels" if tensor.is_image else "input", name, str(tensor), expected)
    elif any(dim.symbol == "batch" and "batch" not in case.sweep.limits.fixed for dim, _ in numbers):
        yield Mismatch("input", name, str(tensor), expected, cause="its batch is fixed, and the sample's is not")


def find_input_limits(case: Case) -> tuple[str, ...]:
    """Return in what the inputs are narrower than the model's, sizes apart."""
    batch = case.sweep.limits.fixed.get("batch")
    pairs = [(base, tensor) for base, tensor in case.matching.inputs if base.name == TIMESTEP and tensor is not None]
    own = "float32" if case.itself else ""  # a file's own table says what it takes, not what its model does
    return tuple(
        limit for base, tensor in pairs for limit in describe_timestep(tensor, own or base.dtype, batch, tensor.taken_as)
    )


def _check_slots(case: Case, matching: Matching) -> Iterator[Mismatch]:
    places = _find_wrong_places(case, matching)
    for slot, tensor in () if case.roles.pictures else matching.slots:  # a graph that makes its residuals takes none
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
        yield from _check_sum(case, slot, tensor, places.get(name, ""), is_comparable=not wrong)


def _check_sum(case: Case, slot: Slot, tensor: GraphTensor, owner: str, *, is_comparable: bool) -> Iterator[Mismatch]:
    """Find what is wrong with where a residual is added; `owner` is the slot whose place that is, if it is another's."""
    name, module = tensor.name, slot.producer
    makers = [add.module or add.skip for add in tensor.adds]
    # The file's own table says where a slot is, not where it should be.
    expected = f"added to the output of {(not case.itself and module) or 'its own module'}"
    if not tensor.live:
        observed = "no effect on the output" if tensor.adds else "added to nothing"
        yield Mismatch("unused", name, observed, expected, None, module, cause=_IGNORED)
    elif not tensor.adds:
        return  # an optimiser wrote the sum in a way of its own, or it is none: values decide
    elif tensor.adds[0].factor < 0:
        yield Mismatch("values", name, "subtracted from its skip", "added to it", None, module)
    elif len(makers) > 1:
        yield Mismatch("order", name, f"added to {', '.join(makers)}", "added once", None, module)
    elif owner:
        observed, cause = f"added to the output of {makers[0]}", f"this is the place of {owner}"
        yield Mismatch("order", name, observed, expected, None, module, cause=cause)
    elif is_comparable:
        yield from _check_skip(case, slot, tensor)


def _find_wrong_places(case: Case, matching: Matching) -> dict[str, str]:
    """Return the residuals that are added in another's place, with the name of that other.

    Each skip is computed from the one before it, which is the order of the slots, whatever the shapes. Of a skip that an
    optimiser computes twice the graph need not show it: that is no fault. If names tell the modules that make the skips, a
    residual in the place of a missing one is seen too.
    """
    placed = [tensor for tensor in case.roles.slots if tensor.adds and case.roles.position(tensor) is not None]
    named = sorted(placed, key=lambda tensor: case.roles.position(tensor) or 0)
    # Two that share a skip, as KOALA's last ones do, may change places, and so may those of which no order is shown.
    pairs = zip(sorted(named, key=lambda tensor: tensor.adds[0].depth), named, strict=True)
    places = {tensor.name: owner.name for tensor, owner in pairs if tensor.adds[0].depth != owner.adds[0].depth}
    owners = {slot.producer: case.name_in_file(slot) for slot, _ in reversed(matching.slots) if slot.producer}
    for slot, tensor in matching.slots:
        if tensor is not None and tensor.adds and tensor.name not in places:
            makers = [producer for producer in owners if f"{tensor.adds[0].module}.".startswith(f"{producer}.")]
            if makers and slot.producer not in makers:
                places[tensor.name] = owners[max(makers, key=len)]
    return places


def find_remarks(case: Case) -> Iterator[str]:
    """Yield what is no fault in a file of others and that who runs it has to know."""
    roles, matching = case.roles, case.matching
    if roles.pictures:
        names = ", ".join(
            tensor.name for tensor in (*roles.pictures, *(tensor for tensor in matching.surplus if not tensor.dims))
        )
        yield f"the residuals are made inside: the graph holds a ControlNet ({names}), so that none can be exchanged"
    if roles.is_controlnet and roles.naming is None:
        yield "the outputs' names follow no known scheme: taken in their order, which their shapes confirm or not"
    if not case.is_inside:
        renamed = {
            tensor.name: " and ".join(matching.list_joined(tensor)) or base.name
            for base, tensor in matching.inputs
            if tensor and tensor.name in matching.renamed
        }
        if renamed:
            yield "recognised by their shapes: " + ", ".join(f"{name} is {ours}" for name, ours in renamed.items())
    if idle := [tensor.name for tensor in matching.unused]:
        yield f"{', '.join(idle)}: without effect, and no input of the model; whoever calls it has to give it all the same"
    yield from _describe_strengths(case)
    changed = [tensor for tensor in roles.slots if tensor.live and not tensor.adds and tensor.obstacles]
    if changed:
        operators = ", ".join(dict.fromkeys(name for tensor in changed for name in tensor.obstacles))
        names = list_some([tensor.name for tensor in changed])
        yield (
            f"{names} {'go' if len(changed) > 1 else 'goes'} through {operators} before any sum is seen: how much is added, in "
            "which rows and where is not known here; `shapecheck parity` decides by values"
        )
    hidden = [tensor.name for tensor in roles.slots if tensor.live and not tensor.adds and not tensor.obstacles]
    seen = [tensor for tensor in roles.slots if tensor.adds]
    for tensor, following in pairwise(seen):
        if tensor.adds[0].depth == following.adds[0].depth and tensor.adds[0].rank != following.adds[0].rank:
            hidden += [tensor.name, following.name]
    if hidden:
        yield (
            f"the graph does not show where {', '.join(dict.fromkeys(hidden))} belong, as after an optimiser: their order is "
            "unknown here, and `shapecheck parity` decides it by values"
        )


def _describe_strengths(case: Case) -> Iterator[str]:
    """Describe strengths that are constants of the graph."""
    roles = case.roles
    if roles.is_controlnet:
        numbers = [tensor for tensor in roles.base if tensor.is_float and tensor.dims in ((), (1,)) and tensor.live]
        if all("timestep" in diffusers_names(tensor) for tensor in numbers) or roles.strength not in (None, 1.0):
            value = "" if roles.strength is None else f" as {roles.strength:.3g}"
            yield f"the strength (conditioning_scale) is baked in{value}: scale the residuals after it"
        return
    factors = {tensor.name: tensor.adds[0].factor for tensor in roles.slots if tensor.adds}
    baked = {name: factor for name, factor in factors.items() if factor > 0 and not math.isclose(factor, 1, rel_tol=1e-6)}
    if baked and roles.strength is not None:
        yield f"a strength of {roles.strength:.3g} is baked in: every residual is multiplied by it before it is added"
    elif baked:
        each = ", ".join(f"{name} by {factor:g}" for name, factor in baked.items())
        yield f"strengths are baked in: {each} before they are added"


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
