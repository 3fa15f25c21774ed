"""From traces to a contract: pure, and complete, so that every disagreement is told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shapecheck.contract import (
    Add,
    Config,
    Contract,
    Dim,
    Geometry,
    Header,
    Input,
    Mismatch,
    Residual,
    Shape,
    Slot,
    Trace,
)
from shapecheck.contract.compare import compare
from shapecheck.contract.dims import BATCH, constant
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.contract.records import Spatial
from shapecheck.observe.sizes import Sizes, rules


@dataclass(frozen=True, slots=True)
class Subject:
    """What the traces are of: the part of a contract that is read rather than observed."""

    unet: str
    inputs: tuple[Input, ...]
    config: Config
    divisor: int
    header: Header


def reconcile(
    traces: Sequence[Trace], subject: Subject, *, at: Geometry | None = None
) -> tuple[Contract, tuple[Mismatch, ...]]:
    """The contract the UNet's side gives, and every disagreement of the ControlNets' side with it.

    `at` is the geometry at which disagreements are told, where they show there.
    """
    slots, found = slot_table(traces)
    numbers = sorted({residual.controlnet for trace in traces for residual in trace.emitted})
    spatials = {number: _spatial(traces, number) for number in numbers}
    if numbers and set(spatials.values()) == {"pooled"}:
        slots = tuple(replace(slot, spatial="pooled") for slot in slots)
    accepted = [trace for trace in traces if _is_accepted(trace.geometry, subject.divisor)]
    at = at if at is not None and _is_accepted(at, subject.divisor) else None
    for number in numbers:
        own = tuple(replace(slot, spatial=spatials[number]) for slot in slots)
        found += _emitted_mismatches(accepted, number, own, at)
    known = {mismatch.where for mismatch in found}
    found += [mismatch for mismatch in _handover_mismatches(traces, slots) if mismatch.where not in known]
    header = replace(subject.header, handover=handover(traces))
    return Contract(subject.unet, subject.inputs, slots, subject.config, subject.divisor, header), tuple(found)


def slot_table(traces: Sequence[Trace]) -> tuple[tuple[Slot, ...], list[Mismatch]]:
    """The UNet's slots, from the adds of every trace; and the skips whose sizes no chain of halvings explains."""
    full = [trace for trace in traces if trace.adds]
    if not full:
        return (), []
    most = max(len({add.index for add in trace.adds}) for trace in full)
    full = [trace for trace in full if len({add.index for add in trace.adds}) == most]
    indices = sorted({add.index for add in full[0].adds}, key=_slot_order)
    skips = {index: [_add(trace, index).skip for trace in full] for index in indices}
    heights = _axis_rules("h", [trace.geometry.height for trace in full], skips, 2)
    widths = _axis_rules("w", [trace.geometry.width for trace in full], skips, 3)
    slots, found = [], []
    for index, shapes in skips.items():
        height, width = (known.get(tuple(shape[axis] for shape in shapes)) for known, axis in ((heights, 2), (widths, 3)))
        if height is None or width is None or len({shape[1] for shape in shapes}) != 1:
            seen = ", ".join(f"{trace.geometry}: {shape}" for trace, shape in zip(full, shapes, strict=True))
            found.append(Mismatch("size", _name(index), seen, "a chain of halvings", unet_module=_add(full[0], index).producer))
        else:
            slots.append(_slot(full, index, (BATCH, constant(shapes[0][1]), height, width)))
    return tuple(slots), found


def handover(traces: Sequence[Trace]) -> tuple[str, ...]:
    """What was seen to happen to residuals between the ControlNets and the UNet, in words, each once."""
    told: dict[str, None] = {}
    for trace in traces:
        batch = max((residual.shape[0] for residual in trace.emitted), default=0)
        for arrival in trace.arrived:
            if "cat" in arrival.via and arrival.shape[0] == 2 * batch:
                told["classifier-free guidance: zeros stand in for the unconditional half of the batch (guess mode)"] = None
            if "sum" in arrival.via:
                told[f"the residuals of {len({net for net, _ in arrival.sources})} ControlNets are summed"] = None
        if trace.emitted and all(residual.shape[2:] == (1, 1) for residual in trace.emitted):
            told["pooled: every residual is 1×1 and is broadcast over its slot"] = None
    return tuple(told)


def emitted_table(traces: Sequence[Trace], controlnet: int) -> Mapping[int, tuple[Dim, ...]]:
    """Index → shape of what one ControlNet emits, as rules; without those whose sizes no rule explains."""
    seen = [trace for trace in traces if _of(trace, controlnet)]
    shapes: dict[int, list[Shape]] = {}
    for trace in seen:
        for residual in _of(trace, controlnet):
            shapes.setdefault(residual.index, []).append(residual.shape)
    whole = {index: each for index, each in shapes.items() if len(each) == len(seen) and all(len(shape) == 4 for shape in each)}
    heights = _axis_rules("h", [trace.geometry.height for trace in seen], whole, 2)
    widths = _axis_rules("w", [trace.geometry.width for trace in seen], whole, 3)
    table = {}
    for index in sorted(whole, key=_slot_order):
        height, width = _rule(heights, whole[index], 2), _rule(widths, whole[index], 3)
        if height is not None and width is not None:
            table[index] = (BATCH, constant(whole[index][0][1]), height, width)
    return table


def _rule(known: Mapping[Sizes, Dim], shapes: list[Shape], axis: int) -> Dim | None:
    sizes = tuple(shape[axis] for shape in shapes)
    return constant(sizes[0]) if len(set(sizes)) == 1 else known.get(sizes)


