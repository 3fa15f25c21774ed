"""Whether a text can be about a UNet at some size at all: a look at its tensors, before every fault is played through."""

from __future__ import annotations

from collections.abc import Iterable

from shapecheck.contract import Shape
from shapecheck.explain.symptom import Symptom
from shapecheck.explain.unet_layout import Anatomy


def may_give(unet: Anatomy, symptom: Symptom) -> bool:
    """Whether this UNet has tensors of the sizes a text tells of; True wherever that is not sure."""
    tensors = {*unet.skips, unet.mid, *(block.skip for block in unet.downs)}
    if any(1 in shape[2:] for shape in tensors):  # may be broadcast to any size
        return True
    match symptom.kind:
        case "broadcast":
            return _has(symptom, tensors)
        case "concat":
            met = {symptom.wanted, symptom.given}
            return symptom.axis == 0 or None in met or 1 in met or met <= {side for size in _sizes(tensors) for side in size}
        case "norm":
            return symptom.wanted_shape[:1] in _joined(unet) and symptom.given_shape[-2:] in _sizes(tensors)
        case _:
            return True


def _has(symptom: Symptom, tensors: Iterable[Shape]) -> bool:
    axis, wanted = symptom.axis or 0, symptom.wanted
    if wanted is not None:
        if axis == 1 and symptom.given and wanted % symptom.given == 0:  # attention, which folds images and cells
            return True
        # on the axis itself, or on the one before it where the residual has an axis more
        return any(wanted in (1, *shape[max(axis - 1, 0) : axis + 1]) for shape in tensors)
    told = symptom.wanted_shape
    return len(told) != 4 or any(_reaches(shape, told, axis) for shape in tensors)


def _reaches(own: Shape, told: Shape, axis: int) -> bool:
    """Whether a tensor may be told so: PyTorch has broadcast the axes after the one that fails."""
    return own[: axis + 1] == told[: axis + 1] and all(a in (1, b) for a, b in zip(own[axis:], told[axis:], strict=True))


def _sizes(tensors: Iterable[Shape]) -> set[Shape]:
    """Heights and widths on the way up: a tensor's own, and doubled."""
    return {shape[2:] for shape in tensors} | {tuple(2 * side for side in shape[2:]) for shape in tensors}


def _joined(unet: Anatomy) -> set[Shape]:
    """Channels that the layers of the way up take: those of the tensor and of its skip."""
    width = unet.slots[-1].channels
    found: set[Shape] = set()
    for block in unet.ups:
        for index in block.slots:
            found.add((width + unet.slots[index].channels,))
            width = block.width
    return found
