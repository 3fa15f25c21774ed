"""What named ControlNets emit, as the tables that a UNet is given."""

from __future__ import annotations

from collections.abc import Sequence

from shapecheck.contract import Geometry
from shapecheck.explain.residual_table import ResidualShapes, right_shapes
from shapecheck.models import lookup
from shapecheck.progress import Progress


def observe_emitted(
    controlnets: Sequence[str], geometry: Geometry, *, offline: bool = False, progress: Progress
) -> list[ResidualShapes]:
    """Observe on the meta device what each of these ControlNets emits at that geometry.

    A UNet preset's name stands for the ControlNet made for it. Raises ShapecheckError if one cannot be had or run.
    """
    for name in controlnets:
        lookup.find(name, "controlnet", offline=offline)
    progress("importing torch and diffusers")
    from shapecheck.models.model import build_controlnets
    from shapecheck.observe.probe import probe_controlnet

    tables = []
    for net in build_controlnets(controlnets, offline):
        progress(f"observing {net.name}")
        tables.append(right_shapes(probe_controlnet(net.module), geometry))
    return tables
