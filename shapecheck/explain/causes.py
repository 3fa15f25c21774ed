"""Causes that a text leaves no choice about: a dtype, a way of calling, another model, an input of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import permutations

from shapecheck import presets
from shapecheck.contract import Geometry
from shapecheck.explain.diagnosis import Cause
from shapecheck.explain.input_causes import CHECK, Models, explain_dimensions, explain_missing, explain_range, explain_unknown
from shapecheck.explain.symptom import Symptom
from shapecheck.explain.wrong_tables import emitted_shapes, list_families

_PROBE = "shapecheck probe MODEL"


def list_causes(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Yield the causes that this symptom shows by itself, on these UNets."""
    if symptom.stage == "nets":
        yield from _explain_sum(symptom)
    elif cause := _CERTAIN.get(symptom.kind):
        yield cause
    elif explain := _EXPLAIN.get(symptom.kind):
        yield from explain(symptom, models)


def _explain_sum(symptom: Symptom) -> Iterator[Cause]:
    """Say which two ControlNets do not go together, as far as the text of their sum shows."""
    message = "the residuals of several ControlNets are added to one another before the UNet gets them, and two of these "
    if symptom.kind != "broadcast" or symptom.axis != 1:
        alike, change = ("batches", "batch") if symptom.axis == 0 else ("sizes", "latents, and images of one size")
        message += f"ran at different {alike}, or are not for one UNet"
        command = "with shapecheck.explained(unet, [one, other]): around the call"
        yield Cause("nets", "", message, f"give all ControlNets the same {change}", command)
        return

    slots: dict[str, None] = {}
    pairs = []
    at = Geometry(1, 64, 64)  # the channels of families differ alike at every size
    for (names, one), (other_names, other) in permutations(list_families(), 2):
        sums = zip(one.slots, emitted_shapes(one, at).downs, emitted_shapes(other, at).downs, strict=False)
        slot, a, b = next(((slot.name, a, b) for slot, a, b in sums if a != b), ("", (), ()))
        if slot and a[2:] == b[2:] and (a[1], b[1]) == (symptom.expected, symptom.actual):
            slots[slot] = None
            pairs.append(f"{names[0]} and {other_names[0]}")
    message += "are not for one UNet" + (f": such as those of {', or '.join(pairs[:3])}" if pairs else "")
    where = next(iter(slots)) if len(slots) == 1 else ""
    change = "take ControlNets that are made for one UNet"
    yield Cause("nets", where, message, change, f"{_PROBE} --controlnet EACH", tuple(slots))


def _explain_dtype(symptom: Symptom, models: Models) -> Iterator[Cause]:
    actual, expected = (bound.rsplit(".", 1)[-1].rsplit(":", 1)[-1] for bound in symptom.bounds)
    if symptom.source in ("ONNX Runtime", "Polygraphy"):
        name = symptom.names[0] if symptom.names else ""
        unnamed = f"an input is {actual} where the file takes {expected}; ONNX Runtime does not say which"
        message = f"got {actual}, expected {expected}" if name else unnamed
        yield Cause("dtype", name, message, "cast it to the dtype of the file's own input", CHECK)
        return
    met = f"{actual} met {expected}" if actual and expected else f"{actual or expected} met another dtype"
    yield Cause(
        "dtype", "", f"{met}: residuals, latents or text are not in the UNet's dtype. PyTorch promotes skip + residual in "
        "silence, and a layer after it refuses the sum",
        "load the ControlNet with the UNet's torch_dtype, or cast what it returns: [down.to(unet.dtype) for down in downs], "
        "mid.to(unet.dtype)",
        "shapecheck.guard(unet, contract) names the slot before the call runs",
    )  # fmt: skip


def _explain_text_width(symptom: Symptom, models: Models) -> Iterator[Cause]:
    contracts = presets.contracts()
    widths = {name: contract.config.get("cross_attention_dim") for name, contract in contracts.items()}
    known = {contract.config.get("cross_attention_dim") for contract in models.values()}
    layers: set[object] = set()  # channels that a layer may make of a text: those of the blocks, and the text's own
    for contract in (*contracts.values(), *models.values()):
        layers |= {*(contract.config.get("block_out_channels") or ()), contract.config.get("cross_attention_dim") or 0}
    is_of_layer = not symptom.expected_shape or symptom.expected_shape[1] in layers
    met = {symptom.expected, symptom.actual}
    if known & met and met <= set(widths.values()) and is_of_layer:
        families: dict[object, dict[str, None]] = {}
        for name in sorted(widths, key=len):
            families.setdefault(widths[name], {})[presets.load(name).family] = None
        actual, expected = (" or ".join(list(families[size])[:3]) for size in (symptom.actual, symptom.expected))
        message = (
            f"text {symptom.actual} wide met layers that take {symptom.expected}: {actual} was given to "
            f"a UNet or ControlNet of {expected}"
        )
        change = "take UNet, ControlNet and text encoder of one family; slots alone cannot show this"
        yield Cause("input", "encoder_hidden_states", message, change, f"{_PROBE} --controlnet YOURS")


