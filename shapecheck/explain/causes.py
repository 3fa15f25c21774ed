"""Causes that a text names without leaving a choice: a dtype, a way of calling, another model, an input of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import permutations

from shapecheck import presets
from shapecheck.contract import Contract, Geometry
from shapecheck.explain.diagnosis import Cause
from shapecheck.explain.input_causes import Models, dimensions, missing, out_of_range, unknown
from shapecheck.explain.symptom import Symptom
from shapecheck.explain.wrong_tables import emitted_at, families

_AT = Geometry(1, 64, 64)
"""Where families are compared: their channels differ alike at every size."""


_SHOWN = 3


_FAMILY = "take ControlNets that are made for one UNet"


_SIZE = "give all ControlNets the same latents, and images of one size"


_BATCH = "give all ControlNets the same batch"


def unlike_nets(symptom: Symptom) -> Iterator[Cause]:
    """Which two ControlNets do not go together, as far as the text of their sum tells."""
    said = "the residuals of several ControlNets are added to one another before the UNet gets them, and two of these "
    if symptom.kind == "broadcast" and symptom.axis == 1:
        found = _unlike_families(symptom)
        slots = tuple(dict.fromkeys(slot for slot, _, _ in found))
        pairs = [f"{one} and {other}" for _, one, other in found]
        such = f": such as those of {', or '.join(pairs[:_SHOWN])}" if pairs else ""
        told = f"{said}are not for one UNet{such}"
        yield Cause(
            "nets", slots[0] if len(slots) == 1 else "", told, _FAMILY, "shapecheck probe MODEL --controlnet EACH", slots
        )
    else:
        alike, change = ("batches", _BATCH) if symptom.axis == 0 else ("sizes", _SIZE)
        told = f"{said}ran at different {alike}, or are not for one UNet"
        yield Cause("nets", "", told, change, "with shapecheck.explained(unet, [one, other]): around the call")


def _unlike_families(symptom: Symptom) -> list[tuple[str, str, str]]:
    """The first slot at which two families' ControlNets cannot be added with these channels, and the two."""
    found = []
    for (names, one), (beside, other) in permutations(families(), 2):
        sums = zip(one.slots, emitted_at(one, _AT).downs, emitted_at(other, _AT).downs, strict=False)
        slot, a, b = next(((slot.name, a, b) for slot, a, b in sums if a != b), ("", (), ()))
        if slot and a[2:] == b[2:] and (a[1], b[1]) == (symptom.wanted, symptom.given):
            found.append((slot, names[0], beside[0]))
    return found


_CHECK = "shapecheck check FILE.onnx --model MODEL"


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
        yield Cause("input", "sample", told, change, "shapecheck probe MODEL")


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


def _argument(symptom: Symptom, models: Models) -> Iterator[Cause]:
    who, argument = symptom.names
    told = f"{who} takes no {argument}: it is no UNet that a ControlNet works with, or stands in the place of one without it"
    change = (
        "give a UNet2DConditionModel; an exported one goes into a pipeline by shapecheck.load(FILE), which takes ControlNets' "
        "residuals"
    )
    yield Cause("unknown", argument, told, change, "shapecheck probe MODEL")


def _value(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Anything is added to a tensor somewhere: it is a residual's where a traceback shows so."""
    if symptom.stage in ("down", "mid", "feature"):
        what = "the mid residual" if symptom.stage == "mid" else "one of the residuals"
        told = f"{what} is a {symptom.names[0]}, no tensor"
        yield Cause("value", "", told, "give a tensor for every slot: zeros of its shape where control is off")


_TELLERS: Mapping[str, Callable[[Symptom, Models], Iterator[Cause]]] = {
    "dtype": _dtype,
    "pop": _container,
    "deprecated": _mid_forgotten,
    "missing": missing,
    "unknown": unknown,
    "range": out_of_range,
    "text width": _text_width,
    "sample channels": _sample_channels,
    "concat": _odd_size,
    "dimensions": dimensions,
    "from_unet": _from_unet,
    "argument": _argument,
    "value": _value,
}
