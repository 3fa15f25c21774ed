"""The place that a text says it was raised at: an addition of residuals, on the way up, or somewhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from shapecheck.explain.simulate import Stage

# the lines of diffusers that a traceback shows, of older releases too
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
}
"""By the kind of a text, the files of layers that raise it if residuals do not fit. diffusers' VAE is made of them too."""
_CONTROLNET = re.compile(r"controlnets?/\w+\.py$|/controlnet\.py$")
_OTHERS = re.compile(r"autoencoder|/vae\.py$|/transformers/|/text_encoder|controlnet|/lora|/peft/|lycoris")
_ABOUT_RESIDUALS = re.compile(r"control|residual|res_sample|\bskip|\bhs\.pop", re.IGNORECASE)
_TRACER = re.compile(r"torch/(_dynamo|export|_export|onnx)/")
"""PyTorch's tracers: a traceback does not show what is below them."""
_TORCH = re.compile(r"(^|/)torch/|peft_utils\.py$|/contextlib\.py$|accelerate/hooks\.py$")
"""PyTorch, and what wraps a call without doing anything of its own."""
_BEFORE, _AFTER = 16_000, 3_000
"""Characters of a traceback that are read around its message."""
_HEAD = "Traceback (most recent call last)"
_USER_CODE = "from user code"
_FRAME = re.compile(
    r'File "(?P<python>[^"]{1,400})", line \d+(?:, in \S{1,100})?'
    r"|(?<!\S)(?P<ipython>[^\s\"]{1,400}?\.py)(?::\d{1,7}:?,? in \S{1,100}| in [\w.<>]{1,100}\()"
    r"|(?P<cell>Cell In ?\[\d{1,6}\]|Input In \[\d{1,6}\]|<ipython-input-[\w-]{1,40}>)"
)
_RAISED_AT = re.compile(r"(?<!\S)([^\s\"]{1,400}?\.py):\d{1,7}: \w{0,60}(?:Error|Exception|Warning)\b")


class RaiseSite(NamedTuple):
    """The place that raised a message, as far as the text around it shows."""

    stage: Stage | Literal["nets"] | None = None
    elsewhere: str = ""
    """The file, if it neither adds nor uses residuals."""


def find_raise_site(text: str, start: int, end: int, kind: str) -> RaiseSite:
    """Return where the message of that kind between `start` and `end` was raised."""
    before, after = text[max(0, start - _BEFORE) : start], text[end : end + _AFTER]
    if _USER_CODE in after:  # torch.compile shows the user's frames after the message
        part = after.split(_USER_CODE, 1)[1]
    else:
        raised = _RAISED_AT.search(after.split(_HEAD, 1)[0])  # pytest shows the last frame after the message
        part = before.rsplit(_HEAD, 1)[-1] + (f" {raised[1]}:0: in _" if raised else "")
    last, stage = max((part.rfind(line), stage) for line, stage in _LINES)
    if last >= 0:
        return RaiseSite(stage)
    matches = list(_FRAME.finditer(part))
    files = [match[match.lastgroup or 0].replace("\\", "/") for match in matches]
    frame = next((number for number in reversed(range(len(files))) if not _TORCH.search(files[number])), None)
    if frame is None or any(map(_TRACER.search, files[frame + 1 :])):
        return RaiseSite()
    source = part[matches[frame].end() : matches[frame + 1].start() if frame + 1 < len(matches) else None]
    return RaiseSite(None, "" if _may_be_unet(files, files[frame], source, kind) else files[frame].rsplit("/", 1)[-1])


def _may_be_unet(files: Sequence[str], file: str, source: str, kind: str) -> bool:
    """Return whether a frame, with its file and source, may add or use residuals; `files` are those of the whole traceback."""
    if kind == "from_unet":
        return "diffusers" in file
    in_controlnet = kind in ("dtype", "text width", "sample channels")  # a ControlNet's layers say these too
    if _UNET.search(file) or (in_controlnet and _CONTROLNET.search(file)):
        return True
    if (part := _PART.search(file)) and part[1] in _PARTS.get(kind, "").split():
        through = any(map(_UNET.search, files)) or (in_controlnet and any(map(_CONTROLNET.search, files)))
        return through or not any(map(_OTHERS.search, files))
    return not _OTHERS.search(file) and bool(_ABOUT_RESIDUALS.search(source))
