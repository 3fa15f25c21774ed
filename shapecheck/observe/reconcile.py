"""From traces to a contract: pure, and complete, so that every disagreement is told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shapecheck.contract import Config, Contract, Dim, Geometry, Header, Input, Mismatch, Shape, Slot
from shapecheck.contract.dims import BATCH, constant
from shapecheck.contract.mismatch import compare_shapes
from shapecheck.contract.records import Spatial
from shapecheck.observe.sizes import Sizes, derive_rules
from shapecheck.observe.trace import Add, Residual, Trace, name_slot


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
    """The contract the UNet's side gives, and every disagreement of the ControlNets' and the adapter's side with it.

    `at` is the geometry at which disagreements are told, where they show there.
    """
    control = [trace.only("control") for trace in traces]
    slots, found = _reconciled(control, subject, at)
    featured = [seen for trace in traces if (seen := trace.only("feature")).emitted or seen.arrived or seen.adds]
    features, wrong = _reconciled(featured, subject, at)
    header = replace(subject.header, handover=tuple(dict.fromkeys((*describe_handover(control), *describe_handover(featured)))))
    contract = Contract(subject.unet, subject.inputs, slots, subject.config, subject.divisor, header, features=features)
    return contract, (*found, *wrong)


def _reconciled(
    traces: Sequence[Trace], subject: Subject, at: Geometry | None
) -> tuple[tuple[Slot, ...], tuple[Mismatch, ...]]:
    """The slots of one group, and what is wrong with what was emitted for them. `traces` are those of that group only."""
    slots, found = derive_slots(traces)
    numbers = sorted({residual.controlnet for trace in traces for residual in trace.emitted})
    spatials = {number: _spatial(traces, number) for number in numbers}
    if numbers and set(spatials.values()) == {"pooled"}:
        slots = tuple(replace(slot, spatial="pooled") for slot in slots)
    accepted = [trace for trace in traces if _is_accepted(trace.geometry, subject.divisor)]
    at = at if at is not None and _is_accepted(at, subject.divisor) else None
    unclear = {mismatch.where for mismatch in found} | {
        mismatch.where for trace in traces for mismatch in _not_understood(trace)
    }
    for number in numbers:
        own = tuple(replace(slot, spatial=spatials[number]) for slot in slots)
        told = [each for each in _emitted_mismatches(accepted, number, own, at) if each.where not in unclear]
        found += [replace(each, controlnet=f"ControlNet {number + 1}") for each in told] if len(numbers) > 1 else told
    known = {mismatch.where for mismatch in found}
    found += [mismatch for mismatch in _handover_mismatches(accepted, slots) if mismatch.where not in known]
    return slots, tuple(found)


def derive_slots(traces: Sequence[Trace]) -> tuple[tuple[Slot, ...], list[Mismatch]]:
    """The UNet's slots, from the adds of every trace; and the skips whose sizes no chain of halvings explains.

    All adds are of residuals, or all are of features.
    """
    full = [trace for trace in traces if trace.adds]
    if not full:
        return (), []
    most = max(len({add.index for add in trace.adds}) for trace in full)
    full = [trace for trace in full if len({add.index for add in trace.adds}) == most]
    indices = sorted({add.index for add in full[0].adds}, key=_slot_order)
    skips = {index: [_add(trace, index).skip for trace in full] for index in indices}
    laid_out = {index: shapes for index, shapes in skips.items() if all(len(shape) == 4 for shape in shapes)}
    heights = _axis_rules("h", [trace.geometry.height for trace in full], laid_out, 2)
    widths = _axis_rules("w", [trace.geometry.width for trace in full], laid_out, 3)
    slots, found = [], []
    for index, shapes in skips.items():
        if index not in laid_out:
            cause = f"added at {_add(full[0], index).site} in a layout that is not understood"
            found.append(Mismatch("rank", _add(full[0], index).name, shapes[0], "batch×channels×height×width", cause=cause))
            continue
        height, width = (known.get(tuple(shape[axis] for shape in shapes)) for known, axis in ((heights, 2), (widths, 3)))
        if height is None or width is None or len({shape[1] for shape in shapes}) != 1:
            seen = ", ".join(f"{trace.geometry}: {shape}" for trace, shape in zip(full, shapes, strict=True))
            found.append(
                Mismatch(
                    "size", _add(full[0], index).name, seen, "a chain of halvings", unet_module=_add(full[0], index).producer
                )
            )
        else:
            slots.append(_slot(full, index, (BATCH, constant(shapes[0][1]), height, width)))
    return tuple(slots), found


def describe_handover(traces: Sequence[Trace]) -> tuple[str, ...]:
    """What was seen to happen to residuals between the ControlNets and the UNet, in words, each once."""
    told: dict[str, None] = {}
    for trace in traces:
        for arrival in trace.arrived:
            for step in arrival.via:
                told[_step_in_words(step, len({net for net, _ in arrival.sources}))] = None
    numbers = sorted({residual.controlnet for trace in traces for residual in trace.emitted})
    pooled = [number for number in numbers if _spatial(traces, number) == "pooled"]
    if pooled:
        who = "every residual" if len(pooled) == len(numbers) else f"every residual of ControlNet {pooled[0] + 1}"
        told[f"pooled: {who} is 1×1 and is broadcast over its slot"] = None
    return tuple(told)


def _step_in_words(step: str, nets: int) -> str:
    if step == "sum":
        return f"the residuals of {nets} ControlNets are summed"
    if step == "zeros before it in the batch":
        return "guess mode: zeros stand before the residuals, for the unconditional half of the batch"
    return f"on their way the residuals go through: {step}"


def derive_emitted(traces: Sequence[Trace], controlnet: int) -> Mapping[str, tuple[Dim, ...]]:
    """Slot → shape of what one ControlNet or adapter emits, as rules; without those whose sizes no rule explains."""
    seen = [trace for trace in traces if _of(trace, controlnet)]
    shapes: dict[str, list[Shape]] = {}
    for trace in seen:
        for residual in sorted(_of(trace, controlnet), key=lambda each: _slot_order(each.index)):
            shapes.setdefault(residual.name, []).append(residual.shape)
    whole = {name: each for name, each in shapes.items() if len(each) == len(seen) and all(len(shape) == 4 for shape in each)}
    heights = _axis_rules("h", [trace.geometry.height for trace in seen], whole, 2)
    widths = _axis_rules("w", [trace.geometry.width for trace in seen], whole, 3)
    table = {}
    for name, each in whole.items():
        height, width = _rule(heights, each, 2), _rule(widths, each, 3)
        if height is not None and width is not None:
            table[name] = (BATCH, constant(each[0][1]), height, width)
    return table


def _rule(known: Mapping[Sizes, Dim], shapes: list[Shape], axis: int) -> Dim | None:
    sizes = tuple(shape[axis] for shape in shapes)
    return constant(sizes[0]) if len(set(sizes)) == 1 else known.get(sizes)


def _axis_rules(symbol: str, given: list[int], shapes: Mapping[Any, list[Shape]], axis: int) -> Mapping[Sizes, Dim]:
    return derive_rules(symbol, tuple(given), (tuple(shape[axis] for shape in each) for each in shapes.values()))


def _slot(traces: Sequence[Trace], index: int, skip: tuple[Dim, ...]) -> Slot:
    adds = [add for add in traces[0].adds if add.index == index]
    consumers = (add.up_block for trace in traces for add in trace.adds if add.index == index)  # a refused run sees few
    return Slot(
        adds[0].name, skip, "full", adds[0].producer, next(filter(None, consumers), ""), tuple(add.site for add in adds)
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
    makers = {residual.name: residual.module for trace in traces for residual in _of(trace, controlnet)}
    first: dict[str, Mismatch] = {}
    if at is not None and (given := _emitted_at(traces, controlnet, at)):
        _keep_first(first, compare_shapes(slots, at, given, makers=makers))
    for trace in traces:
        if residuals := _of(trace, controlnet):
            # a batch of its own, as in guess mode, is the hand-over's business
            geometry = replace(trace.geometry, batch=residuals[0].shape[0])
            _keep_first(first, compare_shapes(slots, geometry, {each.name: each.shape for each in residuals}, makers=makers))
    order = {slot.name: position for position, slot in enumerate(slots)}
    return sorted(first.values(), key=lambda mismatch: order.get(mismatch.where, len(order)))


def _emitted_at(traces: Sequence[Trace], controlnet: int, at: Geometry) -> dict[str, Shape]:
    """What the ControlNet emits at a geometry that was not observed; empty where its rules do not say."""
    table = derive_emitted(traces, controlnet)
    if any(residual.name not in table for trace in traces for residual in _of(trace, controlnet)):
        return {}
    try:
        return {name: at.shape_of(shape) for name, shape in table.items()}
    except ValueError:
        return {}


def _handover_mismatches(traces: Sequence[Trace], slots: tuple[Slot, ...]) -> list[Mismatch]:
    """What went wrong between the two ends: residuals of another shape or dtype than is added, lost, exchanged."""
    first: dict[str, Mismatch] = {}
    for trace in traces:
        _keep_first(first, _not_understood(trace))
        if trace.arrived:
            _keep_first(first, compare_shapes(slots, trace.geometry, {each.name: each.shape for each in trace.arrived}))
        _keep_first(first, _exchanged(trace))
        if trace.emitted and not trace.adds and not trace.arrived and not trace.refused:
            cause = "the ControlNet emitted it and it never reached the UNet"
            _keep_first(first, [_unused(trace, residual, cause) for residual in trace.emitted])
        _keep_first(first, _of_another_dtype(trace))
    return list(first.values())


def _not_understood(trace: Trace) -> list[Mismatch]:
    """Residuals the UNet took with something else than an addition: no verdict can be given on these."""
    added = {add.name for add in trace.adds}
    return [
        Mismatch(
            "unused",
            name,
            operation,
            "an addition",
            trace.geometry,
            cause="taken by an operation that is not understood",
        )
        for name, operation in trace.misunderstood
        if name not in added
    ]


def _exchanged(trace: Trace) -> list[Mismatch]:
    """Residuals that arrive in another's place, made of nothing that was emitted, or not at all."""
    found: list[Mismatch] = []
    if not trace.emitted or not trace.arrived:
        return found
    for arrival in trace.arrived:
        name = arrival.name
        if wrong := sorted({index for _, index in arrival.sources} - {arrival.index}, key=_slot_order):
            got = " and ".join(name_slot(index, arrival.group) for index in wrong)
            cause = "residuals were reordered between the ControlNet and the UNet"
            found.append(Mismatch("order", name, got, name, trace.geometry, cause=cause))
        elif not arrival.sources:
            cause = "what arrived was not made from anything the ControlNet emitted"
            found.append(Mismatch("unused", name, arrival.shape, "the ControlNet's residual", trace.geometry, cause=cause))
    reached = {source for arrival in trace.arrived for source in arrival.sources}
    lost = [each for each in trace.emitted if (each.controlnet, each.index) not in reached]
    return found + [_unused(trace, each, "the ControlNet emitted it and it never reached the UNet") for each in lost]


