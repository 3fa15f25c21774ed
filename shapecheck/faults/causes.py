"""Causes that a text names without leaving a choice: an input, a dtype, a profile, a way of calling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from shapecheck import presets
from shapecheck.contract import Contract, show
from shapecheck.faults.diagnosis import Cause
from shapecheck.faults.matching import residual_index, slot_of
from shapecheck.faults.nets import unlike_nets
from shapecheck.faults.symptom import Symptom

Models = Mapping[str, Contract]
_CHECK = "shapecheck check FILE.onnx --model MODEL"
_LATENTS = "sample"


def causes(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """What this symptom says by itself, on these UNets."""
    if symptom.stage == "nets":
        yield from unlike_nets(symptom)
    elif told := _TELLERS.get(symptom.kind):
        yield from told(symptom, models)


def _dtype(symptom: Symptom, models: Models) -> Iterator[Cause]:
    given, wanted = (each.rsplit(".", 1)[-1].rsplit(":", 1)[-1] for each in symptom.bounds)
    met = f"{given} met {wanted}" if given and wanted else f"{given or wanted} met another dtype"
    name = symptom.names[0] if symptom.names else ""
    if symptom.source in ("ONNX Runtime", "Polygraphy"):
        told = (
            f"an input is {given} where the file takes {wanted}; ONNX Runtime does not say which"
            if not name
            else f"given as {given}, taken as {wanted}"
        )
        yield Cause("dtype", name, told, "cast it to the dtype of the file's own input", _CHECK)
        return
    yield Cause(
        "dtype", "", f"{met}: residuals, latents or text are not in the UNet's dtype. PyTorch promotes skip + residual in "
        "silence, and a layer after it refuses the sum",
        "load the ControlNet with the UNet's torch_dtype, or cast what it returns: [each.to(unet.dtype) for each in downs], "
        "mid.to(unet.dtype)",
        "shapecheck.guard(unet, contract) names the slot before the call runs",
    )  # fmt: skip


def _container(symptom: Symptom, models: Models) -> Iterator[Cause]:
    yield Cause(
        "container", "mid_block_residual", "no mid residual is given, so diffusers takes the down residuals for T2I-Adapter "
        "features and pops them from a list; this one is a tuple",
        "give mid_block_additional_residual too; features of a T2I-Adapter go as "
        "down_intrablock_additional_residuals=list(features)",
        "", ("mid_block_residual",),
    )  # fmt: skip


def _mid_forgotten(symptom: Symptom, models: Models) -> Iterator[Cause]:
    yield Cause(
        "mid", "mid_block_residual", "no mid residual is given: diffusers takes the down residuals for T2I-Adapter features "
        "and adds them inside the down blocks, where some fit by chance",
        "give mid_block_additional_residual beside down_block_additional_residuals",
        "", ("mid_block_residual",),
    )  # fmt: skip


def _missing(symptom: Symptom, models: Models) -> Iterator[Cause]:
    if symptom.source == "StreamDiffusion":
        yield from _unsized(symptom, models)
        return
    slots, others = _sorted_names(symptom, models)
    if slots:
        many = "residuals that were" if len(slots) > 1 else "residual that was"
        told = f"the file takes {len(slots)} {many} not given: {_listed(slots)}"
        change = (
            "give every slot at every call, zeros of its shape where control is off: `shapecheck.load(FILE)` does so; "
            "or export once more with --no-control"
        )
        yield Cause("missing", "", told, change, _CHECK, tuple(slots.values()))
    if known := [name for name in others if _is_base_input(name, models)]:
        yield Cause("missing", ", ".join(known), "the file takes it and it was not given", "give it at every call", _CHECK)


def _unsized(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """StreamDiffusion sizes the buffers of inputs that it does not know by the engine's -1."""
    width = symptom.given_shape[1] if len(symptom.given_shape) == 4 else None
    slots = {slot.name: None for contract in models.values() for slot in contract.slots if slot.channels == width}
    if slots:
        told = f"the engine takes residuals, one of {width} channels among them, and none were given: their size stays -1"
        change = "give every slot at every call, zeros where control is off, or build an engine exported with --no-control"
        yield Cause("missing", "", told, change, "shapecheck check ENGINE.plan --model MODEL", tuple(slots))


def _unknown(symptom: Symptom, models: Models) -> Iterator[Cause]:
    slots, others = _sorted_names(symptom, models)
    surplus = [name for name in others if residual_index(name) is not None]
    if slots:
        told = (
            f"the file has no input of that name: {_listed(slots)}. It was exported without control, or calls its slots "
            "otherwise"
        )
        change = "export with control inputs, and with the names that the caller gives: --naming says whose"
        yield Cause("unknown", "", told, change, _CHECK, tuple(slots.values()))
    if surplus:
        told = f"the file has no input of that name, and the UNet no such slot: {_listed(dict.fromkeys(surplus))}"
        change = (
            "give as many residuals as the UNet has slots: this ControlNet is made for another one, or mid is numbered as a "
            "down residual"
        )
        yield Cause("unknown", "", told, change, _CHECK)
    if known := [name for name in others if _is_base_input(name, models)]:
        told = "the file has no input of that name: it was baked in, or the file is of another family"
        yield Cause("unknown", ", ".join(known), told, "export again with shapecheck export, which keeps every input", _CHECK)


def _range(symptom: Symptom, models: Models) -> Iterator[Cause]:
    name = symptom.names[0] if symptom.names else ""
    low, high = symptom.bounds
    asked = show(symptom.given_shape) if symptom.given_shape else "this size"
    slot = _slot(name, models)
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


