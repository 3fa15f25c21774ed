"""Where in the code a text says it was raised: at an addition of residuals, on the way up, or somewhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from shapecheck.faults.outcome import Stage
from shapecheck.faults.traceback_text import Frame, around
from shapecheck.faults.traceback_text import frames as frames_of

_LINES: tuple[tuple[str, Stage | Literal["nets"]], ...] = (
    ("down_block_res_sample + down_block_additional_residual", "down"),
    ("sample + mid_block_additional_residual", "mid"),
    ("hidden_states + additional_residuals", "feature"),
    ("sample += down_intrablock_additional_residuals.pop(0)", "feature"),
    ("down_intrablock_additional_residuals.pop(0)", "feature"),
    ("torch.cat([hidden_states, res_hidden_states]", "up"),
    ("res_hidden_states_tuple[-1]", "up"),
    ("attn_output + hidden_states", "up"),
    ("samples_prev + samples_curr", "nets"),
    ("mid_block_res_sample += mid_sample", "nets"),
)
"""What diffusers says there, and older releases said."""
_UNET = re.compile(r"unet_2d|unets?/unet_|unet_motion|openaimodel\.py$|cldm\.py$|sd-webui-controlnet")
"""Files of UNets that residuals are added in: diffusers', and those of the original layout."""
_PART = re.compile(r"diffusers/models/(?:\w+/)?(\w+)\.py$")
_PARTS: Mapping[str, str] = {
    "broadcast": "attention attention_processor transformer_2d",
    "attention": "attention attention_processor transformer_2d",
    "reshape": "attention attention_processor transformer_2d",
    "norm": "resnet normalization attention transformer_2d",
    "groups": "resnet normalization attention transformer_2d",
    "upsample": "upsampling",
    "dtype": "resnet normalization upsampling downsampling attention attention_processor transformer_2d embeddings lora",
    "text width": "attention attention_processor transformer_2d lora",
    "sample channels": "",
}
"""What diffusers' UNet is made of, and its VAE too: the files that say a kind of text where residuals do not fit."""
_CONTROLNET = re.compile(r"controlnets?/\w+\.py$|/controlnet\.py$")
_OTHERS = re.compile(r"autoencoder|/vae\.py$|/transformers/|/text_encoder|controlnet|/lora|/peft/|lycoris")
_ABOUT_RESIDUALS = re.compile(r"control|residual|res_sample|\bskip|\bhs\.pop", re.IGNORECASE)
_ANY_LAYER = ("dtype", "text width", "sample channels")
"""Kinds that a ControlNet's layers say as well as a UNet's."""
_UNSURE = re.compile(r"torch/(_dynamo|export|_export|onnx)/")
"""PyTorch's tracers: what is below them is not shown."""


class Place(NamedTuple):
    """Where a message was raised, as far as the text around it says."""

    stage: Stage | Literal["nets"] | None = None
    elsewhere: str = ""
    """The file, where that is none that adds residuals or takes them."""


def place(text: str, start: int, end: int, kind: str) -> Place:
    """Where the message of that kind between `start` and `end` was raised."""
    part = around(text, start, end)
    last, stage = max((part.rfind(line), stage) for line, stage in _LINES)
    if last >= 0:
        return Place(stage)
    frames = frames_of(part)
    own = [number for number, frame in enumerate(frames) if not frame.is_of_torch]
    if not own or any(_UNSURE.search(frame.file) for frame in frames[own[-1] + 1 :]):
        return Place()
    return Place(None, "" if _may_be_unet(frames, frames[own[-1]], kind) else frames[own[-1]].name)


def _may_be_unet(frames: Sequence[Frame], last: Frame, kind: str) -> bool:
    if kind == "from_unet":
        return "diffusers" in last.file
    if _UNET.search(last.file) or (kind in _ANY_LAYER and _CONTROLNET.search(last.file)):
        return True
    if (part := _PART.search(last.file)) and part[1] in _PARTS.get(kind, "").split():
        callers = [frame.file for frame in frames]
        through = any(map(_UNET.search, callers)) or (kind in _ANY_LAYER and any(map(_CONTROLNET.search, callers)))
        return through or not any(map(_OTHERS.search, callers))
    return not _OTHERS.search(last.file) and bool(_ABOUT_RESIDUALS.search(last.source))
