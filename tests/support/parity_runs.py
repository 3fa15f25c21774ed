"""The slots of the UNet that parity is tried on, `onnx_files.DEEP`, and what failed in a run."""

from __future__ import annotations

from collections import Counter

NAMES = [f"down_block_residual_{index:02}" for index in range(8)] + ["mid_block_residual"]
SLOTS = [f"slot[{name}]" for name in NAMES]


def failed(found):
    return {str(each.check).removeprefix("ort/"): each.reason for each in found.failed}


def kinds(found):
    return Counter(each.check.kind for each in found.failed)
