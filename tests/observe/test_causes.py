"""The likely cause of a disagreement, from recorded contracts: the family a ControlNet was made for, where it is another."""

from __future__ import annotations

import pytest

from shapecheck import Mismatch, presets
from shapecheck.observe.causes import add_causes

FOUND = Mismatch("dtype", "down_block_residual_00", "float32", "float16", cause="what was seen")


@pytest.mark.parametrize(
    ("net", "unet", "cause"),
    [
        ("sd15", "sdxl", "this ControlNet was made for SD1.5"),
        ("sdxl", "sd15", "this ControlNet was made for SDXL"),
        ("sd15", "sd15", ""),
        ("sd21-base", "sd21", ""),
    ],
)
def test_a_controlnet_is_told_to_be_made_for_another_family_only(net, unet, cause):
    made_for = presets.contract(net)
    emitted = {slot.name: slot.skip for slot in made_for.slots}
    (told,) = add_causes([FOUND], presets.contract(unet), emitted, made_for.inputs, made_for.config)
    assert told.cause.startswith(cause)
    assert told.cause.endswith("what was seen")
    assert ("made for" in told.cause) is bool(cause)