def _axis_rules(symbol: str, given: list[int], shapes: Mapping[int, list[Shape]], axis: int) -> Mapping[Sizes, Dim]:
    return rules(symbol, tuple(given), (tuple(shape[axis] for shape in each) for each in shapes.values()))


def _slot(traces: Sequence[Trace], index: int, skip: tuple[Dim, ...]) -> Slot:
    adds = [add for add in traces[0].adds if add.index == index]
    consumers = (add.up_block for trace in traces for add in trace.adds if add.index == index)  # a refused run sees few
    return Slot(
        _name(index), skip, "full", adds[0].producer, next(filter(None, consumers), ""), tuple(add.site for add in adds)
    )


def _add(trace: Trace, index: int) -> Add:
    return next(add for add in trace.adds if add.index == index)


def _of(trace: Trace, controlnet: int) -> list[Residual]:
    return [residual for residual in trace.emitted if residual.controlnet == controlnet]


def _spatial(traces: Sequence[Trace], controlnet: int) -> Spatial:
    shapes = [residual.shape for trace in traces for residual in _of(trace, controlnet)]
    return "pooled" if all(shape[2:] == (1, 1) for shape in shapes) else "full"


def _emitted_mismatches(
    traces: Sequence[Trace], controlnet: int, slots: tuple[Slot, ...], at: Geometry | None
) -> list[Mismatch]:
    """One ControlNet against the slots: each slot once, at the wanted geometry where the fault shows there."""
    makers = {_name(residual.index): residual.module for trace in traces for residual in _of(trace, controlnet)}
    if len({residual.controlnet for trace in traces for residual in trace.emitted}) > 1:
        makers = {name: f"{controlnet + 1} {module}" for name, module in makers.items()}
    first: dict[str, Mismatch] = {}
    if at is not None and (given := _emitted_at(traces, controlnet, at)):
        _keep_first(first, compare(slots, at, given, makers=makers))
    for trace in traces:
        if residuals := _of(trace, controlnet):
            # a batch of its own, as in guess mode, is the hand-over's business
            geometry = replace(trace.geometry, batch=residuals[0].shape[0])
            _keep_first(first, compare(slots, geometry, {_name(each.index): each.shape for each in residuals}, makers=makers))
    order = {slot.name: position for position, slot in enumerate(slots)}
    return sorted(first.values(), key=lambda mismatch: order.get(mismatch.where, len(order)))


def _emitted_at(traces: Sequence[Trace], controlnet: int, at: Geometry) -> dict[str, Shape]:
    """What the ControlNet emits at a geometry that was not observed; empty where its rules do not say."""
    table = emitted_table(traces, controlnet)
    if any(residual.index not in table for trace in traces for residual in _of(trace, controlnet)):
        return {}
    try:
        return {_name(index): tuple(dim.at(at.sizes) for dim in shape) for index, shape in table.items()}
    except ValueError:
        return {}


def _handover_mismatches(traces: Sequence[Trace], slots: tuple[Slot, ...]) -> list[Mismatch]:
    """What went wrong between the two ends: residuals lost, exchanged, of another shape or dtype than they left with."""
    first: dict[str, Mismatch] = {}
    for trace in traces:
        _keep_first(first, _lost_or_exchanged(trace))
        _keep_first(first, _promoted(trace))
        if trace.arrived and not trace.refused:
            _keep_first(first, compare(slots, trace.geometry, {_name(each.index): each.shape for each in trace.arrived}))
    return list(first.values())


def _lost_or_exchanged(trace: Trace) -> list[Mismatch]:
    found = []
    reached = {source for arrival in trace.arrived for source in arrival.sources}
    for arrival in trace.arrived:
        if wrong := sorted({index for _, index in arrival.sources} - {arrival.index}, key=_slot_order):
            got = " and ".join(map(_name, wrong))
            cause = "residuals were reordered between the ControlNet and the UNet"
            found.append(Mismatch("order", _name(arrival.index), got, _name(arrival.index), trace.geometry, cause=cause))
    alone = not trace.arrived and (trace.adds or trace.refused)
    if reached or not trace.arrived:
        for residual in trace.emitted:
            if (residual.controlnet, residual.index) not in reached and not alone:
                name = _name(residual.index)
                cause = "the ControlNet emitted it and it never reached the UNet"
                found.append(Mismatch("unused", name, "dropped", residual.shape, trace.geometry, "", residual.module, cause))
    return found


def _promoted(trace: Trace) -> list[Mismatch]:
    return [
        Mismatch(
            "dtype",
            _name(add.index),
            add.dtypes[1],
            add.dtypes[0],
            trace.geometry,
            add.producer,
            cause="PyTorch promotes in silence",
        )
        for add in trace.adds
        if trace.arrived and add.dtypes[0] != add.dtypes[1]
    ]


def _keep_first(first: dict[str, Mismatch], found: Sequence[Mismatch]) -> None:
    for mismatch in found:
        first.setdefault(mismatch.where, mismatch)


def _is_accepted(geometry: Geometry, divisor: int) -> bool:
    """Whether the UNet takes this size: what two models do at others is no disagreement."""
    return geometry.height % divisor == 0 and geometry.width % divisor == 0


def _name(index: int) -> str:
    return SHAPECHECK.mid if index < 0 else SHAPECHECK.down(index)


def _slot_order(index: int) -> tuple[bool, int]:
    """Down slots by number, the mid slot last."""
    return index < 0, index
