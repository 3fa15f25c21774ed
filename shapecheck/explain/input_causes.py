"""Causes that name an input of a file: given and not known, known and not given, of another shape or out of range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from shapecheck.contract import Contract, show
from shapecheck.contract.naming import residual_index
from shapecheck.explain.diagnosis import Cause
from shapecheck.explain.matching import find_slot
from shapecheck.explain.symptom import Symptom

Models = Mapping[str, Contract]
CHECK = "shapecheck check FILE.onnx --model MODEL"


def explain_missing(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Explain inputs that the file needs and did not receive."""
    if symptom.source == "StreamDiffusion":
        # it sizes the buffers of inputs that it does not know by the engine's -1
        width = symptom.actual_shape[1] if len(symptom.actual_shape) == 4 else None
        if names := {slot.name: None for contract in models.values() for slot in contract.slots if slot.channels == width}:
            message = (
                f"the engine takes residuals, one of {width} channels among them, and none were given: their size stays -1"
            )
            change = "give every slot at every call, zeros where control is off, or build an engine exported with --no-control"
            yield Cause("missing", "", message, change, "shapecheck check ENGINE.plan --model MODEL", tuple(names))
        return
    slots, others = _sort_names(symptom, models)
    if slots:
        many = "residuals that were" if len(slots) > 1 else "residual that was"
        message = f"the file takes {len(slots)} {many} not given: {_list_names(slots)}"
        change = (
            "give every slot at every call, zeros of its shape where control is off: `shapecheck.load(FILE)` does so; "
            "or export once more with --no-control"
        )
        yield Cause("missing", "", message, change, CHECK, tuple(slots.values()))
    if known := [name for name in others if _is_base_input(name, models)]:
        yield Cause("missing", ", ".join(known), "the file takes it and it was not given", "give it at every call", CHECK)


def explain_unknown(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Explain inputs that were given and that the file does not have."""
    slots, others = _sort_names(symptom, models)
    if slots:
        unknown = f"the file has no input of that name: {_list_names(slots)}"
        message = f"{unknown}. It was exported without control, or with other names"
        change = "export with control inputs, and with the names that the caller gives: --naming says whose"
        yield Cause("unknown", "", message, change, CHECK, tuple(slots.values()))
    if surplus := dict.fromkeys(name for name in others if residual_index(name) is not None):
        message = f"the file has no input of that name, and the UNet no such slot: {_list_names(surplus)}"
        change = (
            "give as many residuals as the UNet has slots: this ControlNet is made for another one, or mid is numbered as a "
            "down residual"
        )
        yield Cause("unknown", "", message, change, CHECK)
    if known := [name for name in others if _is_base_input(name, models)]:
        message = "the file has no input of that name: it was baked in, or the file is of another family"
        yield Cause("unknown", ", ".join(known), message, "export again with shapecheck export, which keeps every input", CHECK)


def explain_range(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Explain a size that no profile of an engine holds."""
    name = symptom.names[0] if symptom.names else ""
    slot = _find_slot_on_any(name, models)
    if name and not slot and not name.startswith("bindings[") and not _is_base_input(name, models):
        return
    (low, high), shape = symptom.bounds, symptom.actual_shape
    latents = {port.shape[1].at({}) for contract in models.values() for port in contract.inputs if port.name == "sample"}
    is_latent = len(shape) == 4 and shape[1] in latents and min(shape) > 0
    pixels = f" ({8 * shape[3]}×{8 * shape[2]} pixels)" if is_latent else ""
    axis = f" on axis {symptom.axis}" if symptom.axis is not None else ""
    built = f", built for {low} to {high}" if low and low != high else f", built for {low}" if low else ""
    message = f"the engine has no profile for {show(shape) if shape else 'this size'}{pixels}{axis}{built}"
    change = (
        "build an engine whose profiles hold this size, for every input alike, or draw at a size the engine was built for; "
        "where only a residual is out of range, its profile is not the image of the latents'"
    )
    size = f"{8 * shape[3]}x{8 * shape[2]}" if is_latent else "WxH"
    where = slot or ("sample" if is_latent else name)
    yield Cause("range", where, message, change, f"shapecheck check ENGINE.plan --size {size}", (slot,) if slot else ())


def explain_dimensions(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Explain an input of another shape than the file needs."""
    name = symptom.names[0]
    if symptom.axis is not None:
        wrong = f"{symptom.actual} on axis {symptom.axis} was given, {symptom.expected} is expected"
    elif symptom.actual is not None:
        wrong = f"{symptom.actual} axes were given, {symptom.expected} are expected"
    else:
        axes = [
            f"{actual} on axis {axis} was given, {expected} is expected"
            for axis, (actual, expected) in enumerate(zip(symptom.actual_shape, symptom.expected_shape, strict=False))
            if -1 != expected != actual
        ]
        wrong = "; ".join(axes) or f"{show(symptom.actual_shape)} was given, {show(symptom.expected_shape)} is expected"
    if slot := _find_slot_on_any(name, models):
        change = "give this slot the shape of its row in the table"
        yield Cause("dimensions", slot, f"{name}: {wrong}", change, CHECK, (slot,))
    elif _is_base_input(name, models):
        yield Cause("input", name, wrong, "the file and what is given are of different models or sizes", CHECK)


def _sort_names(symptom: Symptom, models: Models) -> tuple[dict[str, str], list[str]]:
    """Return the names that stand for slots, with our names of these, and the others."""
    slots = {name: slot for name in symptom.names if (slot := _find_slot_on_any(name, models))}
    return slots, [name for name in symptom.names if name not in slots]


def _find_slot_on_any(name: str, models: Models) -> str | None:
    return next((slot for contract in models.values() if (slot := find_slot(name, contract))), None)


def _is_base_input(name: str, models: Models) -> bool:
    return any(name == port.name for contract in models.values() for port in contract.inputs)


def _list_names(names: Iterable[str]) -> str:
    first, *rest = names
    return ", ".join((first, *rest)) if len(rest) < 4 else f"{first}, {rest[0]}, … {rest[-1]}"