def _text_width(symptom: Symptom, models: Models) -> Iterator[Cause]:
    widths = {name: contract.config.get("cross_attention_dim") for name, contract in models.items()}
    taking, giving = ([name for name, width in widths.items() if width == size] for size in (symptom.wanted, symptom.given))
    every = {contract.config.get("cross_attention_dim") for contract in presets.contracts().values()}
    layers = {width for contract in (*presets.contracts().values(), *models.values()) for width in _widths(contract)}
    is_of_layer = not symptom.wanted_shape or symptom.wanted_shape[1] in layers
    if (taking or giving) and {symptom.wanted, symptom.given} <= every and is_of_layer:
        told = (
            f"text {symptom.given} wide met layers that take {symptom.wanted}: {_made_for(symptom.given)} was given to "
            f"a UNet or ControlNet of {_made_for(symptom.wanted)}"
        )
        change = "take UNet, ControlNet and text encoder of one family; slots alone cannot show this"
        yield Cause("input", "encoder_hidden_states", told, change, "shapecheck probe MODEL --controlnet YOURS")


def _made_for(width: int | None) -> str:
    names = [name for name, contract in presets.contracts().items() if contract.config.get("cross_attention_dim") == width]
    families = dict.fromkeys(presets.load(name).family for name in sorted(names, key=len))
    return " or ".join(list(families)[:3])


def _widths(contract: Contract) -> tuple[int, ...]:
    """Channels that a layer may make of a text: those of the blocks, and the text's own."""
    return (*(contract.config.get("block_out_channels") or ()), contract.config.get("cross_attention_dim") or 0)


def _sample_channels(symptom: Symptom, models: Models) -> Iterator[Cause]:
    every = {contract.config.get("in_channels") for contract in presets.contracts().values()}
    wanted = {contract.config.get("in_channels") for contract in models.values()}
    if symptom.wanted in wanted and symptom.given in every:
        told = f"latents of {symptom.given} channels met a conv_in that takes {symptom.wanted}"
        change = (
            "inpainting and editing UNets take more latent channels than the ControlNets beside them: give each its own latents"
        )
        yield Cause("input", _LATENTS, told, change, "shapecheck probe MODEL")


def _odd_size(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """A way up that doubles sizes, where a skip was halved from an odd one."""
    if symptom.wanted is None or symptom.given is None:
        return
    told_other_way = symptom.source == "TensorRT"
    pairs = [(symptom.wanted, symptom.given), *([(symptom.given, symptom.wanted)] if told_other_way else [])]
    for hidden, skip in pairs:
        if hidden % 2 == 0 and skip == hidden - 1:
            told = (
                f"no residual need be wrong: the way up doubled to {hidden}, where the skip was halved from an odd size and is "
                f"{skip}. The original LDM code does so, and a graph traced at a size that is a multiple of 8 latent cells"
            )
            change = "draw at multiples of 64 pixels, or export a graph that is right at every size with shapecheck export"
            yield Cause("odd size", "", told, change, _CHECK)


def _dimensions(symptom: Symptom, models: Models) -> Iterator[Cause]:
    name = symptom.names[0]
    wrong = _wrong_axes(symptom)
    if slot := _slot(name, models):
        told = f"{name}: {wrong}"
        yield Cause("dimensions", slot, told, "give this slot the shape of its row in the table", _CHECK, (slot,))
    elif _is_base_input(name, models):
        yield Cause("input", name, wrong, "the file and what is given are of different models or sizes", _CHECK)


def _wrong_axes(symptom: Symptom) -> str:
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


def _from_unet(symptom: Symptom, models: Models) -> Iterator[Cause]:
    told, change = _FROM_UNET[symptom.names[0]]
    yield Cause(
        "from_unet",
        "",
        f"ControlNetModel.from_unet cannot make the ControlNet of this UNet: {told}",
        change,
        "shapecheck probe MODEL",
    )


_FROM_UNET = {
    "mid": (
        "it knows no such mid block",
        "a ControlNet of such a UNet needs a class of its own; its slots can be probed without one",
    ),
    "layers": (
        "layers_per_block is a list, from_unet takes a number",
        "set unet.config.layers_per_block to a number, where all levels have as many",
    ),
    "cond_proj": (
        "its time embedding has cond_proj, as LCM's has, and the ControlNet's has none",
        "pass load_weights_from_unet=False, or make it from the UNet that the LCM was distilled from",
    ),
    "adapter": (
        "an IP-Adapter was loaded and changed the UNet's config",
        "make the ControlNet before load_ip_adapter, or from a fresh UNet",
    ),
}  # fmt: skip


def _sorted_names(symptom: Symptom, models: Models) -> tuple[dict[str, str], list[str]]:
    """Names that are slots' with our names of them, and the others."""
    known = {name: slot for name in symptom.names if (slot := _slot(name, models))}
    return known, [name for name in symptom.names if name not in known]


def _slot(name: str, models: Models) -> str | None:
    """Our name of the slot that is called so, on any of the models."""
    found = (slot_of(name, contract) for contract in models.values())
    return next(filter(None, found), None)


def _is_base_input(name: str, models: Models) -> bool:
    return any(name == each.name for contract in models.values() for each in contract.inputs)


def _listed(names: Mapping[str, object]) -> str:
    given = list(names)
    return ", ".join(given) if len(given) <= 4 else f"{given[0]}, {given[1]}, … {given[-1]}"


_TELLERS: Mapping[str, Callable[[Symptom, Models], Iterator[Cause]]] = {
    "dtype": _dtype,
    "pop": _container,
    "deprecated": _mid_forgotten,
    "missing": _missing,
    "unknown": _unknown,
    "range": _range,
    "text width": _text_width,
    "sample channels": _sample_channels,
    "concat": _odd_size,
    "dimensions": _dimensions,
    "from_unet": _from_unet,
}
