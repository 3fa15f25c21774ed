"""From traces to a contract: pure, and complete, so that every disagreement is reported at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from shapecheck.contract import Contract, Dim, Geometry, Mismatch, Shape, Slot
from shapecheck.contract.dims import BATCH, constant
from shapecheck.contract.mismatch import compare_shapes
from shapecheck.contract.records import Spatial
from shapecheck.observe import sizes
from shapecheck.observe.trace import Residual, Trace, name_slot

_Key = TypeVar("_Key", bound=Hashable)


def reconcile(
    traces: Sequence[Trace], slotless: Contract, *, at: Geometry | None = None
) -> tuple[Contract, tuple[Mismatch, ...]]:
    """Return the contract with the slots that the UNet showed, and every disagreement of the ControlNets and the adapter.

    `slotless` has all that is read rather than observed. `at` is the geometry to report disagreements at, if they show there.
    """
    control = [trace.only("control") for trace in traces]
    featured = [part for trace in traces if (part := trace.only("feature")).emitted or part.arrived or part.adds]
    slots, mismatches = _reconcile_group(control, slotless.divisor, at)
    features, feature_mismatches = _reconcile_group(featured, slotless.divisor, at)
    handover = tuple(dict.fromkeys((*_describe_handover(control), *_describe_handover(featured))))
    header = replace(slotless.header, handover=handover)
    return replace(slotless, slots=slots, features=features, header=header), (*mismatches, *feature_mismatches)


def _reconcile_group(
    traces: Sequence[Trace], divisor: int, at: Geometry | None
) -> tuple[tuple[Slot, ...], tuple[Mismatch, ...]]:
    """Return the slots of residuals, or of features, and every mismatch of what was emitted for them."""
    slots, mismatches = derive_slots(traces)
    spatials = {number: _find_spatial(traces, number) for number in _list_emitters(traces)}
    if set(spatials.values()) == {"pooled"}:
        slots = tuple(replace(slot, spatial="pooled") for slot in slots)
    # At a size that the UNet refuses the two models need not agree.
    accepted = [trace for trace in traces if _is_multiple(trace.geometry, divisor)]
    at = at if at is not None and _is_multiple(at, divisor) else None
    misused = [mismatch for trace in traces for mismatch in _list_misused(trace)]
    unclear = {mismatch.where for mismatch in (*mismatches, *misused)}
    for number, spatial in spatials.items():
        own_slots = tuple(replace(slot, spatial=spatial) for slot in slots)
        name = f"ControlNet {number + 1}" if len(spatials) > 1 else ""
        emitted = _compare_emitted(accepted, number, own_slots, at)
        mismatches += [replace(mismatch, controlnet=name) for mismatch in emitted if mismatch.where not in unclear]
    known = {mismatch.where for mismatch in mismatches}
    mismatches += [mismatch for mismatch in _compare_handover(accepted, slots) if mismatch.where not in known]
    return slots, tuple(mismatches)


def derive_slots(traces: Sequence[Trace]) -> tuple[tuple[Slot, ...], list[Mismatch]]:
    """Return the UNet's slots, and a mismatch for every skip whose sizes no chain of halvings explains.

    All adds in `traces` are of residuals, or all are of features.
    """
    # A run that ends early shows fewer slots; those that show all of them count.
    most = max((len({add.index for add in trace.adds}) for trace in traces), default=0)
    full = [trace for trace in traces if trace.adds and len({add.index for add in trace.adds}) == most]
    if not full:
        return (), []
    indices = sorted({add.index for add in full[0].adds}, key=_slot_order)
    firsts = {index: [next(add for add in trace.adds if add.index == index) for trace in full] for index in indices}
    rules = _derive_rules(full, {index: [add.skip for add in adds] for index, adds in firsts.items()})
    slots, mismatches = [], []
    for index, adds in firsts.items():
        name, producer = adds[0].name, adds[0].producer
        if index in rules:
            sites = tuple(add.site for add in full[0].adds if add.index == index)
            blocks = (add.up_block for trace in full for add in trace.adds if add.index == index and add.up_block)
            slots.append(Slot(name, rules[index], "full", producer, next(blocks, ""), sites))
        elif any(len(add.skip) != 4 for add in adds):
            cause = f"added at {adds[0].site} in a layout that is not understood"
            mismatches.append(Mismatch("rank", name, adds[0].skip, "batch×channels×height×width", cause=cause))
        else:
            seen = ", ".join(f"{trace.geometry}: {add.skip}" for trace, add in zip(full, adds, strict=True))
            mismatches.append(Mismatch("size", name, seen, "a chain of halvings", unet_module=producer))
    return tuple(slots), mismatches


def derive_emitted(traces: Sequence[Trace], controlnet: int) -> Mapping[str, tuple[Dim, ...]]:
    """Return slot → rule of what one ControlNet or adapter emits for it, without those that no rule explains."""
    emitting = [trace for trace in traces if _list_emitted(trace, controlnet)]
    shapes: dict[str, list[Shape]] = {}
    for trace in emitting:
        for residual in sorted(_list_emitted(trace, controlnet), key=lambda residual: _slot_order(residual.index)):
            shapes.setdefault(residual.name, []).append(residual.shape)
    complete = {name: seen for name, seen in shapes.items() if len(seen) == len(emitting)}
    return _derive_rules(emitting, complete, may_be_constant=True)


def _derive_rules(
    traces: Sequence[Trace], shapes: Mapping[_Key, Sequence[Shape]], *, may_be_constant: bool = False
) -> dict[_Key, tuple[Dim, ...]]:
    """Return the rules of tensors, each of which has one shape in every trace; without those that no rule explains."""
    flat = {key: seen for key, seen in shapes.items() if all(len(shape) == 4 for shape in seen)}
    rules = {key: [BATCH, constant(seen[0][1])] for key, seen in flat.items() if len({shape[1] for shape in seen}) == 1}
    for axis, symbol in ((2, "h"), (3, "w")):
        columns = {key: tuple(shape[axis] for shape in seen) for key, seen in flat.items()}
        known = sizes.derive_rules(symbol, tuple(trace.geometry.sizes[symbol] for trace in traces), columns.values())
        for key, rule in rules.items():
            if may_be_constant and len(set(columns[key])) == 1:
                rule.append(constant(columns[key][0]))
            elif columns[key] in known:
                rule.append(known[columns[key]])
    return {key: tuple(rule) for key, rule in rules.items() if len(rule) == 4}


def _describe_handover(traces: Sequence[Trace]) -> tuple[str, ...]:
    """Return in words what happens to residuals between the ControlNets and the UNet."""
    sentences = []
    for arrival in (arrival for trace in traces for arrival in trace.arrived):
        for step in arrival.via:
            if step == "sum":
                sentences.append(f"the residuals of {len({net for net, _ in arrival.sources})} ControlNets are summed")
            elif step == "zeros before it in the batch":
                sentences.append("guess mode: zeros stand before the residuals, for the unconditional half of the batch")
            else:
                sentences.append(f"on their way the residuals go through: {step}")
    emitters = _list_emitters(traces)
    if pooled := [number for number in emitters if _find_spatial(traces, number) == "pooled"]:
        owner = "" if len(pooled) == len(emitters) else f" of ControlNet {pooled[0] + 1}"
        sentences.append(f"pooled: every residual{owner} is 1×1 and is broadcast over its slot")
    return tuple(sentences)


def _compare_emitted(traces: Sequence[Trace], controlnet: int, slots: tuple[Slot, ...], at: Geometry | None) -> list[Mismatch]:
    """Compare what one ControlNet emits with the slots: one mismatch a slot, at the requested geometry if it shows there."""
    makers = {residual.name: residual.module for trace in traces for residual in _list_emitted(trace, controlnet)}
    mismatches: list[Mismatch] = []
    if at is not None and makers and makers.keys() <= (rules := derive_emitted(traces, controlnet)).keys():
        # A rule may not say what it gives at a size that was not observed.
        with suppress(ValueError):
            mismatches += compare_shapes(slots, at, {name: at.shape_of(rule) for name, rule in rules.items()}, makers=makers)
    for trace in traces:
        if residuals := _list_emitted(trace, controlnet):
            # A batch of its own, as in guess mode, is the hand-over's business.
            geometry = replace(trace.geometry, batch=residuals[0].shape[0])
            shapes = {residual.name: residual.shape for residual in residuals}
            mismatches += compare_shapes(slots, geometry, shapes, makers=makers)
    order = {slot.name: position for position, slot in enumerate(slots)}
    return sorted(_keep_first(mismatches), key=lambda mismatch: order.get(mismatch.where, len(order)))


def _compare_handover(traces: Sequence[Trace], slots: tuple[Slot, ...]) -> list[Mismatch]:
    """Return what went wrong on the way to the UNet: residuals of another shape or dtype than is added, lost, exchanged."""
    mismatches: list[Mismatch] = []
    for trace in traces:
        mismatches += _list_misused(trace)
        if trace.arrived:
            mismatches += compare_shapes(slots, trace.geometry, {arrival.name: arrival.shape for arrival in trace.arrived})
        mismatches += _compare_sources(trace)
        # Residuals of another dtype than the skip are promoted in silence, or refused by the next layer.
        adds = {add.name: add for add in trace.adds}
        dtypes = {residual.name: residual.dtype for residual in trace.emitted}
        for name, dtype in (dtypes | {arrival.name: arrival.dtype for arrival in trace.arrived}).items():
            add = adds.get(name)
            if add is not None and dtype != add.dtypes[0]:
                cause = "PyTorch promotes the sum, in silence or until the next layer refuses it"
                mismatches.append(Mismatch("dtype", name, dtype, add.dtypes[0], trace.geometry, add.producer, cause=cause))
    return _keep_first(mismatches)


def _list_misused(trace: Trace) -> list[Mismatch]:
    """Return the residuals that the UNet only used in something else than an addition: of these no verdict is possible."""
    added = {add.name for add in trace.adds}
    cause = "taken by an operation that is not understood"
    return [
        Mismatch("unused", name, operation, "an addition", trace.geometry, cause=cause)
        for name, operation in trace.misunderstood
        if name not in added
    ]


def _compare_sources(trace: Trace) -> list[Mismatch]:
    """Return the residuals that arrive in another's place, that are made of nothing that was emitted, or that never arrive."""
    mismatches: list[Mismatch] = []
    for arrival in trace.arrived if trace.emitted else ():
        name = arrival.name
        if wrong := sorted({index for _, index in arrival.sources} - {arrival.index}, key=_slot_order):
            actual = " and ".join(name_slot(index, arrival.group) for index in wrong)
            cause = "residuals were reordered between the ControlNet and the UNet"
            mismatches.append(Mismatch("order", name, actual, name, trace.geometry, cause=cause))
        elif not arrival.sources:
            expected, cause = "the ControlNet's residual", "what arrived was not made from anything the ControlNet emitted"
            mismatches.append(Mismatch("unused", name, arrival.shape, expected, trace.geometry, cause=cause))
    # If nothing arrived and the UNet refused, or was run alone to see what it adds, nothing was lost.
    if trace.arrived or not (trace.adds or trace.refused):
        reached = {source for arrival in trace.arrived for source in arrival.sources}
        cause = "the ControlNet emitted it and it never reached the UNet"
        mismatches += [
            Mismatch("unused", residual.name, "dropped", residual.shape, trace.geometry, "", residual.module, cause)
            for residual in trace.emitted
            if (residual.controlnet, residual.index) not in reached
        ]
    return mismatches


def _keep_first(mismatches: Iterable[Mismatch]) -> list[Mismatch]:
    """Return the first mismatch of each slot."""
    first: dict[str, Mismatch] = {}
    for mismatch in mismatches:
        first.setdefault(mismatch.where, mismatch)
    return list(first.values())


def _list_emitters(traces: Sequence[Trace]) -> list[int]:
    return sorted({residual.controlnet for trace in traces for residual in trace.emitted})


def _list_emitted(trace: Trace, controlnet: int) -> list[Residual]:
    return [residual for residual in trace.emitted if residual.controlnet == controlnet]


def _find_spatial(traces: Sequence[Trace], controlnet: int) -> Spatial:
    residuals = [residual for trace in traces for residual in _list_emitted(trace, controlnet)]
    return "pooled" if all(residual.shape[2:] == (1, 1) for residual in residuals) else "full"


def _is_multiple(geometry: Geometry, divisor: int) -> bool:
    return geometry.height % divisor == 0 and geometry.width % divisor == 0


def _slot_order(index: int) -> tuple[bool, int]:
    """Sort down slots by number and the mid slot last."""
    return index < 0, index