def _unused(trace: Trace, residual: Residual, cause: str) -> Mismatch:
    return Mismatch("unused", residual.name, "dropped", residual.shape, trace.geometry, "", residual.module, cause)


def _of_another_dtype(trace: Trace) -> list[Mismatch]:
    """Residuals of another dtype than the skip: promoted in silence, or refused by the next layer."""
    skips = {add.name: add for add in trace.adds}
    given = {each.name: each.dtype for each in trace.emitted} | {each.name: each.dtype for each in trace.arrived}
    found = []
    for name, dtype in given.items():
        add = skips.get(name)
        if add is not None and dtype != add.dtypes[0]:
            cause = "PyTorch promotes the sum, in silence or until the next layer refuses it"
            found.append(Mismatch("dtype", name, dtype, add.dtypes[0], trace.geometry, add.producer, cause=cause))
    return found


def _keep_first(first: dict[str, Mismatch], found: Sequence[Mismatch]) -> None:
    for mismatch in found:
        first.setdefault(mismatch.where, mismatch)


def _is_accepted(geometry: Geometry, divisor: int) -> bool:
    """Whether the UNet takes this size: what two models do at others is no disagreement."""
    return geometry.height % divisor == 0 and geometry.width % divisor == 0


def _slot_order(index: int) -> tuple[bool, int]:
    """Down slots by number, the mid slot last."""
    return index < 0, index
