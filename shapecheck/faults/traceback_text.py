"""Frames of tracebacks as Python, IPython, pytest and rich print them, read from a text on one line."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BEFORE, _AFTER = 16_000, 3_000
"""Characters of a traceback that are looked at around its message."""
_HEAD = "Traceback (most recent call last)"
_USER_CODE = "from user code"
_FRAME = re.compile(
    r'File "(?P<python>[^"]{1,400})", line \d+(?:, in \S{1,100})?'
    r"|(?<!\S)(?P<ipython>[^\s\"]{1,400}?\.py)(?::\d{1,7}:?,? in \S{1,100}| in [\w.<>]{1,100}\()"
    r"|(?P<cell>Cell In ?\[\d{1,6}\]|Input In \[\d{1,6}\]|<ipython-input-[\w-]{1,40}>)"
)
_RAISED_AT = re.compile(r"(?<!\S)([^\s\"]{1,400}?\.py):\d{1,7}: \w{0,60}(?:Error|Exception|Warning)\b")
"""pytest tells the last frame after the message."""
_TORCH = re.compile(r"(^|/)torch/|peft_utils\.py$|/contextlib\.py$|accelerate/hooks\.py$")
"""PyTorch, and what wraps a call without doing anything of its own."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: its file, with forward slashes, and the source that is shown of it."""

    file: str
    source: str

    @property
    def name(self) -> str:
        """The file without its folders."""
        return self.file.rsplit("/", 1)[-1]

    @property
    def is_of_torch(self) -> bool:
        """Whether it is PyTorch's own, and says nothing of whose code failed."""
        return bool(_TORCH.search(self.file))


def around(text: str, start: int, end: int) -> str:
    """The part of a text that tells where the message between `start` and `end` was raised."""
    before, after = text[max(0, start - _BEFORE) : start], text[end : end + _AFTER]
    if _USER_CODE in after:  # torch.compile tells it after the message
        return after.split(_USER_CODE, 1)[1]
    raised = _RAISED_AT.search(after.split(_HEAD, 1)[0])
    last = f" {raised[1]}:0: in _" if raised else ""
    return before.rsplit(_HEAD, 1)[-1] + last


def frames(part: str) -> list[Frame]:
    """The frames in such a part, the one that raised it last; empty where none is shown."""
    found = list(_FRAME.finditer(part))
    starts = [*(match.start() for match in found), len(part)]
    return [
        Frame(match[match.lastgroup or 0].replace("\\", "/"), part[match.end() : end])
        for match, end in zip(found, starts[1:], strict=True)
    ]
