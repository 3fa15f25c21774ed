"""The residuals of a real ControlNet, for the calls of a parity run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shapecheck.build.safetensor_files import checkpoint_files
from shapecheck.contract import ShapecheckError
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.observe import configs, sources
from shapecheck.observe.inputs import controlled, controlnet_inputs
from shapecheck.verify.calls import Emitted


def emitted_by(name: str, *, variant: str | None = None, offline: bool = False) -> Emitted:
    """What the named ControlNet, in float32, gives for a random image a frame.

    Raises ShapecheckError where it, or its weights, cannot be had.
    """
    source = configs.find(name, "controlnet", offline=offline)
    if source.folder is None or not checkpoint_files(source.folder, variant=variant):
        raise ShapecheckError(f"{source.origin} is a ControlNet without weights; give a folder that holds them")
    net: Any = sources.load(source, variant, torch.float32)
    inputs = controlnet_inputs(net.config, "float32")

    def emit(base: Mapping[str, Tensor], frame: int) -> dict[str, Tensor]:
        batch, _, height, width = base["sample"].shape
        sizes = {"batch": batch, "h": height, "w": width, "tokens": 1}
        generator = torch.Generator().manual_seed(frame)
        given = {}
        for each in inputs:
            if each.name in ("controlnet_cond", "control_type"):
                given[each.argument] = torch.rand([dim.at(sizes) for dim in each.shape], generator=generator)
            elif each.name in base:
                value = base[each.name]
                given[each.argument] = value.float() if value.is_floating_point() else value
            else:
                raise ShapecheckError(f"{name} takes {each.name}, which the UNet does not")
        with torch.inference_mode():
            downs, mid = net(**controlled(given), return_dict=False)
        return dict(zip(SHAPECHECK.names(len(downs)), (*downs, mid), strict=True))

    return emit
