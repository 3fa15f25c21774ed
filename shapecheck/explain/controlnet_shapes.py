"""What named ControlNets emit, as the tables that a UNet is given."""

from __future__ import annotations

from collections.abc import Sequence

from shapecheck.contract import Contract, Geometry
from shapecheck.explain.residual_table import Given
from shapecheck.models import lookup
from shapecheck.progress import Progress


def emitted(
    model: str, controlnets: Sequence[str], contract: Contract, geometry: Geometry, *, offline: bool = False, progress: Progress
) -> list[Given]:
    """What each of these ControlNets emits at that geometry, observed on the meta device.

    A UNet preset's name stands for the ControlNet made for it. Raises ShapecheckError where one cannot be had or run.
    """
    for name in controlnets:
        lookup.find(name, "controlnet", offline=offline)
    progress("importing torch and diffusers")
    from shapecheck.models.model import build_controlnets
    from shapecheck.observe.probe import probe_controlnet

    tables = []
    for net in build_controlnets(controlnets, offline):
        progress(f"observing {net.name}")
        shapes = probe_controlnet(net.module).shapes(geometry)
        *downs, mid = shapes.values()
        tables.append(Given(tuple(downs), mid))
    return tables
