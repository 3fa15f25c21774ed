"""Several ControlNets whose residuals could not be added to one another, before any UNet saw them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

from shapecheck.contract import Geometry
from shapecheck.faults.diagnosis import Cause
from shapecheck.faults.families import emitted_at, families
from shapecheck.faults.symptom import Symptom

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
