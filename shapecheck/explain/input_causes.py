"""Causes that name an input of a file: given and not known, known and not given, of another shape or out of range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shapecheck.contract import Contract, show
from shapecheck.explain.diagnosis import Cause
from shapecheck.explain.matching import find_slot, residual_index
from shapecheck.explain.symptom import Symptom

Models = Mapping[str, Contract]


CHECK = "shapecheck check FILE.onnx --model MODEL"


_LATENTS = "sample"


def explain_missing(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Explain inputs that the file takes and was not given."""
    if symptom.source == "StreamDiffusion":
        yield from _explain_unsized(symptom, models)
        return
    slots, others = _sort_names(symptom, models)
    if slots:
        many = "residuals that were" if len(slots) > 1 else "residual that was"
        told = f"the file takes {len(slots)} {many} not given: {_list_names(slots)}"
        change = (
            "give every slot at every call, zeros of its shape where control is off: `shapecheck.load(FILE)` does so; "
            "or export once more with --no-control"
        )
        yield Cause("missing", "", told, change, CHECK, tuple(slots.values()))
    if known := [name for name in others if _is_base_input(name, models)]:
        yield Cause("missing", ", ".join(known), "the file takes it and it was not given", "give it at every call", CHECK)


def _explain_unsized(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """StreamDiffusion sizes the buffers of inputs that it does not know by the engine's -1."""
    width = symptom.given_shape[1] if len(symptom.given_shape) == 4 else None
    slots = {slot.name: None for contract in models.values() for slot in contract.slots if slot.channels == width}
    if slots:
        told = f"the engine takes residuals, one of {width} channels among them, and none were given: their size stays -1"
        change = "give every slot at every call, zeros where control is off, or build an engine exported with --no-control"
        yield Cause("missing", "", told, change, "shapecheck check ENGINE.plan --model MODEL", tuple(slots))


def explain_unknown(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Explain inputs that were given and the file does not have."""
    slots, others = _sort_names(symptom, models)
    surplus = [name for name in others if residual_index(name) is not None]
    if slots:
        told = (
            f"the file has no input of that name: {_list_names(slots)}. It was exported without control, or calls its slots "
            "otherwise"
        )
        change = "export with control inputs, and with the names that the caller gives: --naming says whose"
        yield Cause("unknown", "", told, change, CHECK, tuple(slots.values()))
    if surplus:
        told = f"the file has no input of that name, and the UNet no such slot: {_list_names(dict.fromkeys(surplus))}"
        change = (
            "give as many residuals as the UNet has slots: this ControlNet is made for another one, or mid is numbered as a "
            "down residual"
        )
        yield Cause("unknown", "", told, change, CHECK)
    if known := [name for name in others if _is_base_input(name, models)]:
        told = "the file has no input of that name: it was baked in, or the file is of another family"
        yield Cause("unknown", ", ".join(known), told, "export again with shapecheck export, which keeps every input", CHECK)


def explain_range(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Explain a size that no profile of an engine holds."""
    name = symptom.names[0] if symptom.names else ""
    low, high = symptom.bounds
    asked = show(symptom.given_shape) if symptom.given_shape else "this size"
    slot = _slot_called(name, models)
    if name and not slot and not name.startswith("bindings[") and not _is_base_input(name, models):
        return
    between = f", built for {low} to {high}" if low and low != high else f", built for {low}" if low else ""
    axis = f" on axis {symptom.axis}" if symptom.axis is not None else ""
    latent = _is_latent(symptom, models)
    where = slot or (_LATENTS if latent else name)
    pixels = f" ({8 * symptom.given_shape[3]}×{8 * symptom.given_shape[2]} pixels)" if latent else ""
    told = f"the engine has no profile for {asked}{pixels}{axis}{between}"
    change = (
        "build an engine whose profiles hold this size, for every input alike, or draw at a size the engine was built for; "
        "where only a residual is out of range, its profile is not the image of the latents'"
    )
    size = f" --size {8 * symptom.given_shape[3]}x{8 * symptom.given_shape[2]}" if latent else " --size WxH"
    yield Cause("range", where, told, change, f"shapecheck check ENGINE.plan{size}", (slot,) if slot else ())


def _is_latent(symptom: Symptom, models: Models) -> bool:
    shape = symptom.given_shape
    channels = {each.shape[1].at({}) for contract in models.values() for each in contract.inputs if each.name == _LATENTS}
    return len(shape) == 4 and shape[1] in channels and min(shape) > 0


def explain_dimensions(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Explain an input of another shape than the file takes."""
    name = symptom.names[0]
    wrong = _list_wrong_axes(symptom)
    if slot := _slot_called(name, models):
        told = f"{name}: {wrong}"
        yield Cause("dimensions", slot, told, "give this slot the shape of its row in the table", CHECK, (slot,))
    elif _is_base_input(name, models):
        yield Cause("input", name, wrong, "the file and what is given are of different models or sizes", CHECK)


def _list_wrong_axes(symptom: Symptom) -> str:
    """Which axes differ, in words."""
    if symptom.axis is None and symptom.given is not None:
        return f"{symptom.given} axes were given, {symptom.wanted} are taken"
    if symptom.axis is not None:
        return f"{symptom.given} on axis {symptom.axis} was given, {symptom.wanted} is taken"
    pairs = zip(symptom.given_shape, symptom.wanted_shape, strict=False)
    wrong = [
        f"{given} on axis {axis} was given, {wanted} is taken"
        for axis, (given, wanted) in enumerate(pairs)
        if -1 != wanted != given
    ]
    return "; ".join(wrong) or f"{show(symptom.given_shape)} was given, {show(symptom.wanted_shape)} is taken"


def _sort_names(symptom: Symptom, models: Models) -> tuple[dict[str, str], list[str]]:
    """Names that are slots' with our names of them, and the others."""
    known = {name: slot for name in symptom.names if (slot := _slot_called(name, models))}
    return known, [name for name in symptom.names if name not in known]


def _slot_called(name: str, models: Models) -> str | None:
    """Our name of the slot that is called so, on any of the models."""
    found = (find_slot(name, contract) for contract in models.values())
    return next(filter(None, found), None)


def _is_base_input(name: str, models: Models) -> bool:
    return any(name == each.name for contract in models.values() for each in contract.inputs)


def _list_names(names: Mapping[str, object]) -> str:
    given = list(names)
    return ", ".join(given) if len(given) <= 4 else f"{given[0]}, {given[1]}, … {given[-1]}"
