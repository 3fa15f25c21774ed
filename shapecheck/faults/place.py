"""Where in the code a text says it was raised: at an addition of residuals, on the way up, or somewhere else."""

from __future__ import annotations

import re

from shapecheck.faults.outcome import Stage

_BEFORE, _AFTER = 6_000, 3_000
"""Characters of a traceback that are looked at around its message."""
_LINES: tuple[tuple[str, Stage], ...] = (
    ("down_block_res_sample + down_block_additional_residual", "down"),
    ("sample + mid_block_additional_residual", "mid"),
    ("hidden_states + additional_residuals", "feature"),
    ("sample += down_intrablock_additional_residuals.pop(0)", "feature"),
    ("down_intrablock_additional_residuals.pop(0)", "feature"),
    ("torch.cat([hidden_states, res_hidden_states]", "up"),
    ("res_hidden_states_tuple[-1]", "up"),
    ("attn_output + hidden_states", "up"),
)
"""What diffusers' UNet says there, and older releases said."""
_FRAME = re.compile(r'File "([^"]{1,400})", line \d+(?:, in (\S{1,100}))?')
_OURS = re.compile(r"unet_2d|unet_blocks|/resnet\.py$|upsampling\.py$|normalization\.py$")
_LIBRARIES = re.compile(r"/(diffusers|transformers|peft|safetensors|torchvision|accelerate|huggingface_hub)/")
_PYTORCH = re.compile(r"/torch/|/torch\\|peft_utils\.py$")


def stage(text: str, start: int, end: int) -> Stage | None:
    """Where in the UNet the message between `start` and `end` was raised, where source lines around it say so."""
    before = text[max(0, start - _BEFORE) : start]
    seen = [(before.rfind(line), stage) for line, stage in _LINES]
    last, found = max(seen, key=lambda pair: pair[0])
    if last >= 0:
        return found
    after = text[end : end + _AFTER]
    if "from user code" in after:  # torch.compile
        return next((stage for line, stage in _LINES if line in after), None)
    return None


def elsewhere(text: str) -> str:
    """The file of a library that a traceback ends in, where that is not the UNet; empty where none is known."""
    frames = [match[1].replace("\\", "/") for match in _FRAME.finditer(text)]
    frames = [frame for frame in frames if not _PYTORCH.search(frame)]
    if not frames or _OURS.search(frames[-1]):
        return ""
    last = frames[-1]
    return last.rsplit("/", 1)[-1] if _LIBRARIES.search(last) or "lora" in last.lower() else ""
