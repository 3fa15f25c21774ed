"""When the parts of a frame began and ended, on the device that computes them, and how much memory it takes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapecheck.runtime.dropin import Session


class Clock:
    """Marks along one frame. On a GPU they are CUDA events on the current stream, so that nothing waits in between."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._marks: list[Any] = []

    def begin(self) -> None:
        """Forget the last frame, once all that it left to do is done."""
        self._settle()
        self._marks.clear()

    def mark(self) -> None:
        """End a part and begin the next."""
        if self._on_gpu:
            event: Any = torch.cuda.Event
            self._marks.append(event(enable_timing=True))
            self._marks[-1].record(torch.cuda.current_stream(self._device))
        else:
            self._marks.append(time.perf_counter())

    def parts(self) -> list[float]:
        """Return the milliseconds between the marks, once all is done."""
        self._settle()
        pairs = pairwise(self._marks)
        return [one.elapsed_time(other) if self._on_gpu else (other - one) * 1000 for one, other in pairs]

    def _settle(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)


class MarkedSession:
    """A session whose calls are marked at both ends."""

    def __init__(self, session: Session, clock: Clock) -> None:
        self._session, self._clock = session, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Call the session between two marks."""
        self._clock.mark()
        outputs = self._session(inputs)
        self._clock.mark()
        return outputs


def measure_memory(device: torch.device) -> int | None:
    """Return the bytes taken, on a GPU by everybody, else by this process; None if the system does not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