def _explain_sample_channels(symptom: Symptom, models: Models) -> Iterator[Cause]:
    known = {contract.config.get("in_channels") for contract in presets.contracts().values()}
    if symptom.actual in known and symptom.expected in {contract.config.get("in_channels") for contract in models.values()}:
        message = f"latents of {symptom.actual} channels met a conv_in that takes {symptom.expected}"
        change = "inpainting and editing UNets take more latent channels than the ControlNets beside them"
        yield Cause("input", "sample", message, f"{change}: give each its own latents", _PROBE)


def _explain_odd_size(symptom: Symptom, models: Models) -> Iterator[Cause]:
    """Recognise a way up that doubles sizes, and a skip that was halved from an odd one."""
    hidden, skip = symptom.expected, symptom.actual
    if hidden is None or skip is None:
        return
    if symptom.source == "TensorRT":  # either may be printed first
        hidden, skip = max(hidden, skip), min(hidden, skip)
    if hidden % 2 == 0 and skip == hidden - 1:
        message = (
            f"no residual need be wrong: the way up doubled to {hidden}, where the skip was halved from an odd size and is "
            f"{skip}. The original LDM code does so, and a graph traced at a size that is a multiple of 8 latent cells"
        )
        change = "draw at multiples of 64 pixels, or export a graph that is right at every size with shapecheck export"
        yield Cause("odd size", "", message, change, CHECK)


def _explain_from_unet(symptom: Symptom, models: Models) -> Iterator[Cause]:
    reason, change = {
        "mid": (
            "it knows no such mid block",
            "a ControlNet of such a UNet needs a class of its own; its slots can be probed without one",
        ),
        "layers": (
            "layers_per_block is a list, from_unet takes a number",
            "set unet.config.layers_per_block to a number, if all levels have as many",
        ),
        "cond_proj": (
            "its time embedding has cond_proj, as LCM's has, and the ControlNet's has none",
            "pass load_weights_from_unet=False, or make it from the UNet that the LCM was distilled from",
        ),
        "adapter": (
            "an IP-Adapter was loaded and changed the UNet's config",
            "make the ControlNet before load_ip_adapter, or from a fresh UNet",
        ),
    }[symptom.names[0]]
    message = f"ControlNetModel.from_unet cannot make the ControlNet of this UNet: {reason}"
    yield Cause("from_unet", "", message, change, _PROBE)


def _explain_argument(symptom: Symptom, models: Models) -> Iterator[Cause]:
    name, argument = symptom.names
    message = (
        f"{name} takes no {argument}: it is not a UNet that a ControlNet works with, or stands in the place of such a UNet"
    )
    change = (
        "give a UNet2DConditionModel; an exported one goes into a pipeline by shapecheck.load(FILE), which takes ControlNets' "
        "residuals"
    )
    yield Cause("unknown", argument, message, change, _PROBE)


def _explain_value(symptom: Symptom, models: Models) -> Iterator[Cause]:
    # anything is added to a tensor somewhere: it is a residual only if a traceback shows so
    if symptom.stage in ("down", "mid", "feature"):
        residual = "the mid residual" if symptom.stage == "mid" else "one of the residuals"
        message = f"{residual} is a {symptom.names[0]}, not a tensor"
        yield Cause("value", "", message, "give a tensor for every slot: zeros of its shape where control is off")


_MID = "mid_block_residual"
_CERTAIN = {
    "pop": Cause(
        "container", _MID, "no mid residual is given, so diffusers takes the down residuals for T2I-Adapter features and pops "
        "them from a list; this one is a tuple",
        "give mid_block_additional_residual too; features of a T2I-Adapter go as "
        "down_intrablock_additional_residuals=list(features)", "", (_MID,),
    ),
    "deprecated": Cause(
        "mid", _MID, "no mid residual is given: diffusers takes the down residuals for T2I-Adapter features and adds them "
        "inside the down blocks, where some fit by chance",
        "give mid_block_additional_residual beside down_block_additional_residuals", "", (_MID,),
    ),
}  # fmt: skip
_EXPLAIN: Mapping[str, Callable[[Symptom, Models], Iterator[Cause]]] = {
    "dtype": _explain_dtype,
    "missing": explain_missing,
    "unknown": explain_unknown,
    "range": explain_range,
    "text width": _explain_text_width,
    "sample channels": _explain_sample_channels,
    "concat": _explain_odd_size,
    "dimensions": explain_dimensions,
    "from_unet": _explain_from_unet,
    "argument": _explain_argument,
    "value": _explain_value,
}
