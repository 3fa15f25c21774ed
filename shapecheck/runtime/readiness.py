"""Know which tensors were there before a ControlNet ran, so that a UNet may begin beside it and not after it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_Seen = dict[int, tuple[Any, int]]
"""From a tensor's id to a weak reference to it, and the number of changes that PyTorch knows of."""


class ReadyInputs(threading.local):
    """The tensors that a thread's last ControlNets were called with, and the event at which they held what they hold.

    A tensor that was changed since is not ready. A change that PyTorch is not told of, through `.data` or by another library
    that writes into its memory, is not seen.
    """

    def __init__(self) -> None:
        self._seen: _Seen = {}
        self._event: Any = None
        self._stream: Any = None

    def note(self, values: Iterable[Any], stream: Any, record: Callable[[], Any]) -> None:
        """Note that these are ready once all that is queued on the stream has run, which `record` gives an event for."""
        seen = _look(values)
        if seen is None:
            self._event = None
        elif self._event is None or self._stream != stream or not _is_within(seen, self._seen):
            self._seen, self._stream, self._event = seen, stream, record()

    def find(self, values: Iterable[Any], stream: Any) -> Any:
        """Return the event at which all of these were ready, if they were noted on this stream and have not been changed.

        It is forgotten then: what has been queued up to the next ControlNet, such as a reader of the image, comes before it.
        """
        seen, event = _look(values), self._event
        is_ready = event is not None and self._stream == stream and bool(seen) and _is_within(seen or {}, self._seen)
        self._event = None
        return event if is_ready else None


READY = ReadyInputs()


def note_ready(values: Iterable[Any], device: torch.device) -> None:
    """Note what a ControlNet on a GPU is called with."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(device)
        READY.note(values, stream, lambda: stream.record_event())


def find_ready(values: Iterable[Any], device: torch.device) -> torch.cuda.Event | None:
    """Return the event from which on a UNet on a GPU may read these; None if that is only when it is called."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    event: torch.cuda.Event | None = READY.find(values, torch.cuda.current_stream(device))
    return event


def _look(values: Iterable[Any]) -> _Seen | None:
    """Return the tensors on a GPU among these (others are read when they are passed); None if one hides its changes."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.device.type != "cpu"]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return {id(tensor): (weakref.ref(tensor), tensor._version) for tensor in tensors}


def _is_within(seen: _Seen, noted: _Seen) -> bool:
    return all(
        number in noted and noted[number][0]() is ref() and noted[number][1] == count for number, (ref, count) in seen.items()
    )
